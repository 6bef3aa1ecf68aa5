"""scripts/ablate: effects paired by seed, runs kept."""

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import ROOT


@pytest.fixture(scope="module")
def ablate() -> Iterator[Any]:
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("ablate")
    sys.path.remove(str(ROOT / "scripts"))


def result(bpb: float) -> dict[str, Any]:
    return {"bpb": bpb, "parameters": 10, "artifact_bytes": 20, "tokens": 30, "tokens_per_second": 40.0}


def test_effect_is_paired_by_seed(ablate: Any) -> None:
    base = np.array([2.0, 2.2, 2.4])  # seeds differ far more than the variant does
    row = ablate.row("xsa=0", [result(2.01), result(2.22), result(2.43)], base)
    assert row["effect"] == pytest.approx(0.02)
    assert row["half_interval"] == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-5)  # t for 2 degrees of freedom
    assert ablate.row("xsa=0", [result(2.01)], base[:1])["half_interval"] is None


def test_finished_runs_are_not_repeated(ablate: Any, tmp_path: Path, capsys: Any) -> None:
    args = ["--data", "data", "--steps", "5", "--seeds", "1", "--out", str(tmp_path), "xsa=0"]
    parsed: argparse.Namespace = ablate.parse(args)
    for settings, bpb in (([], 2.0), (["xsa=0"], 2.5)):
        command = [str(parsed.trainer), "--track", "laptop", "--seed", "1", "--steps", "5"]
        command += [f"--set={s}" for s in settings]
        key = json.dumps([*command, "data", None, ablate.source(parsed.trainer)]).encode()
        name = ablate.hashlib.sha256(key).hexdigest()[:16]
        (tmp_path / f"{name}.json").write_text(json.dumps(result(bpb)))
    assert ablate.main(args) == 0
    assert "| xsa=0 | 2.5000 | +0.5000 |" in capsys.readouterr().out
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert ablate.main([*args, "--trainer", "nowhere.py"]) == 2
    assert "no such trainer" in capsys.readouterr().err
