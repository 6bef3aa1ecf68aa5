"""Training an artifact again from its own sources: what is run, on which data, and whether it writes the same."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from pgolf import artifact
from pgolf.artifact import MANIFEST, Artifact, Manifest
from pgolf.data import sentencepiece_file
from pgolf.data.dataset import Dataset, training_files
from pgolf.data.sentencepiece_file import Contents
from pgolf.errors import Refused
from pgolf.files import printable
from pgolf.sandbox.training import Job

_OUT = "/tmp/artifact.zst"  # inside the sandbox; what counts is what the trainer hands over
_BUDGET = "--steps", "--seconds"
_WORDS = 60  # characters of a name or value


@dataclass(frozen=True)
class Given:
    """What train.py can read of an artifact before the clock starts: nothing else of it is in the sandbox."""

    sources: Mapping[str, bytes]
    name: str
    """The tokenizer's; the dataset's is the same file."""
    tokenizer: Contents | None
    """None: no SentencePiece model, so no training shards can be made with it and nothing is trained."""

    @property
    def source_bytes(self) -> int:
        """What the track's limit on source is about."""
        return artifact.source_bytes(self.sources) + (self.tokenizer.source_bytes if self.tokenizer else 0)

    @property
    def text(self) -> dict[str, bytes]:
        """All of it that its author chose, by file."""
        return {**self.sources, **({self.name: self.tokenizer.text} if self.tokenizer else {})}


def given(found: Artifact) -> Given:
    """Raises Refused for a SentencePiece model that holds what tokenizing does not need."""
    name, contents = found.manifest.tokenizer, None
    if _is_sentencepiece(found.manifest):
        try:
            contents = sentencepiece_file.read(found.members[name])
        except ValueError as error:
            raise Refused(
                f"the tokenizer {printable(name)} {error}; train.py gets it before the clock, so it may only hold what "
                "SentencePiece writes (docs/artifact.md#tokenizers)"
            ) from None
    return Given(artifact.sources(found.members), name, contents)


def _is_sentencepiece(manifest: Manifest) -> bool:
    """Whether the harness would run it as a SentencePiece model, the only kind that shards are made with."""
    return manifest.tokenizer != "bytes" and not manifest.tokenizer.endswith((".json", ".py"))


def job(
    found: Artifact,
    dataset: Dataset,
    seed: int,
    arguments: Sequence[str],
    *,
    device: str,
    compiler: bool,
    processes: int = 1,
) -> Job:
    """Its train.py on the shards of `dataset`, with a seed and further arguments. `compiler`: give it one anyway.

    Raises UsageError and EnvironmentBroken as `training_files` does.
    """
    manifest = found.manifest
    files, shards = training_files(dataset)
    return Job(
        artifact.sources(found.members),
        files,
        shards,
        ("--out", _OUT, "--track", manifest.track, "--seed", str(seed), *arguments),
        packages=manifest.packages,
        compiler=manifest.compiler or compiler,
        device="cuda" if device.startswith("cuda") else "cpu",
        processes=processes,
    )


def is_in_tokens_of(found: Artifact, dataset: Dataset) -> bool:
    """Whether the shards of `dataset` are in the tokens of the artifact's tokenizer."""
    manifest = found.manifest
    if not _is_sentencepiece(manifest) or manifest.transform != dataset.transform:
        return False
    return found.members[manifest.tokenizer] == dataset.tokenizer.read_bytes()


@dataclass(frozen=True)
class Difference:
    """Something that is the same in two artifacts of one train.py, and is not."""

    part: str
    """"sources", "tokenizer", "manifest" or "settings"."""
    member: str
    field: str | None
    """Of the manifest."""
    what: str
    """Part of a sentence, on one line."""

    def __str__(self) -> str:
        return printable(self.member) + (f": {self.field}" if self.field else "")


def differences(submitted: Artifact, written: Artifact) -> Iterator[Difference]:
    """What should be the same in an artifact and in what its train.py writes: code, tokenizer, manifest, settings.

    Weights, counts and the budget of the training may differ.
    """
    a, b = submitted.manifest, written.manifest
    ours, theirs = artifact.sources(submitted.members), artifact.sources(written.members)
    for name in sorted((ours.keys() | theirs.keys()) - {MANIFEST}):
        if ours.get(name) != theirs.get(name):
            words = "does not write it" if name not in theirs else "writes it" if name not in ours else "writes another"
            yield Difference("sources", name, None, f"train.py {words}")
    if a.tokenizer not in ours and submitted.members.get(a.tokenizer) != written.members.get(b.tokenizer):
        yield Difference("tokenizer", a.tokenizer, None, "train.py writes another tokenizer")
    here, there = (asdict(replace(each, training=None, pgolf=None)) for each in (a, b))
    yield from _changed("manifest", "", here, there)
    if a.training and b.training is None:
        yield Difference("settings", MANIFEST, "training", "train.py declares no training")
    elif a.training and b.training:
        here, there = (
            {"arguments": without_budget(each.arguments), "parameters": each.parameters}
            for each in (a.training, b.training)
        )
        yield from _changed("settings", "training.", here, there)
        yield from _changed("settings", "training.settings.", a.training.settings, b.training.settings)


def _changed(part: str, prefix: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Difference]:
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            field = prefix + _shown(name)
            what = f"{field} is {_shown(here.get(name))}, but {_shown(there.get(name))} in what train.py writes"
            yield Difference(part, MANIFEST, field, what)


def _shown(value: object) -> str:
    """Of a stranger: short, and escaped."""
    return printable(value)[:_WORDS]


def without_budget(arguments: Sequence[str]) -> tuple[str, ...]:
    """Flags of a trainer without those that say how long to train."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name in _BUDGET:
            skip = not skip and not equals
            continue
        kept.append(argument)
    return tuple(kept)
