"""The package as a participant installs it: a wheel, in an environment outside of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from conftest import ROOT
from pgolf import __version__
from pgolf.artifact import read
from pgolf.rules import ARTIFACT_BYTES


def test_wheel_scores_and_trains_elsewhere(dataset: Path, tmp_path: Path) -> None:
    """`pgolf`, the scorer and two ranks of a copied baseline run on the wheel alone; packages come from this venv."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source, python = tmp_path / "source", tmp_path / "venv" / "bin" / "python"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    run(*pip, "--python", python, "install", "--no-deps", *tmp_path.glob("*.whl"))
    shutil.rmtree(source)
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))

    assert run(python.parent / "pgolf", "--version") == f"pgolf {__version__}\n"
    assert "artifact" in run(python, "-m", "pgolf.score", "--help")
    assert str(site) in run(python, "-c", "import pgolf; print(pgolf.__file__)")
    shutil.copytree(ROOT / "baselines", tmp_path / "mine")
    run(python.parent / "pgolf", "new", "x", "--from", "mine/golf", "--author", "me", "--out", "entry")
    assert "pgolf check" in (tmp_path / "entry" / "AGENTS.md").read_text()
    assert (tmp_path / "entry" / "code" / "cache.py").read_bytes() == (ROOT / "baselines/naive/cache.py").read_bytes()
    torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    tiny = "--steps=1", "--warmup_steps=1", "--layers=2", "--dim=32", "--context=64", "--batch_tokens=512"
    run(*torchrun, "mine/naive/train.py", "--track=laptop", *tiny, "--data", dataset, "--out", "a.zst")
    assert read(tmp_path / "a.zst", ARTIFACT_BYTES).manifest.track == "laptop"
