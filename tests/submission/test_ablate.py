"""`pgolf ablate`: effects paired by seed, runs kept."""

import argparse
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT
from pgolf.cli.main import command_line, main
from pgolf.score import record
from pgolf.score.score import Options
from pgolf.stats import row
from pgolf.submission import ablate, trial


def result(bpb: float) -> dict[str, Any]:
    return {"bpb": bpb, "parameters": 10, "artifact_bytes": 20, "tokens": 30, "tokens_per_second": 40.0}


def test_effect_is_paired_by_seed() -> None:
    base = np.array([2.0, 2.2, 2.4])  # seeds differ far more than the variant does
    found = row("xsa=0", [result(2.01), result(2.22), result(2.43)], base)
    assert found["effect"] == pytest.approx(0.02)
    assert found["half_interval"] == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-5)  # t for 2 degrees of freedom
    assert row("xsa=0", [result(2.01)], base[:1])["half_interval"] is None


def test_finished_runs_are_not_repeated(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = ["ablate", "--data", "data", "--steps", "5", "--seeds", "1", "--out", str(tmp_path), "xsa=0"]
    parsed: argparse.Namespace = command_line().parse_args(args)
    for settings, bpb in (([], 2.0), (["xsa=0"], 2.5)):
        command = [str(parsed.trainer), "--track", "laptop", "--seed", "1", "--steps", "5"]
        command += [f"--{s}" for s in settings]
        key = json.dumps([*command, "data", None, ablate.source(parsed.trainer)]).encode()
        name = hashlib.sha256(key).hexdigest()[:16]
        (tmp_path / f"{name}.json").write_text(json.dumps(result(bpb)))
    assert main(args) == 0
    assert "| xsa=0 | 2.5000 | +0.5000 |" in capsys.readouterr().out
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert main([*args, "--trainer", "nowhere.py"]) == 2
    assert "no such trainer" in capsys.readouterr().err


def test_choices_can_be_made_on_the_development_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is another run than one on the validation text; and a variant runs before the base does."""
    ran: list[tuple[str, bool]] = []

    def fake(command: list[str], out: Path, data: Path, options: Options) -> trial.Trial:
        ran.append((command[-1], options.development))
        log = {"parameters": 1, "artifact_bytes": 2, "tokens": 3, "train_seconds": 4.0}
        return trial.Trial(log, replace(record.new(tmp_path / "a.zst", None, "cpu"), bpb=2.0))

    monkeypatch.setattr(trial, "train_and_score", fake)
    (tmp_path / "a.zst").write_bytes(b"")
    (tmp_path / "train.py").write_text("")
    args = ["ablate", "dim=8", "--data", "data", "--steps", "5", "--seeds", "1", "--out", str(tmp_path)]
    args += ["--trainer", str(tmp_path / "train.py")]
    for more in ([], ["--development"], ["--development"]):
        ablate.table(command_line().parse_args([*args, *more]))
    assert ran == [("--dim=8", False), ("5", False), ("--dim=8", True), ("5", True)]
