"""How far a build came, and the claim of one process on the folder.

What is finished has its final name; what is not ends in `.part`. `build.json` says what was asked for and how far the
build came; it goes when `dataset.json` is there.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pgolf.data.build.shard_writer import STATE, Json
from pgolf.data.dataset import INDEX_BYTES
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import is_temporary, read_regular, write_atomically

TOKENIZER = "tokenizer.model"
DOCUMENTS = "val_documents.jsonl"
DEVELOPMENT = "dev.jsonl"

_COUNTS = ("documents", "tokens", "bytes", "dropped_empty", "dropped_overlap", "skipped_bad")


@dataclass
class Checkpoint:
    """The contents of build.json."""

    settings: Json
    validation: Json | None = None
    """Entries for dataset.json, once validation text and shards are there."""
    development: Json | None = None
    """The entry of the development text, there as soon as the validation text is; None: it has no document."""
    position: int = 0
    """Documents of the training sources that are processed, held-out ones included."""
    read_bytes: int = 0
    shards: list[Json] = field(default_factory=list)
    part_tokens: int = 0
    """Tokens of the unfinished shard that belong to documents before `position`."""
    counts: Json = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))

    def save(self, out: Path) -> None:
        """Write it into the folder."""
        write_atomically(out / STATE, dumped(asdict(self)))


@contextlib.contextmanager
def claimed(out: Path, identity: Json) -> Iterator[Checkpoint]:
    """The checkpoint in `out`, a new one if there is none, while no other process may work there.

    Errors inside become one sentence. After a UsageError nothing of the build is left.
    """
    state: Checkpoint | None = None
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            state = _load(out, identity)
            for path in filter(is_temporary, out.iterdir()):
                path.unlink()
            yield state
    except UsageError:
        if state is not None:
            _remove(out, made)
        raise
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out}: is not a folder") from None
    except BrokenProcessPool:
        raise EnvironmentBroken(
            "a worker process died, most likely for lack of memory; run the same command again to continue, "
            "with fewer --workers"
        ) from None
    except OSError as error:
        raise EnvironmentBroken(
            f"{error.filename or out}: {error.strerror or error}; put that right and run the same command again"
        ) from None


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UsageError(f"{out}: another build or fetch is at work there") from None
    finally:
        os.close(lock)


def _load(out: Path, identity: Json) -> Checkpoint:
    path = out / STATE
    if path.is_file():
        try:
            state = Checkpoint(**json.loads(read_regular(path, INDEX_BYTES)))
            if state.validation is not None and not state.validation["text"]:
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            raise EnvironmentBroken(
                f"{path}: damaged or of another version of pgolf; delete the folder and build again"
            ) from None
        check_same(out, state.settings, identity)
        return state
    if others := [p.name for p in out.iterdir() if not is_temporary(p)]:
        raise UsageError(f"{out}: is not empty ({min(others)}) and no build began there; choose another --out")
    state = Checkpoint(identity)
    state.save(out)
    return state


def check_same(out: Path, before: Json, now: Json) -> None:
    """Raises UsageError when a build in `out` began with other settings."""
    for key, value in now.items():
        if before.get(key) != value:
            detail = f"{key} {before.get(key)}, not {value}" if isinstance(value, str | int) else f"other {key}"
            raise UsageError(f"{out}: was begun with {detail}; choose another --out or delete it")


def _remove(out: Path, made: bool) -> None:
    with contextlib.suppress(OSError):  # the mistake is what matters
        for name in (STATE, TOKENIZER, DOCUMENTS, DEVELOPMENT, "train_*.bin", "val_*.bin"):
            for path in (*out.glob(name), *out.glob(name + ".part")):
                path.unlink()
        if made:
            out.rmdir()


def dumped(value: Json) -> bytes:
    """JSON. Bytes of a file name that are no text become escapes, which JSON has too."""
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(errors="backslashreplace")
