"""One trial: train with one of our trainers, score what it packed, read what both wrote down."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.score import score


@dataclass(frozen=True)
class Trial:
    """What came of it."""

    log: dict[str, Any]
    """First and last line of the training log: settings, parameters, steps, tokens, train_seconds, artifact_bytes."""
    record: dict[str, Any]
    """The score."""


def train_and_score(
    command: Sequence[str], out: Path, data: Path, documents: int | None, isolated: bool, processes: int = 1
) -> Trial:
    """Run a trainer's command line so that it writes `out`, and score that. Raises what `launch` does."""
    launch([*command, "--data", str(data), "--out", str(out)], processes)
    first, *_, last = map(json.loads, out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines())
    record = score(out, data, documents=documents, isolated=isolated)
    if record["status"] != "ok":
        raise EnvironmentBroken(f"{out}: {record['reason']}")
    return Trial(first | last, record)


def launch(
    command: Sequence[str], processes: int = 1, settings: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a trainer on so many devices; returns what it printed.

    Raises UsageError if it was called wrongly, else EnvironmentBroken, with the last that it said.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    whole = [sys.executable, *(launcher if processes > 1 else []), *command]
    done = subprocess.run(whole, capture_output=True, text=True, env=os.environ | (settings or {}), cwd=cwd)
    if done.returncode:
        error = UsageError if done.returncode == 2 else EnvironmentBroken
        raise error(f"{command[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout
