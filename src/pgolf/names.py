"""Names of the files that stand beside an artifact: its log, picture and records."""

from pathlib import Path


def beside(artifact: Path, ending: str) -> Path:
    """`a.zst` and ".jsonl" give `a.jsonl`. Any other name is kept whole: `lr0.01` gives `lr0.01.jsonl`."""
    return artifact.with_name(artifact.name.removesuffix(".zst") + ending)
