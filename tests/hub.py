"""A small hub on loopback that answers as the Hugging Face hub does, as far as huggingface_hub and datasets ask it.

Large files are redirected to another path, as to its CDN, and served in ranges; small ones come at once. Faults are
set by a test: connections cut in the middle of a file, 429 with Retry-After, a private or gated repository.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 4096  # bytes from which on a file is one of LFS

Files = Mapping[str, bytes]


@dataclass
class Hub:
    """The contents of the hub, its faults, and what it was asked."""

    commits: dict[str, dict[str, Files]] = field(default_factory=dict)
    """Files of each commit of each repository; the last commit is `main`."""
    closed: dict[str, str] = field(default_factory=dict)
    """Repositories that need a login: "private" or "gated"."""
    cut: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Of a file: after how many bytes the connection breaks, and how many times yet."""
    busy: int = 0
    """How many requests are answered with 429."""
    ranges: bool = True
    """Whether a request for a range gets one; otherwise it gets the whole file."""
    swapped: dict[str, bytes] = field(default_factory=dict)
    """Of a file: what is sent in its place."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of each."""
    endpoint: str = ""

    def publish(self, repository: str, files: Files) -> str:
        """A new commit with these files; returns its hash."""
        content = repr(sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items()))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = dict(files)
        return commit

    def sent(self, name: str) -> list[str | None]:
        """The ranges in which a file was asked for."""
        return [asked for method, path, asked in self.requests if method == "GET" and path.endswith(name)]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub, on a free port."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        if self.hub.busy:
            self.hub.busy -= 1
            return self._send(429, b"", {"Retry-After": "0"})
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", path):
            repository, verb, revision, below = match.groups()
            if found := self._commit(repository, revision or "main"):
                self._api(repository, *found, verb, below, parse_qs(url.query), parse_qs(body.decode()))
        elif match := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if found := self._commit(match[1], match[2]):
                self._resolve(*found, match[3])
        elif match := re.fullmatch(r"/cdn/([0-9a-f]{64})/(.+)", path):
            self._file(self._content(match[1]), match[2], {"ETag": f'"{match[1]}"'})
        else:
            self._send(404, b"{}")

    def _commit(self, repository: str, revision: str) -> tuple[str, Files] | None:
        commits = self.hub.commits.get(repository)
        why = self.hub.closed.get(repository)
        if commits is None or why == "private":
            self._send(401, b'{"error":"Invalid username or password."}', {"X-Error-Message": "Invalid username"})
        elif why == "gated":
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif revision == "main":
            return list(commits.items())[-1]
        elif found := [each for each in commits.items() if each[0].startswith(revision)]:
            return found[0]
        else:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return None

    def _api(self, repository: str, commit: str, files: Files, verb: str | None, below: str, *asked: Any) -> None:
        query, form = asked
        if verb == "paths-info":
            entries = [_entry(path, files) for path in form.get("paths", ())]
            return self._json([entry for entry in entries if entry])
        if verb == "tree":
            inside = [path for path in files if not below or path.startswith(below + "/")]
            folders = {str(PurePosixPath(path).parent) for path in inside} - {".", below}
            if not inside:
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return self._json([_entry(path, files) for path in sorted({*inside, *folders})])
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in files]
        if query.get("blobs"):
            for sibling in siblings:
                entry = _entry(sibling["rfilename"], files) or {}
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if "lfs" in entry:
                    sibling["lfs"] = {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 134}
        return self._json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _resolve(self, commit: str, files: Files, path: str) -> None:
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        data = files[path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if len(data) < LARGE:
            return self._file(data, path, headers | {"ETag": f'"{_git(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{digest}"'}
        return self._send(302, b"", headers | linked | {"Location": f"{self.hub.endpoint}/cdn/{digest}/{path}"})

    def _content(self, digest: str) -> bytes:
        every = (data for commits in self.hub.commits.values() for files in commits.values() for data in files.values())
        return next(data for data in every if hashlib.sha256(data).hexdigest() == digest)

    def _file(self, data: bytes, path: str, headers: dict[str, str]) -> None:
        name = PurePosixPath(path).name
        data = self.hub.swapped.get(name, data)
        status, start = 200, 0
        if self.hub.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            start, stop = int(asked[1]), int(asked[2]) + 1 if asked[2] else len(data)
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        after, times = self.hub.cut.get(name, (0, 0))
        if self.command == "GET" and times:
            self.hub.cut[name] = after, times - 1
            self._send(status, data, headers, stop=max(after - start, 0))
            self.close_connection = True
            return
        self._send(status, data, headers)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}, stop: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop])
            self.wfile.flush()


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(path: str, files: Files) -> dict[str, Any] | None:
    """What the hub's API says of a file or folder."""
    if path not in files:
        below = any(other.startswith(path + "/") for other in files)
        return {"type": "directory", "path": path, "oid": "0" * 40} if below else None
    data = files[path]
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git(data)}
    if len(data) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
