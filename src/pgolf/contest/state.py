"""What a re-run keeps on disk, so that it can be killed at any moment and started again.

    state.json                       what is run again, where, and the seeds; written before anything else
    calibration.json
    seed-1/artifact.zst, log.jsonl, output.txt, run.json     the last is written last: where it is, the training is
                                     finished; log and output are what train.py handed over and printed last
    seed-1/score-DIGEST.losses.npz, score-DIGEST.score.json      likewise, for the score on the text of that digest
    record.json                      the published record

Each file is written atomically, so what is half done has left no trace. The folder is this user's alone: seeds and
log-losses on secret texts are in it.

What is read again is sealed (see `seal`), or its digest stands in a sealed file: a submission may bring along a folder
of this name. state.json has a random name for the re-run, and every other file is sealed under that name and its own.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pgolf.contest.rerun_record import SeedRun
from pgolf.contest.seal import seal, unseal
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import is_temporary, printable, read_regular, write_atomically
from pgolf.score import losses
from pgolf.score import record as score_record
from pgolf.score.losses import Losses
from pgolf.score.record import Record, typed

FORMAT = "pgolf-rerun-state-2"
RECORD = "record.json"
ARTIFACT, LOG, OUTPUT = "artifact.zst", "log.jsonl", "output.txt"
_STATE, _LOCK, _RUN = "state.json", "lock", "run.json"
_MOST_BYTES = 1 << 24
_SEEDS = 1 << 32  # numpy takes no larger ones

T = TypeVar("T")


class Foreign(UsageError):
    """Something that this user's pgolf did not write on this machine, such as what a submission brought along."""

    def __init__(self, path: Path, root: Path) -> None:
        super().__init__(
            f"{path}: was not written by this user's pgolf on this machine, or was changed since; choose another "
            f"--out, or remove {root}"
        )


@dataclass(frozen=True)
class State:
    """The contents of state.json."""

    format: str
    name: str
    """Random: under it the other files are sealed, so that no file of another re-run fits."""
    identity: Mapping[str, Any]
    """All that has to be the same when the re-run goes on."""
    seeds: tuple[int, ...] = ()
    """In the order in which they were drawn. Once drawn a seed stays, so that none is picked by its score."""


@dataclass(frozen=True, kw_only=True)
class _Scored(Record):
    """The contents of a score's file: its record, and the SHA-256 of its log-losses."""

    losses: str | None


