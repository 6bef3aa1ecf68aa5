"""Sealed files: what a re-run reads again later is only what this user's pgolf wrote on this machine.

A submission, or the repository that it comes in, can bring along a folder that looks like a finished re-run. So each
file has a MAC (HMAC-SHA256) over its contents and its role. The key is random and lies in the user's state directory,
which no submission brings along and no sandbox shows.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pgolf.errors import EnvironmentBroken

_KEY, _MAC = "key", "mac"
_BYTES = 32


def seal(values: Mapping[str, Any], role: str) -> bytes:
    """The JSON of `values` with its MAC. `role`: what the file is, so that none can stand in for another."""
    return (json.dumps({**values, _MAC: _mac(values, role)}, indent=1, allow_nan=False) + "\n").encode()


def unseal(data: bytes, role: str) -> dict[str, Any]:
    """What `seal` got. Raises ValueError or RecursionError for anything else."""
    values = json.loads(data)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    given = str(values.pop(_MAC, "")).encode("utf-8", "backslashreplace")
    if not hmac.compare_digest(given, _mac(values, role).encode()):
        raise ValueError("not sealed with this user's key")
    return values


def home() -> Path:
    """The folder of the key: pgolf's in the user's state directory."""
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".local" / "state") / "pgolf"
    except RuntimeError:
        raise EnvironmentBroken("this user has no home directory; set XDG_STATE_HOME to a folder of theirs") from None


def _mac(values: Mapping[str, Any], role: str) -> str:
    content = json.dumps([role, values], sort_keys=True, allow_nan=False).encode()
    return hmac.new(_key(), content, hashlib.sha256).hexdigest()


def _key() -> bytes:
    """The key, made when there is none. Raises EnvironmentBroken when it is not this user's alone."""
    place = home() / _KEY
    try:
        if not os.path.lexists(place):
            _make(place)
        with os.fdopen(os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            found = os.fstat(file.fileno())
            sound = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
            key = file.read(_BYTES + 1) if sound else b""
    except OSError as error:
        raise EnvironmentBroken(
            f"{place}: cannot be made or read ({error.strerror}); set XDG_STATE_HOME to a folder of yours"
        ) from None
    if len(key) != _BYTES:
        raise EnvironmentBroken(
            f"{place}: is not a key that this user alone can read; remove it, and the folders of unfinished re-runs"
        )
    return key


def _make(place: Path) -> None:
    """A key under `place`, complete from the first moment, unless another process is faster."""
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = place.with_name(f"{_KEY}-{secrets.token_hex(8)}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        try:
            file.write(secrets.token_bytes(_BYTES))
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):
                os.link(temporary, place)
        finally:
            temporary.unlink()
