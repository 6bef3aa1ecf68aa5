"""What a participant wants to know before sending a submission: does it pass, what is in it, will it be in time?

The rules themselves are the scorer's. This reads the artifact as the scorer does, looks at what it imports, scores
a sample of the documents in the sandbox, projects the seconds, and takes a few training steps as a re-run would. Of a
submission's folder it compares the entry with artifact, records, logs and code.
"""

import re
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pgolf import artifact, entry, rules
from pgolf.artifact import MANIFEST, Artifact
from pgolf.data.dataset import Dataset, open_dataset
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.files import printable
from pgolf.score.devices import find_device
from pgolf.score.record import Record, phases
from pgolf.score.score import Options, score
from pgolf.submission import claims
from pgolf.submission.findings import ERROR, LATE, WARNING, Finding
from pgolf.submission.folder import folder_members
from pgolf.submission.members import by_role, compressed, left, look
from pgolf.submission.retrain import retrain

_FASTER = "check on a quiet machine; use more lanes or a smaller model"
SAMPLE_BYTES = 100_000  # of the validation text: some seconds of scoring on two cores


@dataclass(frozen=True)
class Report:
    """What was found."""

    findings: tuple[Finding, ...]
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes that the members of each role add to the file, estimated; "total" and "left" are of the artifact."""
    sample: dict[str, Any] | None = None
    """The sample's score: documents, bytes, bpb, seconds, and the seconds projected for the whole text."""
    training: dict[str, float] | None = None
    """Seconds of the training steps: to make the sandbox, to prepare, to train and pack. None: not done."""

    @property
    def passes(self) -> bool:
        return all(finding.severity != ERROR for finding in self.findings)


def check(path: Path, data: Path, options: Options, train: bool = True) -> Report:
    """Check an artifact, a folder that would be packed into one, or a submission, with the dataset `data`.

    `options` say how to score the sample; its documents are chosen here. `train`: take some training steps. Raises
    UsageError when there is nothing to check and EnvironmentBroken when this machine cannot.
    """
    dataset = open_dataset(data)
    if is_submission(path):
        return _submission(path, dataset, options, train)
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = _packed(path, Path(folder))
        except Refused as error:
            return Report((_unreadable(error),))
        return _artifact(file, dataset, options, train)[0]


def is_submission(path: Path) -> bool:
    """Whether it is a submission's folder, perhaps with a damaged entry, rather than one to be packed."""
    return path.is_dir() and (
        entry.is_entry(path) or ((path / entry.CODE).is_dir() and not (path / "predict.py").exists())
    )


def _packed(path: Path, folder: Path) -> Path:
    """The artifact to check: `path`, or one packed from the folder `path`."""
    if not path.is_dir():
        return path
    out = folder / "artifact.zst"
    artifact.pack(folder_members(path), out, rules.ARTIFACT_BYTES)
    return out


def _submission(folder: Path, data: Dataset, options: Options, train: bool) -> Report:
    try:
        found = entry.read(folder)
    except Refused as error:
        remedy = "mend the field; `pgolf check FOLDER --write` fills in all figures"
        return Report((Finding("entry", ERROR, entry.FILE, None, str(error), remedy),))
    report, packed = Report(()), None
    if found.artifact.file is not None:
        report, packed = _artifact(folder / found.artifact.file, data, options, train)
    about = claims.findings(folder, found, packed, data.canonical_text().sha256)
    return replace(report, findings=(*about, *report.findings))


def _artifact(path: Path, data: Dataset, options: Options, train: bool) -> tuple[Report, Artifact | None]:
    try:
        found = artifact.read(path, rules.ARTIFACT_BYTES)
    except Refused as error:
        return Report((_unreadable(error),)), None
    sample, scored = _sample(path, found, data, options)
    training, trained = None, list[Finding]()
    if train:
        training, trained = retrain(found, data, find_device(options.device), options.isolated)
    sizes = by_role(found, compressed(found)) | {"total": found.size, "left": left(found)}
    return Report((*look(found), *scored, *trained), sizes, sample, training), found


def _unreadable(error: Refused) -> Finding:
    return Finding("artifact", ERROR, None, None, str(error), "see docs/artifact.md for the format")


def _sample(
    path: Path, found: Artifact, data: Dataset, options: Options
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Score the first documents in the sandbox, and project the seconds of all."""
    text = data.canonical_text()
    count = sampled = 0
    while count < len(text.documents) and sampled < SAMPLE_BYTES:
        sampled += len(text.documents[count])
        count += 1
    record = score(path, data, replace(options, documents=count))
    if record.status == "failed":
        raise EnvironmentBroken(f"the sample could not be scored: {record.reason}")
    if record.status == "refused":
        return None, [_refusal(found, record)]
    seconds = phases(record.seconds)
    fixed = seconds.get("load", 0.0)
    projected = fixed + (sum(seconds.values()) - fixed) * text.bytes / sampled
    limit = rules.track(options.track or found.manifest.track).eval_seconds
    sample = {
        "documents": count,
        "bytes": sampled,
        "bpb": record.bpb,
        "seconds": round(sum(seconds.values()), 3),
        "projected_seconds": round(projected, 1),
        "limit_seconds": limit,
    }
    findings = []
    if projected > LATE * limit:
        what = f"the whole text would take about {projected:.0f} of {limit:g} s on this machine"
        findings.append(Finding("too-slow", WARNING, "predict.py", None, what, _FASTER))
    if found.manifest.form != "step":
        what = "scores in the window form do not count"
        findings.append(
            Finding("window-form", WARNING, MANIFEST, None, what, "move to the step form (docs/artifact.md)")
        )
    return sample, findings


def _refusal(found: Artifact, record: Record) -> Finding:
    """Code that raised, or the rule that was broken. Before a predictor is loaded, text is only encoded and decoded."""
    reason = str(record.reason)
    if "your code raised " in reason:
        place = re.search(r"\(([^()]+), line (\d+)\)$", reason)
        file, line = (place[1], int(place[2])) if place else (None, None)
        remedy = "mend the code; `pgolf check --verbose` shows its traceback and what it printed"
        return Finding("code-raised", ERROR, file, line, reason, remedy)
    if reason.startswith("the evaluation took longer "):
        return Finding("too-slow", ERROR, "predict.py", None, reason, _FASTER)
    if "encode" in record.seconds and "load" not in record.seconds:
        remedy = "the ids have to decode to the exact text: docs/artifact.md, tokenizers"
        return Finding("tokenizer", ERROR, found.manifest.tokenizer, None, reason, remedy)
    return Finding("score", ERROR, None, None, reason, "see docs/artifact.md")


def as_json(report: Report) -> dict[str, Any]:
    """For programs."""
    return {"passes": report.passes} | asdict(report)


def table(report: Report) -> str:
    """For people."""
    lines = [f"{kind:<18} {size:>12,} bytes" for kind, size in report.sizes.items()]
    if report.sample:
        s = report.sample
        lines.append(f"sample             {s['bpb']:.4f} bpb on {s['documents']} documents, {s['seconds']:.1f} s")
        lines.append(f"projected          {s['projected_seconds']:.0f} of {s['limit_seconds']:g} s for the whole text")
    if report.training:
        shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in report.training.items())
        lines.append(f"training steps     {sum(report.training.values()):.1f} s ({shown})")
    for f in report.findings:
        where = "".join([f" {printable(f.file)}" if f.file else "", f":{f.line}" if f.line else ""])
        lines.append(f"{f.severity}{where}: {printable(f.what)}; {f.remedy} [{f.rule}]")
    lines.append("passes" if report.passes else "will be refused")
    return "\n".join(lines)
