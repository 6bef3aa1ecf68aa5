"""An ablation trial: train with a baseline, score its artifact, read log and record."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import beside
from pgolf.score.record import Record
from pgolf.score.score import Options, score


@dataclass(frozen=True)
class Trial:
    """Result of a trial."""

    log: dict[str, Any]
    """First and last line of the training log: settings, parameters, steps, tokens, train_seconds, artifact_bytes."""
    record: Record
    """The score."""


def train_and_score(command: Sequence[str], out: Path, data: Path, options: Options, processes: int = 1) -> Trial:
    """Run a trainer's command line so that it writes `out`, and score that.

    An artifact that was late is scored too. Raises what `launch` does, and EnvironmentBroken if the
    score is refused.
    """
    out.unlink(missing_ok=True)
    try:
        launch([*command, "--data", str(data), "--out", str(out)], processes)
    except Refused:
        if not out.is_file():
            raise
    first, *_, last = map(json.loads, beside(out, ".jsonl").read_text(encoding="utf-8").splitlines())
    record = score(out, data, options)
    if record.status != "ok":
        raise EnvironmentBroken(f"{out}: {record.reason}")
    return Trial(first | last, record)


def launch(
    command: Sequence[str], processes: int = 1, settings: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a trainer on this number of devices; returns what it printed.

    Raises its error with its sentence: Refused or UsageError if it is one of ours and printed one, else
    EnvironmentBroken.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    full = [sys.executable, *(launcher if processes > 1 else []), *command]
    done = subprocess.run(full, capture_output=True, text=True, env=os.environ | (settings or {}), cwd=cwd)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["failed"]
        ours = [line for line in lines if line.startswith("train.py: ")]
        error = {1: Refused, 2: UsageError}.get(done.returncode, EnvironmentBroken) if ours else EnvironmentBroken
        raise error(f"{command[0]}: {(ours or lines)[-1].removeprefix('train.py: ')}")
    return done.stdout
