"""The speed of building shards and of reading them."""

import argparse
import itertools
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import sentencepiece as spm
import zstandard

from pgolf.data.build import tokenize
from pgolf.data.shards import Shard, write_shard
from pgolf.machine import cores
from pgolf.train.loader import batches

LOADER = "Ranks as processes on this machine, each with its slice of the global batches, and no training."
NEEDED = 1_500_000  # tokens a second that a rank of 8xH100 takes
SHARD_TOKENS = 100_000_000
BATCH_TOKENS, CONTEXT, VOCAB = 524_288, 1024, 1024


def bench_data(args: argparse.Namespace) -> None:
    """Seconds of both over the same text, one after the other, and the build's memory on a quarter and on all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = read_texts(args.source)
        model, quarter = folder / "tokenizer.model", folder / "quarter.jsonl.zst"
        model.write_bytes(
            args.tokenizer.read_bytes() if args.tokenizer else tokenize.train(texts[:2000], VOCAB, "identity")
        )
        with zstandard.open(quarter, "wt", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts[: len(texts) // 4])
        print(
            f"{args.workers} processes on {cores()} cores, {sum(map(len, texts)):,} characters\n"
            "documents   sentencepiece docs/s   build docs/s   ratio   sentencepiece CPU s   build CPU s   "
            "peak RSS: main       worker"
        )
        ratios = []
        for source, count in [(quarter, len(texts) // 4), (args.source, len(texts))] * args.repeat:
            alone, alone_cpu = sentencepiece_alone(texts[:count], model, args.workers)
            build, build_cpu, main_peak, worker_peak = timed_build(source, model, folder / "out", args.workers)
            print(
                f"{count:9,} {count / alone:22.0f} {count / build:14.0f} {alone / build:7.2f} {alone_cpu:21.1f} "
                f"{build_cpu:13.1f} {main_peak:12.0f} MiB {worker_peak:8.0f} MiB",
                flush=True,
            )
            ratios.append((alone / build, alone_cpu / build_cpu))
        wall, cpu = np.median(ratios, axis=0)
        print(f"median ratio of {len(ratios)} pairs: {wall:.2f} by the wall clock, {cpu:.2f} by CPU seconds")


def read_texts(source: Path) -> list[str]:
    with zstandard.open(source, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line)["text"] for line in file]


def sentencepiece_alone(texts: list[str], model: Path, processes: int) -> tuple[float, float]:
    """Seconds, and CPU seconds of all processes, to encode texts that are in memory, and to forget the tokens."""
    edges = np.cumsum([len(text) for text in texts]) * processes // (sum(map(len, texts)) + 1)
    parts = [[text for text, edge in zip(texts, edges, strict=True) if edge == number] for number in range(processes)]

    def work(part: Iterable[str]) -> None:
        processor = spm.SentencePieceProcessor(model_file=str(model))
        for text in part:
            processor.encode(text)

    return timed_processes([lambda part=part: work(part) for part in parts])  # type: ignore[misc]


def timed_processes(works: list[Callable[[], None]]) -> tuple[float, float]:
    """Seconds until all have ended that run beside each other in forked processes, and their CPU seconds."""
    context = multiprocessing.get_context("fork")
    seconds = context.SimpleQueue()

    def run(work: Callable[[], None]) -> None:
        work()
        seconds.put(time.process_time())

    processes = [context.Process(target=run, args=(work,)) for work in works]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return time.perf_counter() - start, sum(seconds.get() for _ in processes)


# ru_maxrss of a command would include this process, from which it is forked; VmHWM starts with the command.
MEASURED_BUILD = """
import pathlib, re, resource, sys, time
from pgolf.cli.main import main
start = time.process_time()
status = main(sys.argv[1:])
workers = resource.getrusage(resource.RUSAGE_CHILDREN)
peak = int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
print(time.process_time() - start + workers.ru_utime + workers.ru_stime, peak / 1024, workers.ru_maxrss / 1024)
sys.exit(status)
"""


def timed_build(source: Path, model: Path, out: Path, workers: int) -> tuple[float, ...]:
    """Seconds, CPU seconds of all processes, and peak memory of the main process and the largest worker in MiB."""
    options = ["--val-documents", "20", "--tokenizer", str(model), "--workers", str(workers), "--json"]
    command = [sys.executable, "-c", MEASURED_BUILD, "data", "build", str(source), "--out", str(out), *options]
    summary, measured = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    shutil.rmtree(out)
    return json.loads(summary)["seconds"], *map(float, measured.split())


def bench_loader(args: argparse.Namespace) -> None:
    """Tokens a second that all ranks together get."""
    with tempfile.TemporaryDirectory() as name:
        generator = np.random.default_rng(1)
        shards = []
        for number in range(args.shards):
            path = Path(name) / f"train_{number:06d}.bin"
            write_shard(path, generator.integers(1, VOCAB, SHARD_TOKENS, dtype=np.uint16))
            shards.append(Shard(path, SHARD_TOKENS))

        def take(rank: int) -> None:
            stream = batches(shards, VOCAB, BATCH_TOKENS, CONTEXT, rank=rank, world=args.ranks)
            for _ in itertools.islice(stream, args.batches):
                pass

        seconds, cpu = timed_processes([lambda rank=rank: take(rank) for rank in range(args.ranks)])  # type: ignore[misc]
    total = args.batches * BATCH_TOKENS
    print(
        f"{args.ranks} ranks on {cores()} cores, {args.batches} batches of {BATCH_TOKENS:,} tokens from "
        f"{args.shards} shards of {SHARD_TOKENS:,}\n"
        f"all ranks together {total / seconds / 1e6:.1f} M tokens/s ({seconds:.1f} s, {cpu:.1f} CPU s); "
        f"needed are {args.ranks * NEEDED / 1e6:.1f} M: {total / seconds / args.ranks / NEEDED:.1f} times as much"
    )