class Folder:
    """A re-run's folder, locked while it is open. Made by `opened`."""

    def __init__(self, root: Path, state: State) -> None:
        self.root, self._state = root, state

    def prepare(self, count: int) -> tuple[int, ...]:
        """The seeds: at least `count`, the missing ones drawn now."""
        seeds = list(self._state.seeds)
        while len(seeds) < count:
            if (seed := secrets.randbelow(_SEEDS)) not in seeds:
                seeds.append(seed)
        if len(seeds) > len(self._state.seeds):
            self._state = replace(self._state, seeds=tuple(seeds))
            _write_state(self.root, self._state)
        return tuple(seeds)

    @property
    def is_new(self) -> bool:
        return not self._state.seeds

    def seed(self, number: int) -> Path:
        """The folder of a seed, counted from 1."""
        folder = self.root / f"seed-{number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink():
            raise Foreign(folder, self.root)
        return folder

    def artifact(self, number: int) -> Path:
        return self.seed(number) / ARTIFACT

    def run(self, number: int) -> SeedRun | None:
        """The finished training of a seed. Raises EnvironmentBroken when its artifact is not the one it made."""
        run = self.read(f"{self.seed(number).name}/{_RUN}", SeedRun)
        if run and run.artifact:
            _compare(self.artifact(number), run.artifact.sha256, run.artifact.bytes)
        return run

    def finish(self, number: int, run: SeedRun, given: Mapping[str, bytes | None]) -> None:
        """Keep a training and the files that came of it, by their names."""
        for name, content in given.items():
            if content is not None:
                write_atomically(self.seed(number) / name, content)
        self.write(f"{self.seed(number).name}/{_RUN}", asdict(run))

    def losses(self, number: int, text: str) -> Path:
        """The log-losses of a seed's score on the text of that digest."""
        return losses.path(self.root / self._score(number, text))

    def score(self, number: int, text: str) -> Record | None:
        """The finished score of a seed on the text of that digest. Raises as `run` does, for its log-losses."""
        found = self.read(self._score(number, text), _Scored)
        if found and found.losses:
            _compare(self.losses(number, text), found.losses, losses.LARGEST)
        return found

    def finish_score(self, number: int, text: str, result: Record, kept: Losses | None) -> None:
        """Keep a score, with its log-losses where it has them."""
        digest = None
        if kept is not None:
            content = losses.encode(kept)
            digest = hashlib.sha256(content).hexdigest()
            write_atomically(self.losses(number, text), content)
            self.losses(number, text).chmod(0o600)
        self.write(self._score(number, text), {**score_record.as_json(result), "losses": digest})

    def _score(self, number: int, text: str) -> str:
        return f"{self.seed(number).name}/score-{text[:16]}.score.json"

    def read(self, name: str, kind: type[T]) -> T | None:
        """What `write` wrote, None if there is no such file. Raises Foreign for anything else."""
        values = _read(self.root, name, f"{self._state.name} {name}")
        try:
            found: T | None = None if values is None else typed(kind, values)
        except TypeError:
            raise Foreign(self.root / name, self.root) from None
        return found

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Keep `values`, of JSON, under a name in the folder."""
        write_atomically(self.root / name, seal(values, f"{self._state.name} {name}"))


def _read(root: Path, name: str, role: str) -> dict[str, Any] | None:
    """The contents of a sealed file, None if there is none. Raises Foreign when it is not sealed for this role."""
    try:
        return unseal(read_regular(root / name, _MOST_BYTES), role)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EnvironmentBroken(f"{root / name}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise Foreign(root / name, root) from None


def _read_state(root: Path) -> State | None:
    """The state of a re-run that was begun in the folder. Raises Foreign for a folder that this pgolf did not fill."""
    values = _read(root, _STATE, _STATE)
    if values is None:
        names = {path.name for path in root.iterdir() if not is_temporary(path)}
        if names - {_LOCK}:
            raise Foreign(root, root)
        return None
    if values.get("format") != FORMAT:
        raise UsageError(f"{root}: of another version of pgolf; choose another --out, or remove the folder")
    state: State = typed(State, values)
    return state


def _write_state(root: Path, state: State) -> None:
    write_atomically(root / _STATE, seal(asdict(state), _STATE))


def _compare(path: Path, digest: str | None, limit: int) -> None:
    """Raises EnvironmentBroken when the file is not the one of that digest."""
    try:
        found = hashlib.sha256(read_regular(path, limit)).hexdigest()
    except OSError as error:
        raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror}); remove {path.parent}") from None
    if found != digest:
        raise EnvironmentBroken(f"{path}: was changed after it was made; remove {path.parent}")


def _check_identity(root: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UsageError when the folder belongs to another re-run."""
    for name, value in now.items():
        if (other := before.get(name)) != value:
            raise UsageError(
                f"{root}: begun with another {name} ({printable(other):.80}, now {printable(value):.80}); "
                "choose another --out, or remove the folder"
            )


@contextlib.contextmanager
def opened(root: Path, identity: Mapping[str, Any]) -> Iterator[Folder]:
    """The folder of the re-run of that identity, made if it is not there.

    Raises UsageError while another process has it or when it belongs to another re-run, Foreign when it does not come
    from this user's pgolf; then nothing in it has been changed.
    """
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{root}: it, or the path to it, is not a folder; choose another --out") from None
    _read_state(root)
    with _locked(root):
        state = _read_state(root)
        root.chmod(0o700)
        for path in filter(is_temporary, root.rglob("*")):  # of a process that was killed
            path.unlink()
        if state is None:
            state = State(FORMAT, secrets.token_hex(16), identity)
            _write_state(root, state)
        _check_identity(root, state.identity, identity)
        yield Folder(root, state)


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Raises UsageError while another process has the folder."""
    place = root / _LOCK
    try:
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise Foreign(place, root) from None
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Foreign(place, root)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{root}: another re-run is using this folder; wait for it, or choose another --out"
            ) from None
        yield
    finally:
        os.close(descriptor)
