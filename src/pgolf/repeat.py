"""Training an artifact again from its own sources: what is run, on which data, and whether it writes the same."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from pgolf import artifact
from pgolf.artifact import MANIFEST, Artifact
from pgolf.data.dataset import Dataset, training_files
from pgolf.sandbox.training import Job

_OUT = "/tmp/artifact.zst"  # inside the sandbox; what counts is what the trainer hands over


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
    same = found.members.get(manifest.tokenizer) == dataset.tokenizer.read_bytes()
    return same and manifest.transform == dataset.transform


def changed_code(submitted: Artifact, written: Artifact) -> list[str]:
    """Names of the code's members that are not the same in both."""
    ours, theirs = artifact.sources(submitted.members), artifact.sources(written.members)
    return [name for name in sorted((ours.keys() | theirs.keys()) - {MANIFEST}) if ours.get(name) != theirs.get(name)]


def changed_fields(submitted: Artifact, written: Artifact) -> list[str]:
    """Fields of the manifest that are not the same in both, but for what tells of the run: `training` and `pgolf`."""
    ours, theirs = (asdict(replace(each.manifest, training=None, pgolf=None)) for each in (submitted, written))
    return [name for name in ours if ours[name] != theirs[name]]
