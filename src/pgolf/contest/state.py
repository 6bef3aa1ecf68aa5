"""What a re-run keeps on disk, so that it can be killed at any moment and started again.

    state.json                       what is run again, where, and the seeds; written before the first training
    calibration.json
    seed-1/artifact.zst, log.jsonl, output.txt, run.json     the last is written last: where it is, the training is
                                     finished; log and output are what train.py handed over and printed last
    seed-1/score-DIGEST.losses.npz, score-DIGEST.score.json      likewise, for the score on the text of that digest
    record.json                      the published record

Each file is written atomically, so what is half done has left no trace. The folder is this user's alone: seeds and
log-losses on secret texts are in it.
"""

import contextlib
import fcntl
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pgolf.contest.rerun_record import SeedRun
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import is_temporary, printable, read_regular, write_atomically
from pgolf.score.record import typed

FORMAT = "pgolf-rerun-state-1"
RECORD = "record.json"
ARTIFACT, LOG, OUTPUT = "artifact.zst", "log.jsonl", "output.txt"
_STATE, _LOCK, _RUN = "state.json", "lock", "run.json"
_MOST_BYTES = 1 << 24
_SEEDS = 1 << 32  # numpy takes no larger ones

T = TypeVar("T")


@dataclass(frozen=True)
class State:
    """The contents of state.json."""

    format: str
    identity: Mapping[str, Any]
    """All that has to be the same when the re-run goes on."""
    seeds: tuple[int, ...]
    """In the order in which they were drawn. Once drawn a seed stays, so that none is picked by its score."""


class Folder:
    """A re-run's folder, locked while it is open. Made by `opened`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises UsageError when the folder belongs to another re-run, EnvironmentBroken when it was changed."""
        if (state := self.read(_STATE, State)) is None:
            return
        if state.format != FORMAT:
            raise UsageError(f"{self.root}: of another version of pgolf; choose another --out, or remove the folder")
        for name, value in identity.items():
            if (before := state.identity.get(name)) != value:
                raise UsageError(
                    f"{self.root}: begun with another {name} ({printable(before):.80}, now {printable(value):.80}); "
                    "choose another --out, or remove the folder"
                )

    def prepare(self, identity: Mapping[str, Any], count: int) -> tuple[int, ...]:
        """The seeds: at least `count`, the missing ones drawn now."""
        state = self.read(_STATE, State) or State(FORMAT, identity, ())
        seeds = list(state.seeds)
        while len(seeds) < count:
            if (seed := secrets.randbelow(_SEEDS)) not in seeds:
                seeds.append(seed)
        if len(seeds) > len(state.seeds):
            self.write(_STATE, State(FORMAT, identity, tuple(seeds)))
        return tuple(seeds)

    @property
    def is_new(self) -> bool:
        return not (self.root / _STATE).exists()

    def seed(self, number: int) -> Path:
        """The folder of a seed, counted from 1."""
        folder = self.root / f"seed-{number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def artifact(self, number: int) -> Path:
        return self.seed(number) / ARTIFACT

    def score(self, number: int, text: str) -> Path:
        """The record of a seed's score on the text of that digest."""
        return self.seed(number) / f"score-{text[:16]}.score.json"

    def run(self, number: int) -> SeedRun | None:
        """The finished training of a seed. Raises EnvironmentBroken when its artifact is not the one it made."""
        run = self.read(f"seed-{number}/{_RUN}", SeedRun)
        if run and run.artifact:
            path = self.artifact(number)
            try:
                digest = hashlib.sha256(read_regular(path, run.artifact.bytes)).hexdigest()
            except OSError as error:
                raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror}); remove {path.parent}") from None
            if digest != run.artifact.sha256:
                raise EnvironmentBroken(f"{path}: was changed after the training; remove {path.parent}")
        return run

    def finish(self, number: int, run: SeedRun, given: Mapping[str, bytes | None]) -> None:
        """Keep a training and the files that came of it, by their names."""
        for name, content in given.items():
            if content is not None:
                write_atomically(self.seed(number) / name, content)
        self.write(f"{self.seed(number).name}/{_RUN}", run)

    def read(self, name: str | Path, kind: type[T]) -> T | None:
        """What `write` wrote, None if there is no such file. Raises EnvironmentBroken when it is something else."""
        path = self.root / name
        try:
            value: T = typed(kind, json.loads(read_regular(path, _MOST_BYTES)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, TypeError, RecursionError):
            raise EnvironmentBroken(f"{path}: is not what a re-run wrote; remove it") from None
        return value

    def write(self, name: str, value: Any) -> None:
        write_atomically(self.root / name, (json.dumps(asdict(value), indent=1) + "\n").encode())


@contextlib.contextmanager
def opened(root: Path) -> Iterator[Folder]:
    """The folder of a re-run, made if it is not there. Raises UsageError while another process has it."""
    root.parent.mkdir(parents=True, exist_ok=True)
    root.mkdir(mode=0o700, exist_ok=True)
    root.chmod(0o700)
    with (root / _LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{root}: another re-run is using this folder; wait for it, or choose another --out"
            ) from None
        for path in filter(is_temporary, root.rglob("*")):  # of a process that was killed
            path.unlink()
        yield Folder(root)
