"""scripts/bench: what it reads from the trainers, and the arithmetic that it counts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT
from trainers import load

# What the contest's script prints, as far as it is read; its settings come by environment.
CONTEST = """
import os
assert os.environ["MAX_WALLCLOCK_SECONDS"] == "3.0" and os.path.isdir(os.environ["DATA_PATH"])
print("model_params:17059912")
print("step:1/20000 train_loss:6.9000 train_time:300ms step_avg:300.00ms")
print("step:10/20000 val_loss:5.0000 val_bpb:3.0000 train_time:3000ms step_avg:300.00ms")
print("Total submission size int8+zlib: 15863489 bytes")
print("final_int8_zlib_roundtrip_exact val_loss:5.10000000 val_bpb:3.02000000")
"""
TINY = ("context=64", "layers=3", "dim=32", "heads=4", "kv_heads=2", "batch_tokens=512", "warmup_steps=1", "compile=0")
GOLF = (*TINY, "rope_dims=0", "xsa=0", "loops=0", "context_start=0", "calibration_tokens=512", "stride=0")


def test_trainers_side_by_side(dataset: Path, tmp_path: Path) -> None:
    script = tmp_path / "train_gpt.py"
    script.write_text(CONTEST)
    command = [sys.executable, str(ROOT / "scripts" / "bench.py"), "speed", "--data", str(dataset), "--seconds", "3"]
    command += ["--contest", str(script), "--no-sandbox", "--out", str(tmp_path / "runs")]
    command += [f"--naive-set={item}" for item in TINY] + [f"--golf-set={item}" for item in GOLF]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) > 1}
    assert {"contest", "naive", "golf"} <= rows.keys(), done.stdout
    assert "17,059,912" in rows["contest"] and "1.000" in rows["contest"] and "1,747,627" in rows["contest"]
    script.write_text("raise SystemExit('RuntimeError: CUDA is required')")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].endswith("CUDA is required")


@pytest.mark.parametrize("baseline", ["naive", "golf"])
def test_arithmetic_of_a_token(baseline: str) -> None:
    """Against torch's own count of the matrix products, in windows so short that attention hardly counts."""
    (speed,) = (modules.speed for modules in load(["speed"], ROOT / "scripts"))
    shape: dict[str, Any] = {"vocab_size": 96, "context": 4, "layers": 6, "dim": 128, "heads": 4, "kv_heads": 2}
    shape |= {"mlp_ratio": 3}
    if baseline == "golf":
        shape |= {"loops": 2, "loop_start": 1, "loop_stop": 3}
    names = ["model", "ngram", "coder"] if baseline == "golf" else ["model"]
    for modules in load(names, ROOT / "baselines" / baseline, ROOT / "baselines" / "naive"):
        model = modules.model.GPT(modules.model.GPTConfig(**shape))
        ids = torch.randint(96, (8, 4))
        with FlopCounterMode(display=False) as counter:
            model(ids, ids).backward()
        assert speed.flops_per_token(shape) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.03)
