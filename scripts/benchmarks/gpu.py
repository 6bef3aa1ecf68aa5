"""All figures of the main track from one machine with a GPU and without a network, in stages.

It runs straight from the checkout: Python 3.11 or newer, torch 2.9 or newer with CUDA, and the packages numpy,
sentencepiece, tokenizers, zstandard, constriction, psutil, packaging, scipy, tqdm, tyro and matplotlib; for the scores
bubblewrap. The text needs more than 4,000 documents. Each stage writes its figures and its log into --out at once and
is skipped when they are there, so a run that was killed goes on. The most valuable come first.

    scripts/bench gpu --text techdocs.jsonl.zst --out runs/gpu --contest train_gpt.py
    scripts/bench gpu --text techdocs.jsonl.zst --out runs/rehearsal --rehearse    # the same on a CPU, in small
"""

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO

import speed
import torch

from pgolf import rules
from pgolf.artifact import pack, read
from pgolf.errors import EnvironmentBroken
from pgolf.files import write_atomically

ROOT = Path(__file__).parents[2]
STAGE_SECONDS = 480.0
LEAST_MEMORY = 40e9  # bytes: the main preset's step takes about 30 GB
LEAN = 128
"""Lanes for comparisons: in fp32 the main track's 2,048 fill no CPU's memory limit, and not every card."""
BUSY = 0.05  # share of the card's memory that is taken when others use it
Figures = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What the stages run: the main track on a GPU, or the same in small to rehearse them."""

    device: str
    track: str
    flags: tuple[str, ...]
    """For both trainers, beside the preset of the track."""
    vocabularies: dict[str, int]
    """Of each baseline's dataset."""
    seconds: float
    """Of a training by the clock."""
    equal_tokens: int
    documents: int
    """That are held out and scored: enough to fill most lanes' caches on the main track."""


MAIN = Scale(
    device="cuda",
    track="main",
    flags=("--warmup_steps=3",),
    vocabularies={"naive": 1024, "golf": 8192},
    seconds=120,
    equal_tokens=50_331_648,
    documents=4000,
)
REHEARSAL = Scale(
    device="cpu",
    track="laptop",
    flags=("--warmup_steps=1", "--compile=0"),
    vocabularies={"naive": 1024, "golf": 1024},
    seconds=30,
    equal_tokens=32_768,
    documents=8,
)


class Bench:
    """A run of the stages: where it writes, and how it starts commands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out.resolve()
        self.text: Path = args.text.resolve()
        self.contest: Path | None = args.contest and args.contest.resolve()
        self.scale = REHEARSAL if args.rehearse else MAIN
        self.log: TextIO = sys.stderr
        self.deadline = 0.0

    @cached_property
    def environment(self) -> dict[str, str]:
        """Of commands: this checkout's package, and compiled kernels that later stages find again."""
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(self.out / "inductor"), "TRITON_CACHE_DIR": str(self.out / "triton")}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **cache}

    def run(self, *command: object, good: Collection[int] = (0,), **variables: str) -> str:
        """What a command prints on standard output; all that it prints is in the stage's log.

        Raises EnvironmentBroken with its last line when its exit code is not `good`, or it takes longer than the stage
        has.
        """
        line = [str(part) for part in command]
        print("$", *line, file=self.log, flush=True)
        left = max(1.0, self.deadline - time.monotonic())
        environment = self.environment | variables
        try:
            done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=left)
        except subprocess.TimeoutExpired:
            raise EnvironmentBroken(f"{line[1] if len(line) > 1 else line[0]}: took longer than {left:.0f} s") from None
        print(done.stdout, done.stderr, sep="\n", file=self.log, flush=True)
        if done.returncode not in good:
            last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
            raise EnvironmentBroken(f"exit code {done.returncode}: {last[:300]}")
        return done.stdout

    def python(self, *arguments: object, good: Collection[int] = (0,), **variables: str) -> str:
        return self.run(sys.executable, *arguments, good=good, **variables)

    def data(self, baseline: str) -> Path:
        return self.out / f"data{self.scale.vocabularies[baseline]}"

    def artifact(self, name: str) -> Path:
        return self.out / f"{name}.zst"


