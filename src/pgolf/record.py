"""The record of a score: JSON that says what the number rests on. Written whole or not at all."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import pgolf

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
    """Write `record` as JSON under `path`, atomically and durably."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
