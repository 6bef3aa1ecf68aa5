"""The record of a score: JSON that says what the number rests on. Written whole or not at all."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import pgolf
from pgolf import rules
from pgolf.files import write_atomically

Record = dict[str, Any]


def environment(device: str) -> dict[str, Any]:
    """Versions and hardware that may move a score in its last digits."""
    return {
        "pgolf": pgolf.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": importlib.metadata.version("numpy"),
        "sentencepiece": importlib.metadata.version("sentencepiece"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "devices": torch.cuda.device_count() if device.startswith("cuda") else 1,
    }


def write(record: Record, path: Path) -> None:
    """Write `record` as JSON under `path`, whole or not at all."""
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())


def table(record: Record) -> str:
    """The record for people: a short table, or one line when there is no score."""
    if record["status"] != "ok":
        return f"{record['status']}: {record['reason']}"
    limits = rules.track(record["track"])
    seconds = {name: value for name, value in record["seconds"].items() if name not in ("audit", "total")}
    phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    lines = {
        "submission": f"{record['submission']['name']} by {record['submission']['author']}, track {limits.name}",
        "artifact": f"{record['artifact']['bytes']:,} of {limits.artifact_bytes:,} bytes, "
        f"sha256 {record['artifact']['sha256'][:16]}",
        "text": f"{record['data']['name']}: {record['documents']:,} documents, {record['bytes']:,} bytes",
        "tokens": f"{record['tokens']:,} scored, {record['bytes'] / record['tokens']:.3f} bytes per token",
        "seconds": f"{sum(seconds.values()):.1f} of {limits.eval_seconds:g} ({phases})",
        "isolation": record["isolation"],
        "audit": "none",
        "loss": f"{record['nats_per_token']:.6f} nats per token",
        "score": f"{record['bpb']:.6f} bpb" + ("" if record["eligible"] else "  (not eligible: a trial)"),
    }
    if audit := record["audit"]:
        if not audit["conclusive"]:
            lines["score"] = f"{record['bpb']:.6f} bpb  (not eligible: too few tokens or too much noise in the audit)"
        low, high = audit["interval"]
        lines["audit"] = (
            f"{audit['positions']:,} tokens blind: mean {audit['mean']:+.1e} nats [{low:+.1e}, {high:+.1e}], "
            f"largest {audit['largest']:+.1e}, {record['seconds']['audit']:.1f} s"
        )
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