# Stages


def environment(bench: Bench) -> Figures:
    """Card, driver, rates, and whether a sandbox sees the card."""
    gpu = bench.scale.device == "cuda"
    figures: Figures = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    figures |= {"card": torch.cuda.get_device_name(), "driver": driver()} if gpu else {"card": "none"}
    figures["bf16_matrix_flops"] = round(speed.matrix_rate())
    if gpu:
        figures |= {"fp8_matrix_flops": fp8_rate(), **copy_rates()}
        figures |= {f"cuInit, {name}": code for name, code in cu_init().items()}
    printed = bench.python("-m", "pgolf", "doctor", "--device", bench.scale.device, "--json", good=(0, 3))
    failing = [f"{check['name']}: {check['reason']}" for check in json.loads(printed) if not check["holds"]]
    return figures | {"doctor": "; ".join(failing) or "all holds"}


def driver() -> str:
    version = Path("/proc/driver/nvidia/version")
    found = re.search(r"Module\s+(?:for \S+\s+)?([\d.]+)", version.read_text()) if version.is_file() else None
    return found[1] if found else "unknown"


def fp8_rate() -> int:
    """FLOP/s of a large product of e4m3 matrices, or 0 where torch has none for this card."""
    n = 8192
    try:
        a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
        one = torch.ones((), device="cuda")
        product = partial(torch._scaled_mm, a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return round(2 * n**3 / seconds_of(product))
    except (RuntimeError, AttributeError):
        return 0


def copy_rates() -> Figures:
    """Bytes per second of copies of 256 MiB; on the device each byte is read and written."""
    size = 1 << 28
    here, there = torch.empty(size, dtype=torch.uint8, device="cuda"), torch.empty(size, dtype=torch.uint8)
    pinned, other = there.pin_memory(), torch.empty_like(here)
    rates = {"device": 2 * size / seconds_of(lambda: other.copy_(here))}
    rates["pinned to device"] = size / seconds_of(lambda: here.copy_(pinned, non_blocking=True))
    rates["device to pinned"] = size / seconds_of(lambda: pinned.copy_(here, non_blocking=True))
    rates["device to pageable"] = size / seconds_of(lambda: there.copy_(here))
    return {f"copy, {name}": round(rate) for name, rate in rates.items()}


def seconds_of(call: Callable[[], object]) -> float:
    """Median of ten, by events on the device."""
    times = []
    for _ in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return float(sorted(times[3:])[5])


def cu_init() -> dict[str, str]:
    """What cuInit returns here and in bubblewrap, with /proc writable and not: 0 is success."""
    ask = [sys.executable, "-c", "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))"]
    nodes = [part for node in sorted(Path("/dev").glob("nvidia*")) for part in ("--dev-bind", str(node), str(node))]
    box = ["bwrap", "--unshare-all", "--uid", "65534", "--gid", "65534", "--ro-bind", "/", "/", "--tmpfs", "/tmp"]
    box += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", "/sys", "/sys", *nodes]
    ways = {"here": ask, "sandbox": [*box, *ask], "sandbox, /proc read-only": [*box, "--remount-ro", "/proc", *ask]}
    return {name: outcome(command) for name, command in ways.items()}


def outcome(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)[:200]
    return (done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][:200]


def data(bench: Bench) -> Figures:
    """Datasets from the text, one for each vocabulary."""
    figures = {}
    for size in dict.fromkeys(bench.scale.vocabularies.values()):
        build = ["data", "build", bench.text, "--val-documents", bench.scale.documents, "--vocab-size", size]
        printed = bench.python("-m", "pgolf", *build, "--out", bench.out / f"data{size}", "--json")
        summary = json.loads(printed)
        figures[f"training tokens, vocabulary {size}"] = summary["train"]["tokens"]
    return figures


def steps(baseline: str, bench: Bench) -> Figures:
    """Thirty steps, watched."""
    watch, out = bench.out / f"{baseline}-steps.watch.json", bench.artifact(f"{baseline}-steps")
    trainer = ROOT / "baselines" / baseline / "train.py"
    bench.python(ROOT / "scripts/benchmarks/watch.py", watch, trainer, *flags(bench, baseline, out, "--steps=30"))
    watched: Figures = json.loads(watch.read_text())
    return trained(bench, out) | watched


def torchrun(baseline: str, bench: Bench) -> Figures:
    """Thirty steps of one rank under torchrun, which starts the process group but leaves it nothing to say."""
    out = bench.artifact(f"{baseline}-torchrun")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    trainer = ROOT / "baselines" / baseline / "train.py"
    bench.python(*launcher, trainer, *flags(bench, baseline, out, "--steps=30"), GLOO_SOCKET_IFNAME="lo")
    return trained(bench, out)


def timed(baseline: str, bench: Bench, seconds: float | None = None) -> Figures:
    """Training by the clock."""
    out = bench.artifact(baseline if seconds is None else f"{baseline}-{seconds:.0f}")
    limit = f"--seconds={seconds or bench.scale.seconds}"
    bench.python(ROOT / "baselines" / baseline / "train.py", *flags(bench, baseline, out, limit))
    return trained(bench, out)


def equal_tokens(baseline: str, bench: Bench) -> Figures:
    """Training on a number of tokens, and its score. A step takes what a card takes at once: the presets' are for 8."""
    batch = settings_of(bench, f"{baseline}-steps")["micro_tokens"]
    out = bench.artifact(f"{baseline}-tokens")
    recipe = f"--batch_tokens={batch}", f"--steps={bench.scale.equal_tokens // batch}", "--momentum_steps=200"
    bench.python(ROOT / "baselines" / baseline / "train.py", *flags(bench, baseline, out, *recipe))
    return trained(bench, out) | scored(bench, out, bench.data(baseline), bench.scale.documents)


def contest(bench: Bench) -> Figures:
    """The contest's own script for the same seconds on the same data."""
    if bench.contest is None:
        raise EnvironmentBroken("no script was given; --contest train_gpt.py")
    arguments = {
        "contest": bench.contest,
        "data": bench.data("naive"),
        "out": bench.out,
        "processes": 1,
        "track": bench.scale.track,
    }
    row = speed.contest(argparse.Namespace(**arguments, seconds=bench.scale.seconds))
    figures = {"steps": row.steps, "tokens": row.tokens, "tokens_per_second": round(row.tokens / row.seconds)}
    return figures | {"bytes": row.artifact_bytes, "bpb": row.bpb, "parameters": row.parameters}


def score(baseline: str, bench: Bench) -> Figures:
    """On the device in the sandbox, against the CPU and against the same walk in one process."""
    artifact, folder, scale = bench.artifact(baseline), bench.data(baseline), bench.scale
    figures = scored(bench, artifact, folder, scale.documents)
    few = max(1, scale.documents // 100)
    lean = in_few_lanes(artifact, bench.artifact(f"{baseline}-lean"))
    small = {where: scored(bench, lean, folder, few, where) for where in dict.fromkeys((scale.device, "cpu"))}
    exact = in_few_lanes(artifact, bench.artifact(f"{baseline}-fp32"), b"torch.float32")
    small |= {"fp32": scored(bench, exact, folder, few)}
    reference = small["cpu"]["nats_per_token"]
    for name in small.keys() - {"cpu"}:
        figures[f"{name} less cpu, nats"] = round(small[name]["nats_per_token"] - reference, 7)
    printed = bench.python(
        ROOT / "scripts/benchmarks", "score", lean, "--data", folder, "--tokens", 100_000, "--device", scale.device
    )
    return figures | {"sandbox to one process": float(printed.splitlines()[-1].split()[6])}


def in_few_lanes(artifact: Path, out: Path, dtype: bytes = b"torch.bfloat16") -> Path:
    """The same artifact in at most LEAN lanes, whose predictor computes in `dtype` on a GPU."""
    members = dict(read(artifact, rules.ARTIFACT_BYTES).members)
    manifest = json.loads(members["submission.json"])
    manifest["lanes"] = min(LEAN, manifest["lanes"])
    members["submission.json"] = json.dumps(manifest, indent=1).encode()
    members["predict.py"] = members["predict.py"].replace(b"torch.bfloat16", dtype)
    pack(members, out, 2 * rules.ARTIFACT_BYTES)
    return out


def quantise(baseline: str, bench: Bench) -> Figures:
    """What coarser weights cost, as `scripts/bench quantise` prints it."""
    printed = bench.python(
        *(ROOT / "scripts/benchmarks", "quantise", bench.artifact(baseline), "--data", bench.data(baseline)),
        *("--bits", 3.5, 4.5),
    )
    return {"table": printed.splitlines()}


# What stages share


def flags(bench: Bench, baseline: str, out: Path, *more: str) -> list[object]:
    scale = bench.scale
    return ["--data", bench.data(baseline), "--out", out, "--track", scale.track, "--log_every=1", *scale.flags, *more]


def trained(bench: Bench, out: Path) -> Figures:
    """Speed, loss and size from a training log."""
    first, *lines, last = map(json.loads, out.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    rate = last["tokens"] / last["train_seconds"]
    flops = speed.flops_per_token(first["settings"])
    known = bench.out / "environment.json"
    peak = json.loads(known.read_text())["bf16_matrix_flops"] if known.is_file() else 0
    return {
        "steps": last["steps"],
        "tokens": last["tokens"],
        "tokens_per_second": round(rate),
        "utilisation": round(rate * flops / peak, 4) if peak else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "pack_seconds": round(first["pack_seconds"], 2),
        "bytes": last["artifact_bytes"],
    }


def scored(bench: Bench, artifact: Path, folder: Path, documents: int, device: str | None = None) -> Figures:
    record = artifact.with_name(f"{artifact.stem}.{device or bench.scale.device}.score.json")
    where = ["--data", folder, "--documents", documents, "--device", device or bench.scale.device, "--out", record]
    record.unlink(missing_ok=True)
    bench.python("-m", "pgolf.score", artifact, *where, "--json", good=(0, 1, 3))
    found = json.loads(record.read_text())
    if found["status"] != "ok":
        raise EnvironmentBroken(f"{found['status']}: {found['reason']}")
    seconds = found["seconds"]
    walk = seconds["predictor"] + seconds["wire"] + seconds["scorer"]
    figures = {key: found[key] for key in ("bpb", "nats_per_token", "isolation")}
    rate = round(found["tokens"] / walk)
    return figures | {"scored_tokens": found["tokens"], "scored_tokens_per_second": rate, "seconds": seconds}


def settings_of(bench: Bench, name: str) -> Figures:
    log = bench.artifact(name).with_suffix(".jsonl")
    found: Figures = json.loads(log.read_text(encoding="utf-8").splitlines()[0])["settings"]
    return found


# The run


def stages(full: bool) -> dict[str, Callable[[Bench], Figures]]:
    """By name, the most valuable first."""
    found: dict[str, Callable[[Bench], Figures]] = {"environment": environment, "data": data}
    found |= stages_of("naive", steps, timed) | {"contest timed": contest} | stages_of("naive", score)
    found |= stages_of("golf", steps, timed, score)
    for kind in (torchrun, equal_tokens, quantise):
        found |= stages_of("naive", kind) | stages_of("golf", kind)
    if full:
        found |= {f"{baseline} 600 s": partial(timed, baseline, seconds=600) for baseline in ("naive", "golf")}
    return found


def stages_of(baseline: str, *kinds: Callable[[str, Bench], Figures]) -> dict[str, Callable[[Bench], Figures]]:
    """By name."""
    return {f"{baseline} {kind.__name__}": partial(kind, baseline) for kind in kinds}


def bench_gpu(args: argparse.Namespace) -> None:
    """Run what is missing and print all there is. Raises EnvironmentBroken when something is still missing."""
    bench = Bench(args)
    if bench.scale.device == "cuda":
        check_card()
    bench.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    missing = {}
    for name, stage in stages(args.full).items():
        if (bench.out / f"{name}.json").is_file():
            continue
        if (left := end - time.monotonic()) < 30:
            missing[name] = "no time was left"
            continue
        print(f"bench: {name}", file=sys.stderr, flush=True)
        try:
            take(bench, name, stage, min(left, 2 * STAGE_SECONDS if name.endswith("600 s") else STAGE_SECONDS))
        except Exception as error:  # whatever broke it, time on such a machine is too dear to lose the other stages
            missing[name] = str(error) or type(error).__name__
    print(table(bench, list(stages(args.full))))
    if missing:
        raise EnvironmentBroken("missing: " + "; ".join(f"{name} ({why})" for name, why in missing.items()))


def take(bench: Bench, name: str, stage: Callable[[Bench], Figures], seconds: float) -> None:
    """Run a stage and keep its figures, with the seconds that it took."""
    start = time.monotonic()
    bench.deadline = start + seconds
    with (bench.out / f"{name}.log").open("w", encoding="utf-8") as bench.log:
        try:
            figures = stage(bench)
        except Exception:
            traceback.print_exc(file=bench.log)
            raise
    figures = {"stage_seconds": round(time.monotonic() - start, 1), **figures}
    write_atomically(bench.out / f"{name}.json", json.dumps(figures, indent=1).encode())


def table(bench: Bench, names: Sequence[str]) -> str:
    """A row for each figure."""
    lines = ["| stage | figure | value |", "|---|---|---|"]
    for name in names:
        if (path := bench.out / f"{name}.json").is_file():
            rows = json.loads(path.read_text()).items()
            lines += [f"| {name} | {key} | {shown(value)} |" for key, value in rows if key != "table"]
    return "\n".join(lines)


def shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(f"{item['name']} {100 * item['share']:.0f} %" for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def check_card() -> None:
    """Raises EnvironmentBroken, in one sentence, when this machine cannot give the figures."""
    if torch.version.cuda is None:
        raise EnvironmentBroken(f"torch {torch.__version__} is built without CUDA; install a CUDA build, or --rehearse")
    if not torch.cuda.is_available():
        raise EnvironmentBroken(f"torch {torch.__version__} sees no GPU: {why_no_gpu()}; or --rehearse")
    name = torch.cuda.get_device_name()
    if torch.cuda.get_device_capability() < (8, 0):
        raise EnvironmentBroken(f"{name} has no bf16; the main track needs compute capability 8.0")
    free, memory = torch.cuda.mem_get_info()
    if memory < LEAST_MEMORY:
        raise EnvironmentBroken(f"{name} has {memory / 1e9:.0f} GB; the main track needs {LEAST_MEMORY / 1e9:.0f}")
    if memory - free > BUSY * memory:
        raise EnvironmentBroken(f"{name} is in use: {(memory - free) / 1e9:.0f} GB are taken; wait until it is free")


def why_no_gpu() -> str:
    try:
        code = ctypes.CDLL("libcuda.so.1").cuInit(0)
    except OSError:
        return "there is no libcuda.so.1, so no driver, on the library path"
    return f"cuInit returns {code}" if code else f"the driver {driver()} is too old for CUDA {torch.version.cuda}"
