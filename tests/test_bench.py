"""scripts/bench: what it reads from the trainers, and the arithmetic that it counts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ALL, ROOT
from trainers import load

# What the contest's script prints, as far as it is read, and what is replaced in it without CUDA.
CONTEST = """
import os
import torch
def main(local_rank, world_size):
    if not torch.cuda.is_available(): raise SystemExit("RuntimeError: CUDA is required")
    torch.cuda.set_device(torch.device("cuda", local_rank))
    grad_accum_steps = 8 // world_size
    torch.autocast(device_type="cuda"), ["nvidia-smi"]
main(0, 1)
assert os.environ["TRAIN_SEQ_LEN"] == "1024" and os.environ["NUM_LAYERS"] == "9"
open("final_model.int8.ptz", "w").write("weights")
assert os.environ["MAX_WALLCLOCK_SECONDS"] == "6.0" and os.path.isdir(os.environ["DATA_PATH"])
print("model_params:17059912")
print("step:1/20000 train_loss:6.9000 train_time:300ms step_avg:300.00ms")
print("step:10/20000 val_loss:5.0000 val_bpb:3.0000 train_time:3000ms step_avg:300.00ms")
print("Total submission size int8+zlib: 15863489 bytes")
print("final_int8_zlib_roundtrip_exact val_loss:5.10000000 val_bpb:3.02000000")
"""
TINY = ("context=64", "layers=3", "dim=32", "heads=4", "kv_heads=2", "batch_tokens=512", "warmup_steps=1", "compile=0")
GOLF = (*TINY, "rope_dims=0", "xsa=0", "prior_bytes=0", "calibration_tokens=512")


def bench(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "benchmarks"), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # two threads on a core and a half wait for each other
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def rows_of(table: str) -> dict[str, list[str]]:
    """Cells of each row by its first one."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return {cells[0]: cells[1:] for cells in lines if len(cells) > 1}


def test_benchmarks_of_the_baselines(dataset: Path, tmp_path: Path) -> None:
    script, runs = tmp_path / "train_gpt.py", tmp_path / "runs"
    script.write_text(CONTEST)
    speed = ["speed", "--data", dataset, "--seconds", 6, "--contest", script, "--no-sandbox", "--out", runs]
    speed += [f"--naive-set={item}" for item in TINY] + [f"--golf-set={item}" for item in GOLF]
    done = bench(*speed)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert {"contest", "naive", "golf"} <= rows.keys(), done.stdout
    assert "17,059,912" in rows["contest"] and "1.000" in rows["contest"] and "1,747,627" in rows["contest"]
    assert (runs / "contest.ptz").read_text() == "weights"
    script.write_text(CONTEST.replace("assert", "raise SystemExit('CUDA is out of memory')\nassert", 1))
    done = bench(*speed)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].endswith("CUDA is out of memory")
    script.write_text("import torch")
    done = bench(*speed)
    assert done.returncode == 2
    assert "only the contest's first train_gpt.py can run" in done.stderr

    for trainer in ("naive", "golf") if ALL else ("golf",):
        done = bench("quantise", runs / f"{trainer}.zst", "--data", dataset, "--tokens", 4096, "--bits", 1, 7)
        assert done.returncode == 0, done.stderr
        coarse, fine = (list(map(float, rows_of(done.stdout)[bits])) for bits in ("1", "7"))
        assert len(coarse) == len(fine) == 4
        assert max(map(abs, fine)) < 0.02 < min(coarse)
    done = bench("density", runs / "golf.zst")
    assert done.returncode == 0, done.stderr
    assert float(rows_of(done.stdout)["coder.py, models and header included"][1]) > 1
    if ALL:
        assert bench("density", runs / "naive.zst").returncode == 2


@pytest.mark.parametrize("baseline", ["naive", "golf"])
def test_arithmetic_of_a_token(baseline: str) -> None:
    """Against torch's own count of the matrix products, in windows so short that attention hardly counts."""
    (speed,) = (modules.speed for modules in load(["speed"], ROOT / "scripts" / "benchmarks"))
    shape: dict[str, Any] = {"vocab_size": 96, "context": 4, "layers": 6, "dim": 128, "heads": 4, "kv_heads": 2}
    shape |= {"mlp_ratio": 3}
    names = ["model", "coder"] if baseline == "golf" else ["model"]
    for modules in load(names, ROOT / "baselines" / baseline, ROOT / "baselines" / "naive"):
        model = modules.model.GPT(modules.model.GPTConfig(**shape))
        ids = torch.randint(96, (8, 4))
        with FlopCounterMode(display=False) as counter:
            model(ids, ids).backward()
        assert speed.flops_per_token(shape) * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.03)
