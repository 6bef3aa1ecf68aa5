"""Files of a dataset repository on the Hugging Face hub: listed with their digests, downloaded, verified.

A download goes into a `.part` file and can go on there after any interruption, also in another process; the library's
own download begins a file again. The hub is the library's default one, or the one that HF_ENDPOINT names.
"""

import hashlib
import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pgolf.data.build.batch import first_line
from pgolf.errors import EnvironmentBroken, PgolfError, UsageError
from pgolf.files import check_replaceable, open_regular, printable

API_SECONDS = 60.0  # for an answer of the hub
API_TRIES = 6
WAIT_SECONDS = 300  # longest pause that a hub may ask for

T = TypeVar("T")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at a revision."""

    path: str
    size: int
    sha256: str | None
    """Digest of a large file ..."""
    git: str
    """... and git's digest of a small one."""

    @property
    def digest(self) -> str:
        """What tells its contents from any other."""
        return self.sha256 or self.git


@dataclass(frozen=True)
class Repository:
    """A dataset repository at a commit."""

    name: str
    revision: str
    """The commit, 40 hexadecimal digits."""
    endpoint: str | None
    files: Mapping[str, RemoteFile]

    def file(self, path: str) -> RemoteFile:
        """Raises UsageError when there is none of that path."""
        if path not in self.files:
            raise UsageError(f"{self.name}: has no file {printable(path)} at revision {self.revision[:12]}")
        return self.files[path]


def open_repository(name: str, revision: str | None = None) -> Repository:
    """Ask the hub for a dataset repository and its files, at `revision` (None: the main branch).

    Raises UsageError when there is none of that name or revision, EnvironmentBroken when the hub cannot be asked.
    """
    hub = _library()
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    api = hub.HfApi(endpoint=endpoint)
    with _sentences(name, revision):
        info = _patiently(
            lambda: api.dataset_info(name, revision=revision, files_metadata=True, timeout=API_SECONDS), name
        )
        files = {}
        for each in info.siblings or ():
            sha256 = each.lfs.sha256 if each.lfs else None
            files[each.rfilename] = RemoteFile(each.rfilename, int(each.size), sha256, str(each.blob_id))
        return Repository(name, str(info.sha), endpoint, files)


def download(repository: Repository, file: RemoteFile, part: Path, advance: Callable[[int], object]) -> None:
    """Bring `part` to the whole contents of `file`; what it already holds is kept. `advance` gets bytes as they come.

    Raises EnvironmentBroken, keeping `part` for the next try, when the hub or the disk fails; a part whose digest is
    wrong is removed.
    """
    with _opened(part) as target:
        have = target.seek(0, os.SEEK_END)
        if have > file.size:
            target.truncate(0)
            have = 0
        advance(have)
        if have < file.size:
            _get(repository, file, _Counted(target, advance), have)
    if _digest(part, file) != file.digest:
        part.unlink()
        raise EnvironmentBroken(
            f"{printable(file.path)}: what came from {repository.name} does not have the digest that the hub states; "
            "it was removed: run the same command again"
        )


def download_lines(
    repository: Repository, file: RemoteFile, part: Path, lines: int, advance: Callable[[int], object]
) -> None:
    """Bring `part` to the first `lines` lines of `file`, of which the hub states no digest.

    Raises EnvironmentBroken as `download` does, and when the file has fewer.
    """
    with _opened(part) as target:
        wanted = lines - sum(block.count(b"\n") for block in iter(lambda: target.read(1 << 20), b""))
        have = target.tell()
        advance(have)
        if wanted > 0 and have < file.size:
            counted = _Counted(target, advance, wanted)
            try:
                _get(repository, file, counted, have)
            except _Enough:
                return
            wanted = counted.lines or 0
        if wanted > 0:
            raise EnvironmentBroken(f"{printable(file.path)}: has {lines - wanted:,} lines, {lines:,} are needed")


class _Enough(Exception):
    """All lines that are wanted are there."""


