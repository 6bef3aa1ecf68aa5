"""The record of a score: JSON that says what the number rests on. Written atomically."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

import pgolf
from pgolf import rules
from pgolf.files import printable, write_atomically
from pgolf.machine import cores

Record = dict[str, Any]

_NEXT = "what this machine lacks, and the remedies: pgolf doctor; what a counting score needs: docs/security.md"


def new(path: Path, track: str | None, device: str) -> Record:
    """The record of a score that has only begun."""
    return {
        "status": "failed",
        "reason": None,
        "eligible": False,
        "reasons": [],
        "rules": rules.VERSION,
        "bpb": None,
        "nats_per_token": None,
        "tokens": None,
        "bytes": None,
        "documents": None,
        "track": track,
        "submission": None,
        "form": None,
        "artifact": {"sha256": None, "bytes": path.stat().st_size},
        "data": None,
        "isolation": None,
        "fresh_machine": False,
        "seconds": {},
        "margin": None,
        "plan": None,
        "steps": None,
        "code": None,
        "spot_check": None,
        "environment": environment(device),
    }


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware that may change the last digits of a score."""
    return {
        "pgolf": pgolf.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "sentencepiece": importlib.metadata.version("sentencepiece"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "devices": torch.cuda.device_count() if device == "cuda" else 1,
    }


def write(record: Record, path: Path) -> None:
    """Write `record` as JSON under `path`, atomically."""
    rounded = {**record, "seconds": {name: round(value, 3) for name, value in record["seconds"].items()}}
    if record.get("margin") is not None:
        rounded["margin"] = round(record["margin"], 3)
    write_atomically(path, (json.dumps(rounded, indent=1) + "\n").encode())


def table(record: Record) -> str:
    """The record for people: a short table, or one line when there is no score."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    limits = rules.track(record["track"])
    seconds = {name: value for name, value in record["seconds"].items() if name != "total"}
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    lines = {
        "submission": f"{record['submission']['name']} by {record['submission']['author']}, track {limits.name}",
        "artifact": f"{record['artifact']['bytes']:,} of {limits.artifact_bytes:,} bytes, "
        f"sha256 {record['artifact']['sha256'][:16]}",
        "text": f"{printable(record['data']['name'])}: {record['documents']:,} documents, {record['bytes']:,} bytes",
        "tokens": f"{record['tokens']:,} scored, {record['bytes'] / record['tokens']:.3f} bytes per token",
        "seconds": f"{sum(seconds.values()):.1f} of {limits.eval_seconds:g} ({phases})",
        "isolation": record["isolation"],
        "loss": f"{record['nats_per_token']:.6f} nats per token",
        "score": f"{record['bpb']:.6f} bpb" + ("" if record["eligible"] else "  (practice score)"),
    }
    if check := record["spot_check"]:
        lines["spot check"] = (
            f"{check['changed']:,} of {check['tokens']:,} sampled tokens changed without what follows them"
            + (f", most of all token {check['token']:,} by {check['largest']:+.2g} nats" if check["changed"] else "")
        )
    text = "\n".join(f"{name:<11} {value}" for name, value in lines.items())
    if record["eligible"]:
        return text
    return "\n".join([text, "does not count:", *(f"  - {reason}" for reason in record["reasons"]), _NEXT])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
