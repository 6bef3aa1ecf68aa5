"""What is run again and on which data: opened, and checked before anything is trained."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pgolf import repeat, rules
from pgolf.artifact import Artifact
from pgolf.contest import seal
from pgolf.contest.claim import Claim
from pgolf.contest.rerun_record import Limits, Rerun, SliceText
from pgolf.contest.state import Folder
from pgolf.data.dataset import Dataset, file_digest, open_dataset, overlap
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import printable
from pgolf.repeat import Given
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.environment import check_installed


@dataclass(frozen=True)
class Options:
    """How to run again."""

    data: Path
    """The training data; the claim is about its validation text."""
    score_data: tuple[Path, ...] = ()
    """More datasets to score on, which the record names by digest only."""
    seeds: int = 3
    processes: int = 1
    device: str = "auto"
    out: Path | None = None
    """The folder. None: runs/rerun/<first 16 digits of the artifact's sha256>."""
    claimed: float | None = None
    """Claimed score of an artifact that comes without a submission's folder."""
    max_hours: float = 24.0
    """A training of a track without a limit ends after this."""
    fresh_machine: bool = False
    isolated: bool = True


@dataclass(frozen=True)
class ScoredText:
    """A validation text to score on."""

    dataset: Dataset
    """Open, so that its text is read once."""
    shown: SliceText
    bytes: int

    @property
    def secret(self) -> bool:
        return self.shown.name is None

    def __str__(self) -> str:
        """For people: of a secret text only its digest."""
        return f"the text {self.shown.sha256[:16]}" if self.shown.name is None else printable(self.shown.name)


@dataclass(frozen=True)
class Case:
    """What stays the same from the first seed to the last."""

    options: Options
    device: str
    claim: Claim
    artifact: Artifact
    given: Given
    dataset: Dataset
    training_digest: str
    texts: tuple[ScoredText, ...]
    say: Callable[[str], None] = field(repr=False)

    @property
    def track(self) -> rules.Track:
        return rules.track(self.artifact.manifest.track)

    @property
    def limits(self) -> Limits:
        track = self.track
        return Limits(
            track.prepare_seconds, track.train_seconds, track.eval_seconds, track.artifact_bytes, track.source_bytes
        )


def prepare(found: Claim, received: Artifact, options: Options, device: str, say: Callable[[str], None]) -> Case:
    """Open the data.

    Raises UsageError when it cannot be what the submission is run again on, Refused when its tokenizer can be nothing
    to train with.
    """
    manifest = received.manifest
    given = repeat.given(received)
    dataset = open_dataset(options.data)
    if not dataset.train_shards:
        raise UsageError(f"{options.data}: holds no training shards")
    if not repeat.is_in_tokens_of(received, dataset):
        raise UsageError(
            f"{options.data}: is in other tokens than the artifact's tokenizer {printable(manifest.tokenizer)} makes; "
            "build a dataset with it: pgolf data build SOURCE --tokenizer ARTIFACT"
        )
    opened = [dataset, *map(open_dataset, options.score_data)]
    texts = tuple(_text(each, None if number else each.name) for number, each in enumerate(opened))
    if len({text.shown.sha256 for text in texts}) < len(texts):
        raise UsageError("--score-data names a text that is scored already; give each once")
    return Case(options, device, found, received, given, dataset, _training_digest(dataset), texts, say)


def _text(dataset: Dataset, name: str | None) -> ScoredText:
    text = dataset.canonical_text()
    if not text.bytes:
        raise EnvironmentBroken(f"{dataset.root}: the validation text is empty")
    return ScoredText(dataset, SliceText(name, text.sha256), text.bytes)


def _training_digest(dataset: Dataset) -> str:
    """SHA-256 over the digests of tokenizer and training shards and the tokens that count, in hexadecimal."""
    parts = [file_digest(dataset.tokenizer)]
    parts += [f"{file_digest(shard.path)} {shard.tokens}" for shard in dataset.train_shards]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check(case: Case, folder: Folder) -> None:
    """Raises Refused for sources over the limit, EnvironmentBroken when machine or data is not fit."""
    if case.claim.note:
        case.say(case.claim.note)
    if (track := case.claim.track) not in (None, case.track.name):
        raise Refused(f"the submission is for track {track}, its artifact for {case.track.name}")
    if (size := case.given.source_bytes) > (most := case.track.source_bytes):
        raise Refused(
            f"the sources (code and submission.json, names included, and what counts of the tokenizer) have {size:,} "
            f"bytes; the limit of track {case.track.name} is {most:,}"
        )
    check_installed(case.artifact.manifest.packages)
    if case.options.isolated:
        for place in (folder.root, seal.home()):
            check_hidden(place, case.artifact.manifest.packages)
    if folder.is_new:  # otherwise the data is the same as then
        for text in case.texts:
            with unnamed(text, case.say):
                _check_text(case, text)


def _check_text(case: Case, text: ScoredText) -> None:
    """Raises EnvironmentBroken for a text that the submission could read, or that is trained on."""
    if case.options.isolated:
        check_hidden(text.dataset.root, case.artifact.manifest.packages)
    case.say(f"comparing the training text with {text}")
    if count := overlap(case.dataset, text.dataset):
        remedy = "build the data again without them"
        if case.dataset.index is None:  # published as it is
            own = text.dataset.root == case.dataset.root
            remedy = "make a folder without them by `pgolf data apart`" if own else "score on another text"
        raise EnvironmentBroken(
            f"{case.dataset.root}: {count:,} training documents are validation documents of {text.dataset.root}; "
            + remedy
        )


@contextmanager
def unnamed(text: ScoredText, say: Callable[[str], None]) -> Iterator[None]:
    """Keep where a secret text lies out of errors, which go into the record; `say` gets them as they are."""
    try:
        yield
    except (EnvironmentBroken, OSError) as error:
        if not text.secret:
            raise
        say(str(error))
        raise EnvironmentBroken(f"{text} is not fit to score on; standard error says why") from None


def identity(record: Rerun, case: Case) -> dict[str, Any]:
    """All that has to stay the same when a re-run goes on, in the words of the sentence that says it did not."""
    machine = asdict(record.machine)
    return {
        "artifact": record.artifact.sha256,
        "training data": case.training_digest,
        "list of texts": [text.shown.sha256 for text in case.texts],
        "version of the rules": record.rules,
        "number of processes": case.options.processes,
        "sandbox": case.options.isolated,
        "machine": {name: machine[name] for name in ("processor", "cores", "device", "devices")},
        "version of pgolf or torch": [machine["pgolf"], machine["torch"]],
    }