class _Counted:
    """The part file as the library writes to it: counts bytes, and ends after so many lines."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], object], lines: int | None = None) -> None:
        self._file, self._advance, self.lines = file, advance, lines
        self.tell, self.seek = file.tell, file.seek

    def write(self, data: bytes) -> None:
        if self.lines is not None and (found := data.count(b"\n")) >= self.lines:
            data = b"".join(line for line, _ in zip(data.splitlines(keepends=True), range(self.lines), strict=False))
            self._file.write(data)
            self._advance(len(data))
            raise _Enough
        if self.lines is not None:
            self.lines -= found
        self._file.write(data)
        self._advance(len(data))

    def truncate(self) -> None:
        """The hub sends the file from its beginning, although the rest was asked for."""
        end = self._file.seek(0, os.SEEK_END)
        self._advance(-end)
        self._file.truncate(0)
        self._file.seek(0)


def _get(repository: Repository, file: RemoteFile, target: _Counted, have: int) -> None:
    """Append the bytes from `have` on. The library resumes a cut connection, and waits where the hub asks for it."""
    hub = _library()
    url = hub.hf_hub_url(
        repository.name, file.path, repo_type="dataset", revision=repository.revision, endpoint=repository.endpoint
    )
    headers = hub.utils.build_hf_headers()
    with _sentences(repository.name, repository.revision, file.path):
        hub.file_download.http_get(url, target, resume_size=have, headers=headers, expected_size=file.size)


@contextmanager
def _opened(part: Path) -> Iterator[BinaryIO]:
    check_replaceable(part)  # the file is appended to, so no link is followed
    with part.open("r+b" if part.exists() else "x+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def matches(path: Path, file: RemoteFile) -> bool:
    """Whether a file on the disk has the contents of `file`. Raises OSError."""
    return path.stat().st_size == file.size and _digest(path, file) == file.digest


def _digest(path: Path, file: RemoteFile) -> str:
    with open_regular(path) as opened:
        if file.sha256:
            return hashlib.file_digest(opened, "sha256").hexdigest()
        blob = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
        while block := opened.read(1 << 20):
            blob.update(block)
        return blob.hexdigest()


def _patiently(call: Callable[[], T], name: str) -> T:
    """What `call` returns, tried again where the hub says that it is busy."""
    for left in reversed(range(API_TRIES)):
        try:
            return call()
        except _library().errors.HfHubHTTPError as error:
            if not left or error.response.status_code not in (429, 500, 502, 503, 504):
                raise
            asked = error.response.headers.get("Retry-After", "")
            time.sleep(min(int(asked), WAIT_SECONDS) if asked.isdecimal() else 2 ** (API_TRIES - left - 1))
    raise AssertionError(name)


@contextmanager
def _sentences(name: str, revision: str | None, path: str | None = None) -> Iterator[None]:
    """Errors of the library become one sentence. Its errors derive from each other: the narrow ones come first."""
    errors = _library().errors
    shown = printable(f"{name}: {path}" if path else name)
    try:
        yield
    except (PgolfError, _Enough):
        raise
    except errors.GatedRepoError:
        raise UsageError(
            f"{shown}: is gated; accept its terms on the hub's page and log in with `hf auth login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UsageError(f"{shown}: {MISSING}") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{shown}: has no revision {printable(revision)[:60]}") from None
    except errors.RemoteEntryNotFoundError:
        raise EnvironmentBroken(f"{shown}: is listed by the hub but not there; run the same command again") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UsageError(f"{shown}: {MISSING}") from None
        raise EnvironmentBroken(
            f"{shown}: the hub answers with status {error.response.status_code} "
            f"({_STATUS.get(error.response.status_code, 'an error')}); run the same command again later to continue"
        ) from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and type(error) is OSError:
            raise  # the disk's, not the network's: each HTTP library has classes of its own for that
        raise EnvironmentBroken(
            f"{shown}: the hub cannot be reached, or the connection broke ({first_line(error)[:200]}); run the same "
            "command again to continue"
        ) from None


MISSING = "the hub has no dataset of this name, or it is private: check the name, or log in with `hf auth login`"
_STATUS = {403: "forbidden", 429: "too many requests", 500: "its own error", 503: "it is overloaded"}


def _library() -> Any:
    """huggingface_hub without its own progress bars and warnings."""
    try:
        for module in ("utils", "errors", "file_download"):  # attributes of the package once they are imported
            importlib.import_module(f"huggingface_hub.{module}")
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        raise EnvironmentBroken(
            "reading from the hub needs the huggingface_hub package; run: pip install 'pgolf[data]'"
        ) from None
    hub.utils.logging.set_verbosity(logging.ERROR)
    hub.utils.disable_progress_bars("huggingface_hub.http_get")
    return hub
