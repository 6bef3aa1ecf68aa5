"""Benchmarks. Each prints both sides of its comparison, measured in one run."""

import argparse
import contextlib
import dataclasses
import sys
import time
from pathlib import Path

import codes
import density
import early
import gpu
import numpy as np
import peers
import quantise
import speed
import throughput
import torch

from pgolf import rules
from pgolf.artifact import Artifact, read
from pgolf.data.dataset import open_dataset
from pgolf.errors import PgolfError
from pgolf.machine import cores
from pgolf.score import schedule, tokenization
from pgolf.score.devices import Runtime
from pgolf.score.schedule import Targets
from pgolf.score.score import Options, score
from pgolf.submission.modules import loaded, unpacked


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description=__doc__,
        epilog="example:\n  scripts/bench score runs/naive17m.zst --data ../shared/data/fineweb10B_sp1024",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="benchmark")
    command = commands.add_parser("score", help="the sandboxed scorer against the same walk in one process")
    command.add_argument("artifact", type=Path)
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--tokens", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    command.set_defaults(run=bench_score)
    command = commands.add_parser("data", help="the dataset build against sentencepiece alone")
    command.add_argument("source", type=Path, help="a .jsonl.zst file")
    command.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model (default: trained on it)")
    command.add_argument("--workers", type=int, default=cores())
    command.add_argument("--repeat", type=int, default=2)
    command.set_defaults(run=throughput.bench_data)
    command = commands.add_parser(
        "loader", help="tokens a second of the training loader", description=throughput.LOADER
    )
    command.add_argument("--ranks", type=int, default=8)
    command.add_argument("--batches", type=int, default=400, help="that each rank takes (default: %(default)s)")
    command.add_argument("--shards", type=int, default=2, help="random ones that are written (default: %(default)s)")
    command.set_defaults(run=throughput.bench_loader)
    command = commands.add_parser("codes", help="codes of a baseline's weights as .npz", description=codes.__doc__)
    command.add_argument("artifact", type=Path)
    command.add_argument("-o", "--out", type=Path, default=Path("codes.npz"))
    command.set_defaults(run=codes.write_codes)
    command = commands.add_parser("density", help="coded weights against their entropy", description=density.__doc__)
    command.add_argument("artifact", type=Path, nargs="?", help="an artifact of baselines/golf")
    command.set_defaults(run=density.bench_density)
    command = commands.add_parser("early", help="what work before the clock gains", description=early.__doc__)
    early.add_arguments(command)
    command.set_defaults(run=early.bench_early)
    command = commands.add_parser(
        "gpu",
        help="every figure of the main track, on a machine with a GPU",
        description=gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--text", type=Path, required=True, help="a .jsonl.zst file to train on and to score")
    command.add_argument("--out", type=Path, required=True, help="folder of figures and logs")
    command.add_argument("--minutes", type=float, default=60, help="begin no stage after these (default: %(default)s)")
    command.add_argument("--contest", type=Path, metavar="FILE", help="the contest's train_gpt.py")
    command.add_argument("--full", action="store_true", help="also train each of ours for 600 s")
    command.add_argument("--rehearse", action="store_true", help="the stages in small, on a CPU")
    command.set_defaults(run=gpu.bench_gpu)
    command = commands.add_parser("peers", help="compressors beside scored artifacts", description=peers.__doc__)
    peers.add_arguments(command)
    command.set_defaults(run=peers.bench_peers)
    command = commands.add_parser("quantise", help="what coarser weights cost", description=quantise.__doc__)
    command.add_argument("artifact", type=Path, help="an artifact of baselines/naive or baselines/golf")
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--bits", type=float, nargs="+", default=[3.0, 3.5, 4.0, 4.5, 5.0])
    command.add_argument("--tokens", type=int, default=131_072, help="of the validation text (default: %(default)s)")
    command.set_defaults(run=quantise.bench_quantise)
    command = commands.add_parser("speed", help="the contest's trainer, naive and golf", description=speed.__doc__)
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--golf-data", type=Path, help="dataset with a tokenizer of golf's own (default: --data)")
    command.add_argument("--contest", type=Path, metavar="FILE", help="the contest's train_gpt.py")
    command.add_argument("--seconds", type=float, default=600, help="for each (default: %(default)s)")
    command.add_argument("--processes", type=int, default=1, help="GPUs")
    command.add_argument("--track", default="main", choices=rules.TRACKS)
    command.add_argument("--documents", type=int, metavar="N", help="score our two on the first N documents only")
    command.add_argument("--no-sandbox", action="store_true", help="score without the sandbox")
    command.add_argument("--naive-set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--golf-set", action="append", default=[], metavar="KEY=VALUE")
    command.add_argument("--out", type=Path, default=Path("runs/speed"), help="folder of the runs")
    command.set_defaults(run=speed.bench_speed)
    args = parser.parse_args()
    try:
        args.run(args)
    except PgolfError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def bench_score(args: argparse.Namespace) -> None:
    """Wall time of both over growing samples, whether they agree, and what a step costs besides the predictor."""
    lift_time_limits()
    artifact = read(args.artifact, rules.ARTIFACT_BYTES)
    text = open_dataset(args.data).canonical_text()
    encoded = tokenization.encode(
        artifact, text.documents, Runtime(isolated=False), contextlib.nullcontext(time.monotonic() + 1e6)
    )
    ends = np.cumsum([len(ids) + 1 for ids in encoded])
    print("    tokens    steps   sandbox   in-process   ratio   predictor   wire + scorer   difference of the loss")
    for tokens in args.tokens:
        count = int(np.searchsorted(ends, tokens)) + 1
        record = score(args.artifact, args.data, Options(device=args.device, documents=count))
        if record.status != "ok":
            sys.exit(f"bench: {record.reason}")
        assert record.tokens and record.steps and record.nats_per_token  # a score of the step form has them
        seconds = record.seconds
        sandboxed = seconds["predictor"] + seconds["wire"] + seconds["scorer"]
        start = time.perf_counter()
        loss = plain_loop(artifact, encoded[:count], args.device)
        plain = time.perf_counter() - start
        difference = abs(loss / record.nats_per_token - 1)
        print(
            f"{record.tokens:10,} {record.steps:8,} {sandboxed:7.1f} s {plain:10.1f} s "
            f"{sandboxed / plain:7.3f} {1e6 * seconds['predictor'] / record.steps:8.0f} us "
            f"{1e6 * (seconds['wire'] + seconds['scorer']) / record.steps:12.0f} us {difference:24.1e}",
            flush=True,
        )


def lift_time_limits() -> None:
    """A benchmark is not a submission: let it take its time."""
    for name, track in rules.TRACKS.items():
        rules.TRACKS[name] = dataclasses.replace(track, eval_seconds=1e6)


def plain_loop(artifact: Artifact, encoded: list[np.ndarray], device: str) -> float:
    """nats per token, computed in this process over the same schedule as the scorer's."""
    manifest = artifact.manifest
    targets = Targets.of(manifest, encoded)
    count = schedule.count(manifest, len(encoded), len(targets.tokens))
    with unpacked(artifact.members) as folder, loaded(folder) as own:
        predictor = own.predict.load(folder, torch.device(device), manifest.lanes, count)
    walk, total = schedule.steps(manifest, count), 0.0
    step = schedule.begin(walk)
    while step is not None:
        shown, lane = (torch.from_numpy(ids.astype(np.int64)).to(device) for ids in (step.shown, step.lane))
        logits = predictor.step(shown, lane)
        following = targets.tokens[targets.at(step)]
        wanted = torch.from_numpy(following).long().to(device)
        total += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        step = schedule.advance(walk, following)
    return total / len(targets.tokens)


if __name__ == "__main__":
    main()
