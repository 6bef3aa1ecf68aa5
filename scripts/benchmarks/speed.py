"""The contest's own trainer, naive and golf in turn, on the same machine for the same seconds: speed and score.

The contest's train_gpt.py gets naive's shape of the track. Without CUDA it runs in a copy whose calls of CUDA are
replaced, with a step in one piece. Without --contest only our two run. Utilisation is the arithmetic that the model
asks for (causal attention counted once), over the rate of a large bf16 matrix product measured here.
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf.data.dataset import open_dataset
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.score.score import Options
from pgolf.submission import trial
from pgolf.submission.modules import loaded

BASELINES = Path(__file__).parents[2] / "baselines"
ON_CPU = {
    "import torch\n": "import torch\n\nclass NoCuda:\n    def __getattr__(self, name): return lambda *args: 0\n\n",
    "if not torch.cuda.is_available()": "if False",
    'torch.device("cuda", local_rank)': 'torch.device("cpu")',
    'device_type="cuda"': 'device_type="cpu"',
    "torch.cuda.": "NoCuda().",
    '["nvidia-smi"]': '["true"]',
    "grad_accum_steps = 8 // world_size": "grad_accum_steps = 1",
}
"""What is replaced in the contest's train_gpt.py where there is no CUDA."""


@dataclass(frozen=True)
class Result:
    """A training run and its score."""

    name: str
    parameters: int
    steps: int
    tokens: int
    seconds: float
    """Of training: neither warm-up nor packing."""
    flops: float
    """Per token, forward and backward."""
    artifact_bytes: int
    bpb: float


def bench_speed(args: argparse.Namespace) -> None:
    """Print a row for each trainer."""
    args.out.mkdir(parents=True, exist_ok=True)
    results = [contest(args)] if args.contest else []
    results += [
        ours(args, "naive", args.data, args.naive_set),
        ours(args, "golf", args.golf_data or args.data, args.golf_set),
    ]
    rate, first = matrix_rate(), results[0]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{name}, torch {torch.__version__}; bf16 matrix product: {rate / 1e12:.2f} TFLOP/s")
    print(f"| trainer | parameters | steps | tokens | tokens/s | to {first.name} | utilisation | bytes | bpb |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in results:
        speed = r.tokens / r.seconds
        used = 100 * speed * r.flops / rate / args.processes
        print(
            f"| {r.name} | {r.parameters:,} | {r.steps:,} | {r.tokens:,} | {speed:,.0f} "
            f"| {speed / first.tokens * first.seconds:.3f} | {used:.1f} % | {r.artifact_bytes:,} | {r.bpb:.4f} |"
        )


def ours(args: argparse.Namespace, name: str, data: Path, settings: Sequence[str]) -> Result:
    """Train one of our baselines and score it."""
    out = args.out / f"{name}.zst"
    options = ["--track", args.track, "--seconds", str(args.seconds), *(f"--{item}" for item in settings)]
    command = [str(BASELINES / name / "train.py"), *options]
    print("speed:", name, file=sys.stderr)
    scoring = Options(documents=args.documents, isolated=not args.no_sandbox)
    done = trial.train_and_score(command, out, data, scoring, args.processes)
    log = done.log
    assert done.record.bpb is not None  # it was scored
    return Result(
        name=name,
        parameters=log["parameters"],
        steps=log["steps"],
        tokens=log["tokens"],
        seconds=log["train_seconds"],
        flops=flops_per_token(log["settings"]),
        artifact_bytes=log["artifact_bytes"],
        bpb=done.record.bpb,
    )


def contest(args: argparse.Namespace) -> Result:
    """Run the contest's script in a temporary folder, and read what it printed."""
    data = open_dataset(args.data)
    with loaded(BASELINES / "naive", names=("train", "model", "quant")) as naive:
        shape = asdict(naive.train.PRESETS[args.track]) | {"vocab_size": data.vocab_size}
    settings = {
        "TOKENIZER_PATH": str(data.tokenizer.resolve()),
        "VOCAB_SIZE": str(data.vocab_size),
        "MAX_WALLCLOCK_SECONDS": str(args.seconds),
        "VAL_LOSS_EVERY": "0",
    }
    names = {"layers": "NUM_LAYERS", "dim": "MODEL_DIM", "heads": "NUM_HEADS", "kv_heads": "NUM_KV_HEADS"}
    names |= {"mlp_ratio": "MLP_MULT", "context": "TRAIN_SEQ_LEN", "batch_tokens": "TRAIN_BATCH_TOKENS"}
    names |= {"warmdown_steps": "WARMDOWN_ITERS", "momentum_steps": "MUON_MOMENTUM_WARMUP_STEPS"}
    settings |= {theirs: str(shape[ours]) for ours, theirs in names.items()}
    print("speed: contest", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for shard in (*data.train_shards, *data.val_shards):  # under the names that the script knows
            name = f"fineweb_{shard.path.name.removeprefix('fineweb_')}"
            Path(folder, name).symlink_to(shard.path.resolve())
        script = Path(folder, "train_gpt.py")
        script.write_text(source(args.contest, args.processes), encoding="utf-8")
        printed = trial.launch([str(script)], args.processes, settings | {"DATA_PATH": folder}, Path(folder))
        (args.out / "contest.log").write_text(printed, encoding="utf-8")
        if (weights := Path(folder, "final_model.int8.ptz")).is_file():
            shutil.copyfile(weights, args.out / "contest.ptz")  # for `pgolf import`
    steps, milliseconds = last_of(r"step:(\d+)/\d+ val_loss:\S+ val_bpb:\S+ train_time:(\d+)ms", printed)
    (parameters,) = last_of(r"model_params:(\d+)", printed)
    (size,) = last_of(r"Total submission size int8\+zlib: (\d+)", printed)
    (bpb,) = last_of(r"final_int8_zlib_roundtrip_exact val_loss:\S+ val_bpb:(\S+)", printed)
    tokens, seconds = int(steps) * shape["batch_tokens"], int(milliseconds) / 1e3
    flops = flops_per_token(shape)
    return Result("contest", int(parameters), int(steps), tokens, seconds, flops, int(size), float(bpb))


def source(path: Path, processes: int) -> str:
    """The contest's script as it is, or for a CPU. Raises UsageError for another script, if it would have to change."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from None
    if torch.cuda.is_available():
        return text
    if processes > 1:
        raise UsageError("without CUDA the contest's script takes --processes 1")
    for old, new in ON_CPU.items():
        if old not in text:
            raise UsageError(f"{path}: has no {old!r}; without CUDA only the contest's first train_gpt.py can run")
        text = text.replace(old, new)
    return text


def last_of(pattern: str, text: str) -> Sequence[str]:
    """The groups of the last match."""
    found = list(re.finditer(pattern, text))
    if not found:
        raise EnvironmentBroken(f"the contest's script printed nothing like {pattern}")
    return found[-1].groups()


def flops_per_token(s: Mapping[str, Any]) -> float:
    """Of one token through the model and back: 6 per weight that is used, and attention over half the context."""
    dim, layers = s["dim"], s["layers"]
    layer = dim * dim * (2 + 2 * s["kv_heads"] / s["heads"] + 2 * s["mlp_ratio"])
    return float(6 * (layers * layer + s["vocab_size"] * dim) + 6 * layers * s["context"] * dim)


def matrix_rate() -> float:
    """FLOP/s of a large bf16 matrix product: the median of ten."""
    gpu = torch.cuda.is_available()
    n, device = (8192, "cuda") if gpu else (1024, "cpu")
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(13):
        start = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / float(np.median(seconds[3:]))
