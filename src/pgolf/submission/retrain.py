"""Some training steps of an artifact's own train.py, in the sandbox of a re-run: does it write what the artifact is?"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pgolf import artifact, repeat, rules
from pgolf.artifact import MANIFEST, Artifact
from pgolf.data.dataset import Dataset
from pgolf.errors import Refused
from pgolf.files import printable
from pgolf.sandbox import box, training
from pgolf.sandbox.training import Limits
from pgolf.submission.findings import ERROR, LATE, WARNING, Finding

STEPS = 3
SECONDS = 120.0  # to prepare, and for the steps: more than they need where others use the machine too
_WORDS = 300  # characters of what was raised
_BUDGET = "--steps", "--seconds"
_DECLARE = "train with this pgolf, whose loop declares it, or write it in train.py (docs/artifact.md)"
_SAME = "train again with the code that is in the artifact, and pack what it writes"


def retrain(
    found: Artifact, data: Dataset, device: str, isolated: bool
) -> tuple[dict[str, float] | None, list[Finding]]:
    """Seconds by phase, None when nothing was trained; and the findings.

    Raises EnvironmentBroken when this machine cannot train in a sandbox.
    """
    findings: list[Finding] = []
    declared = found.manifest.training
    if declared is None:
        what = "does not declare the run that made it, so a re-run cannot repeat its settings"
        findings.append(Finding("training-missing", WARNING, MANIFEST, None, what, _DECLARE))
    if reason := _other_data(found, data):
        remedy = "`pgolf data build --tokenizer FILE` makes training shards for it"
        return None, [*findings, Finding("training-data", WARNING, None, None, reason, remedy)]
    arguments = with_steps(declared.arguments if declared else (), STEPS)
    track = rules.track(found.manifest.track)
    limits = Limits(max(SECONDS, track.prepare_seconds), SECONDS, track.artifact_bytes)
    compiler = device.startswith("cuda")  # on a CPU a few steps are taken sooner than they are compiled
    job = repeat.job(found, data, 1, arguments, device=device, compiler=compiler)
    printed: list[str] = []
    try:
        with _listening(printed):
            trained = training.train(job, limits, isolated=isolated)
        written = artifact.parse(trained.artifact, limits.artifact_bytes)
    except Refused as error:
        severity = ERROR if declared else WARNING
        line, raised = _raised("".join(printed))
        what = f"your code raised {raised}" if raised else str(error)
        remedy = "`pgolf check --verbose` shows its traceback and what it printed"
        return None, [*findings, Finding("training-fails", severity, "train.py", line, what, remedy)]
    if (taken := trained.seconds["prepare"]) > LATE * track.prepare_seconds:
        what = f"takes {taken:.0f} of {track.prepare_seconds:g} s before it asks for the data, on this machine"
        remedy = "check on a quiet machine; compile and warm up less"
        findings.append(Finding("prepare-slow", WARNING, "train.py", None, what, remedy))
    return dict(trained.seconds), [*findings, *differences(found, written)]


@contextmanager
def _listening(printed: list[str]) -> Iterator[None]:
    """Keep what the sandbox prints, besides what is done with it already."""
    before = box.show_output.get()

    def keep(role: str, output: str) -> None:
        printed.append(output)
        before(role, output)

    previous = box.show_output.set(keep)
    try:
        yield
    finally:
        box.show_output.reset(previous)


def _raised(output: str) -> tuple[int | None, str | None]:
    """Line of train.py and message of the first traceback that it printed, if any."""
    found = re.search(r"^Traceback .*\n((?:[ \t].*\n)+)(\w[\w.]*(?::.*)?)$", output, re.MULTILINE)
    if found is None or "guest.py" in found[1]:
        return None, None
    lines = re.findall(r'train\.py", line (\d{1,6})', found[1])
    return int(lines[-1]) if lines else None, printable(found[2])[:_WORDS]


def with_steps(arguments: Sequence[str], steps: int) -> tuple[str, ...]:
    """Flags of a trainer with this number of steps as its budget."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip or name in _BUDGET:
            skip = not skip and not equals
            continue
        kept.append(argument)
    return (*kept, "--steps", str(steps))


def differences(found: Artifact, written: Artifact) -> Iterator[Finding]:
    """How the artifact differs from what its train.py writes, weights and counts aside."""
    ours, theirs = artifact.sources(found.members), artifact.sources(written.members)
    for name in repeat.changed_code(found, written):
        words = "does not write it" if name not in theirs else "writes it" if name not in ours else "writes another"
        yield Finding("training-sources", ERROR, name, None, f"train.py {words}", _SAME)
    for name in sorted(found.members.keys() ^ written.members.keys()):
        if name not in ours and name not in theirs:
            where = "only in the artifact" if name in found.members else "only in what train.py writes"
            what = f"is {where} ({len(found.members.get(name) or written.members[name]):,} bytes)"
            yield Finding("training-members", WARNING, name, None, what, _SAME)
    for field in repeat.changed_fields(found, written):
        here, there = getattr(found.manifest, field), getattr(written.manifest, field)
        what = f"{field} is {here!r}, but {there!r} in what train.py writes"
        yield Finding("training-manifest", ERROR, MANIFEST, None, what, _SAME)
    name = found.manifest.tokenizer
    if found.members.get(name) != written.members.get(written.manifest.tokenizer):
        yield Finding("training-tokenizer", ERROR, name, None, "train.py writes another tokenizer", _SAME)
    here, there = found.manifest.training, written.manifest.training
    if here and there is None:
        yield Finding("training-settings", ERROR, MANIFEST, None, "train.py declares no training", _SAME)
    elif here and there:
        yield from _settings(here.settings, there.settings)


def _settings(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[Finding]:
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            what = (
                f"training.settings: {printable(name)[:60]} is {printable(here.get(name))[:60]}, but "
                f"{printable(there.get(name))[:60]} in what train.py writes with the declared arguments"
            )
            yield Finding("training-settings", ERROR, MANIFEST, None, what, _SAME)


def _other_data(found: Artifact, data: Dataset) -> str | None:
    """Why these shards cannot train this artifact."""
    if not data.train_shards:
        return f"{data.root} holds no training shards, so train.py was not tried"
    if data.vocab_size != found.manifest.vocab_size or not repeat.is_in_tokens_of(found, data):
        return f"the training shards of {data.root} are of another tokenizer, so train.py was not tried"
    return None
