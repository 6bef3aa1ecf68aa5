"""What a participant wants to know before sending an artifact: does it pass, what is in it, will it be in time?

The rules themselves are the scorer's. This reads the artifact as the scorer does, looks at what it imports, scores
a sample of the documents in the sandbox and projects the seconds.
"""

import ast
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import zstandard

from pgolf import artifact, rules
from pgolf.artifact import MANIFEST, Artifact
from pgolf.data.dataset import open_dataset
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.files import printable
from pgolf.sandbox import environment
from pgolf.score.record import phases
from pgolf.score.score import Options, score

SAMPLE_BYTES = 100_000  # of the validation text: some seconds of scoring on two cores
LATE = 0.8  # of the evaluation limit, where a warning begins: other machines, and busy ones, are slower
ERROR, WARNING = "error", "warning"


@dataclass(frozen=True)
class Finding:
    """Something to mend."""

    rule: str
    """A short name that programs can rely on."""
    severity: str
    """"error": the submission will be refused; "warning": look at it."""
    file: str | None
    line: int | None
    what: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What was found."""

    findings: tuple[Finding, ...]
    sizes: dict[str, int]
    """Bytes of the members, compressed alone, by kind; "total" and "left" are of the artifact."""
    sample: dict[str, Any] | None
    """The sample's score: documents, bytes, bpb, seconds, and the seconds projected for the whole text."""

    @property
    def passes(self) -> bool:
        return all(finding.severity != ERROR for finding in self.findings)


def check(path: Path, data: Path, options: Options) -> Report:
    """Check an artifact, or a folder that would be packed into one, against the validation text in `data`.

    `options` say how to score the sample; its documents are chosen here. Raises UsageError when there is nothing
    to check and EnvironmentBroken when this machine cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = _packed(path, Path(folder))
            found = artifact.read(file, rules.ARTIFACT_BYTES)
        except Refused as error:
            finding = Finding("artifact", ERROR, None, None, str(error), "see docs/artifact.md for the format")
            return Report((finding,), {}, None)
        findings = [*_imports(found), *_unused(found)]
        sample, more = _sample(file, found, data, options)
        return Report((*findings, *more), _sizes(found), sample)


def _packed(path: Path, folder: Path) -> Path:
    """The artifact to check: `path`, or one packed from the folder `path`."""
    if not path.is_dir():
        return path
    out = folder / "artifact.zst"
    artifact.pack(artifact.folder_members(path), out, rules.ARTIFACT_BYTES)
    return out


def _sizes(found: Artifact) -> dict[str, int]:
    """Members of a kind are compressed together, as they are in the artifact, so the kinds nearly add up."""
    kinds: dict[str, list[bytes]] = {"code": [], "tokenizer": [], "weights and other": []}
    for name, content in sorted(found.members.items()):
        is_code = name.endswith(".py") or name == MANIFEST
        kind = "tokenizer" if name == found.manifest.tokenizer else "code" if is_code else "weights and other"
        kinds[kind].append(content)
    compressor = zstandard.ZstdCompressor(level=19)
    sizes = {kind: len(compressor.compress(b"".join(parts))) if parts else 0 for kind, parts in kinds.items()}
    limit = rules.track(found.manifest.track).artifact_bytes
    return sizes | {"total": found.size, "left": limit - found.size}


def _imports(found: Artifact) -> Iterator[Finding]:
    """Modules that the sandbox will not find, or that this machine lacks for training."""
    listed = environment.listing("predict", found.manifest.packages, found.manifest.compiler)
    readable = set(listed.files)
    for root, sandboxed in (("predict.py", True), ("train.py", False)):
        for member, line, module in _reachable(found.members, root):
            if module in sys.stdlib_module_names:
                continue
            spec = None if module == "__main__" else importlib.util.find_spec(module)
            if spec is None:
                remedy = f"install what provides {module}, or remove the import"
                yield Finding("import-missing", WARNING, member, line, f"imports {module}, which is not here", remedy)
            elif sandboxed and Path(spec.origin or "").resolve() not in readable:
                what = f"imports {module}, which none of the declared packages provides"
                yield Finding(
                    "import-undeclared", ERROR, member, line, what, f"add its package to {MANIFEST}: packages"
                )


def _reachable(members: Mapping[str, bytes], root: str) -> Iterator[tuple[str, int, str]]:
    """Member, line and top-level name of each import of foreign modules, from `root` through the artifact's own.

    Imports inside functions and `try` count: they may be alternatives, which is for a person to see.
    """
    waiting, seen = [root], {root}
    while waiting:
        member = waiting.pop()
        for line, module in _imported(members[member], member):
            own = [name for name in (f"{module}.py", f"{module}/__init__.py") if name in members]
            if not own:
                yield member, line, module
            waiting += [name for name in own if name not in seen]
            seen.update(own)


def _imported(source: bytes, member: str) -> Iterator[tuple[int, str]]:
    try:
        tree = ast.parse(source, member)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # the sandbox says so, with its own Python's words
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def _unused(found: Artifact) -> Iterator[Finding]:
    """Caches and the like that only cost bytes."""
    for name, content in sorted(found.members.items()):
        if name.endswith((".pyc", ".log", ".jsonl", ".png")):
            what = f"{printable(name)} ({len(content):,} bytes) is hardly needed for scoring"
            yield Finding("member-useless", WARNING, name, None, what, "leave it out of the artifact")


def _sample(file: Path, found: Artifact, data: Path, options: Options) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Score the first documents in the sandbox, and project the seconds of all."""
    text = open_dataset(data).canonical_text()
    count = sampled = 0
    while count < len(text.documents) and sampled < SAMPLE_BYTES:
        sampled += len(text.documents[count])
        count += 1
    record = score(file, data, replace(options, documents=count))
    if record.status == "failed":
        raise EnvironmentBroken(f"the sample could not be scored: {record.reason}")
    if record.status == "refused":
        return None, [Finding("score", ERROR, None, None, str(record.reason), "see docs/artifact.md")]
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
        remedy = "check on a quiet machine; use more lanes or a smaller model"
        findings.append(Finding("too-slow", WARNING, "predict.py", None, what, remedy))
    if found.manifest.form != "step":
        what = "scores in the window form do not count"
        findings.append(
            Finding("window-form", WARNING, MANIFEST, None, what, "move to the step form (docs/artifact.md)")
        )
    return sample, findings


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
    for f in report.findings:
        where = "".join([f" {printable(f.file)}" if f.file else "", f":{f.line}" if f.line else ""])
        lines.append(f"{f.severity}{where}: {printable(f.what)}; {f.remedy} [{f.rule}]")
    lines.append("passes" if report.passes else "will be refused")
    return "\n".join(lines)
