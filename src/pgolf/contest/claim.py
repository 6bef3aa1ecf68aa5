"""What a submission claims, and where its artifact is."""

from dataclasses import dataclass
from pathlib import Path

from pgolf import entry, rules
from pgolf.contest import rerun_record
from pgolf.contest.rerun_record import Calibration
from pgolf.errors import UsageError

RERUN = "records/rerun.json"
"""In a submission's folder: the record of the author's own re-run, whose calibration says how fast that machine was."""

_SLOWEST, _FASTEST = 1e-6, 1e9  # TFLOP/s, GB/s and ms of any machine lie far inside


@dataclass(frozen=True)
class Claim:
    """Nothing of it is a fact but the file."""

    artifact: Path
    bpb: float | None = None
    seeds: int = 0
    track: str | None = None
    calibration: Calibration | None = None
    note: str | None = None
    """What is wrong with the record behind the claim."""


def read(path: Path, bpb: float | None = None) -> Claim:
    """The claim of a submission's folder or of an artifact, which claims `bpb` if anything.

    Raises Refused, naming field or file, for a folder that breaks the format, and UsageError when nothing is there.
    """
    if not path.is_dir():
        return Claim(path, bpb)
    if bpb is not None:
        raise UsageError(f"{path}: a submission's folder has a claim; leave out --claim")
    found = entry.read(path)
    speed, note = calibration(path / RERUN)
    return Claim(entry.artifact_file(path), found.bpb, len(found.seeds), found.track, speed, note)


def calibration(path: Path) -> tuple[Calibration | None, str | None]:
    """From the record of a re-run, and what is wrong with it."""
    if not path.exists():
        return None, None
    try:
        record = rerun_record.read(path)
    except (OSError, ValueError):
        return None, f"{path}: is no record of a re-run, so it says nothing about the machine behind the claim"
    if record.rules != rules.VERSION:
        return None, f"{path}: was made under rules {record.rules}, these are {rules.VERSION}; it is not used"
    if (found := record.calibration) and not _is_possible(found):
        return None, f"{path}: its calibration has figures that no machine has; it is not used"
    return found, None


def _is_possible(found: Calibration) -> bool:
    rates = found.fp32_tflops, found.bf16_tflops, found.bandwidth_gb, found.naive_ms
    return all(rate is None or _SLOWEST <= rate <= _FASTEST for rate in rates)
