"""Benchmarks. Each prints both sides of its comparison, measured in one run."""

import argparse
import dataclasses
import importlib
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pgolf import rules, tokenizer, windows
from pgolf.artifact import Artifact, read
from pgolf.data.dataset import open_dataset
from pgolf.score import SLOT_BYTES, score


def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  scripts/bench score runs/naive17m.zst --data ../shared/data/fineweb10B_sp1024",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="benchmark")
    command = commands.add_parser("score", help="the sandboxed scorer against a plain loop in one process")
    command.add_argument("artifact", type=Path)
    command.add_argument("--data", type=Path, required=True)
    command.add_argument("--tokens", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    command.set_defaults(run=bench_score)
    args = parser.parse_args()
    args.run(args)


def bench_score(args: argparse.Namespace) -> None:
    """Wall time of both over growing samples, and whether they agree."""
    for name, track in rules.TRACKS.items():
        rules.TRACKS[name] = dataclasses.replace(track, eval_seconds=math.inf)
    artifact = read(args.artifact, 16_000_000)
    text = open_dataset(args.data).canonical_text()
    encoded = tokenizer.encode(artifact, text.documents, math.inf, True)
    ends = np.cumsum([len(ids) + 1 for ids in encoded])
    print("    tokens   sandbox   in-process   ratio   ratio after 6 s   us/token   relative difference of the loss")
    for tokens in args.tokens:
        count = int(np.searchsorted(ends, tokens)) + 1
        start = time.perf_counter()
        record = score(args.artifact, args.data, documents=count)
        boxed = time.perf_counter() - start
        if record["status"] != "ok":
            sys.exit(f"bench: {record['reason']}")
        start = time.perf_counter()
        loss = plain_loop(artifact, encoded[:count])
        plain = time.perf_counter() - start
        difference = abs(loss / record["nats_per_token"] - 1)
        print(
            f"{record['tokens']:10,} {boxed:8.1f} s {plain:10.1f} s {boxed / plain:7.3f} "
            f"{(boxed - 6) / plain:17.3f} {1e6 * boxed / record['tokens']:10.1f} {difference:35.1e}",
            flush=True,
        )


def plain_loop(artifact: Artifact, encoded: list[np.ndarray]) -> float:
    """nats per token, computed in this process over the same windows and batches as the scorer's."""
    manifest = artifact.manifest
    with tempfile.TemporaryDirectory() as folder:
        for name, data in artifact.members.items():
            (Path(folder) / name).write_bytes(data)
        sys.path.insert(0, folder)
        try:
            model = importlib.import_module("predict").load(Path(folder), torch.device("cpu"))
        finally:
            sys.path.remove(folder)
    stream, boundaries = windows.stream(encoded, manifest.bos)
    plan = windows.plan(boundaries, manifest.window, manifest.context, manifest.stride or manifest.context)
    total = 0.0
    with torch.inference_mode():
        for batch in windows.batches(plan, SLOT_BYTES // (4 * manifest.vocab_size)):
            positions = batch.positions()
            logits = model(torch.from_numpy(stream[positions].astype(np.int64)))[:, batch.first :]
            targets = torch.from_numpy(stream[positions[:, batch.first :] + 1].astype(np.int64))
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / (len(stream) - 1)


if __name__ == "__main__":
    main()
