"""Ablations: train a base and variants of it with the same seeds and budget, and compare them seed by seed.

A variant is one or more settings of the trainer, joined by commas: `xsa=0` or `leak=0,smear=0`. Every run is
kept in --out under its settings, so the table can be extended, and a call that was cut short goes on where it stopped.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import pgolf.train
from pgolf.artifact import code_in
from pgolf.errors import UsageError
from pgolf.files import write_atomically
from pgolf.score.score import Options
from pgolf.stats import row
from pgolf.submission import trial


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant, the base first: scores by seed, the mean difference from the base and its interval."""
    if not args.trainer.is_file():
        raise UsageError(f"{args.trainer}: no such trainer")
    args.out.mkdir(parents=True, exist_ok=True)
    variants = {"base": []} | {text: text.split(",") for text in args.variants}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in args.seeds:  # seed by seed, so that a table cut short compares like with like
        for name, changes in reversed(variants.items()):  # a slip in a variant shows before the base is trained
            results[name].append(one_run(args, [*args.base, *changes], seed))
    base = np.array([run["bpb"] for run in results["base"]])
    return [row(name, runs, base) for name, runs in results.items()]


def one_run(args: argparse.Namespace, settings: Sequence[str], seed: int) -> dict[str, Any]:
    """Train and score, or read the record of an earlier call. It is written when all is done."""
    budget = ["--steps", str(args.steps)] if args.steps else ["--seconds", str(args.seconds)]
    command = [str(args.trainer), "--track", args.track, "--seed", str(seed), *budget]
    command += ["--preset", args.preset] if args.preset else []
    command += [f"--{setting}" for setting in settings]
    parts = [*command, str(args.data), args.documents, source(args.trainer), *["development"] * args.development]
    key = hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()[:16]
    record = args.out / f"{key}.json"
    if record.is_file():
        return dict(json.loads(record.read_text(encoding="utf-8")))
    name = " ".join(settings) or "base"
    print(f"pgolf: {name}, seed {seed}", file=sys.stderr)
    options = Options(documents=args.documents, isolated=not args.no_sandbox, development=args.development)
    done = trial.train_and_score(command, args.out / f"{key}.zst", args.data, options)
    result = {
        "command": command,
        "bpb": done.record.bpb,
        "documents": done.record.documents,
        "parameters": done.log["parameters"],
        "artifact_bytes": done.log["artifact_bytes"],
        "tokens": done.log["tokens"],
        "tokens_per_second": done.log["tokens"] / done.log["train_seconds"],
    }
    write_atomically(record, (json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result


def source(trainer: Path) -> str:
    """Digest of the code: the trainer's folder and `pgolf.train`."""
    digest = hashlib.sha256()
    folders = trainer.resolve().parent, *map(Path, pgolf.train.__path__)
    for folder in folders:
        for _, code in sorted(code_in(folder).items()):
            digest.update(code)
    return digest.hexdigest()


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table for people."""
    lines = ["| variant | bpb | effect | ± (95 %) | parameters | bytes | tokens/s |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        half = "" if r["half_interval"] is None else f"{r['half_interval']:.4f}"
        effect = "" if r["variant"] == "base" else f"{r['effect']:+.4f}"
        lines.append(
            f"| {r['variant']} | {r['mean']:.4f} | {effect} | {half if effect else ''} | {r['parameters']:,} | "
            f"{r['artifact_bytes']:,} | {r['tokens_per_second']:,} |"
        )
    return "\n".join(lines)
