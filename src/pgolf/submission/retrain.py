"""Some training steps of an artifact's own train.py, in the sandbox of a re-run: does it write what the artifact is?"""

import re
from collections.abc import Iterator
from dataclasses import replace

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
_VERBOSE = "`pgolf check --verbose` shows its traceback and what it printed"
_FLAGS = "docs/artifact.md#training-again"
_DECLARE = "train with this pgolf, whose loop declares it, or write it in train.py (docs/artifact.md)"
_RULES = {
    "sources": "training-sources",
    "tokenizer": "training-tokenizer",
    "manifest": "training-manifest",
    "settings": "training-settings",
}
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
        remedy = "`pgolf data build --tokenizer ARTIFACT` makes training shards for it"
        return None, [*findings, Finding("training-data", WARNING, None, None, reason, remedy)]
    arguments = (*repeat.without_budget(declared.arguments if declared else ()), "--steps", str(STEPS))
    track = rules.track(found.manifest.track)
    limits = Limits(max(SECONDS, track.prepare_seconds), SECONDS, track.artifact_bytes)
    gpu = device.startswith("cuda")  # where eager mode would be too slow to be of use
    job = replace(repeat.job(found, data, 1, arguments, device=device, compiler=gpu), eager=not gpu)
    with box.listening() as printed:
        try:
            trained = training.train(job, limits, isolated=isolated)
            written = artifact.parse(trained.artifact, limits.artifact_bytes)
        except Refused as error:
            return None, [*findings, _failure(error, "".join(printed), ERROR if declared else WARNING)]
    if (taken := trained.seconds["prepare"]) > LATE * track.prepare_seconds:
        what = f"takes {taken:.0f} of {track.prepare_seconds:g} s before it asks for the data, on this machine"
        remedy = "check on a quiet machine; compile and warm up less"
        findings.append(Finding("prepare-slow", WARNING, "train.py", None, what, remedy))
    return dict(trained.seconds), [*findings, *differences(found, written)]


def _failure(error: Refused, output: str, severity: str) -> Finding:
    """Why a train.py handed nothing over, or no artifact."""
    line, raised = _raised(output)
    what = f"your code raised {raised}" if raised else str(error)
    remedy = _VERBOSE
    if isinstance(error, training.Late):
        remedy = "check on a quiet machine"
        if error.phase == "train":
            remedy += f"; a loop of your own has to stop after --steps {STEPS} ({_FLAGS})"
    return Finding("training-fails", severity, "train.py", line, what, remedy)


def _raised(output: str) -> tuple[int | None, str | None]:
    """Line of train.py and message of the first traceback that it printed, if any."""
    found = re.search(r"^Traceback .*\n((?:[ \t].*\n)+)(\w[\w.]*(?::.*)?)$", output, re.MULTILINE)
    if found is None or "guest.py" in found[1]:
        return None, None
    lines = re.findall(r'train\.py", line (\d{1,6})', found[1])
    return int(lines[-1]) if lines else None, printable(found[2])[:_WORDS]


def differences(found: Artifact, written: Artifact) -> Iterator[Finding]:
    """How the artifact differs from what its train.py writes, weights and counts aside."""
    for each in repeat.differences(found, written):
        yield Finding(_RULES[each.part], ERROR, each.member, None, each.what, _SAME)
    sources = artifact.sources(found.members).keys() | artifact.sources(written.members).keys()
    for name in sorted((found.members.keys() ^ written.members.keys()) - sources):
        where = "only in the artifact" if name in found.members else "only in what train.py writes"
        what = f"is {where} ({len(found.members.get(name) or written.members[name]):,} bytes)"
        yield Finding("training-members", WARNING, name, None, what, _SAME)


def _other_data(found: Artifact, data: Dataset) -> str | None:
    """Why these shards cannot train this artifact."""
    if not data.train_shards:
        return f"{data.root} holds no training shards, so train.py was not tried"
    if data.vocab_size != found.manifest.vocab_size or not repeat.is_in_tokens_of(found, data):
        return f"the training shards of {data.root} are of another tokenizer, so train.py was not tried"
    return None
