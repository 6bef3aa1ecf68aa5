"""Ablations: train a base and variants of it with the same seeds and budget, and compare them seed by seed.

A variant is one or more settings of the trainer, joined by commas: `xsa=0` or `gate=0,smear=0`. Every run is
kept in --out under its settings, so the table can be extended, and a call that was cut short goes on where it stopped.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import trial
from scipy import stats

from pgolf import rules
from pgolf.errors import PgolfError, UsageError
from pgolf.files import write_atomically
from pgolf.plots import draw

ROOT = Path(__file__).parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the table, draw it; returns the exit code."""
    args = parse(argv)
    try:
        rows = table(args)
    except PgolfError as error:
        print(f"ablate: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("ablate: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    (args.out / "ablation.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    print(json.dumps(rows, indent=1) if args.json else markdown(rows))
    if fault := plot(rows, args.out / "ablation.png"):
        print(f"ablate: {fault}", file=sys.stderr)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  scripts/ablate xsa=0 gate=0,smear=0 --data data/demo --steps 200 --seeds 1 2 3",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "variants", nargs="*", metavar="KEY=VALUE[,KEY=VALUE]", help="settings that differ from the base"
    )
    parser.add_argument("--data", type=Path, required=True, help="dataset folder")
    parser.add_argument("--track", default="laptop", choices=rules.TRACKS)
    parser.add_argument("--preset", help="the trainer's settings to begin with (default: those of the track)")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=int, help="budget in steps: the same on any machine")
    budget.add_argument("--seconds", type=float, help="budget in seconds: needs a quiet machine")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--base", action="append", default=[], metavar="KEY=VALUE", help="setting of all runs")
    parser.add_argument("--trainer", type=Path, default=ROOT / "baselines" / "golf" / "train.py")
    parser.add_argument("--documents", type=int, metavar="N", help="score the first N documents only")
    parser.add_argument("--no-sandbox", action="store_true", help="score unboxed: your own code, a little faster")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"), help="folder of the runs, table and plot")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    return parser.parse_args(argv)


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per variant, the base first: scores by seed, the mean difference from the base and its interval."""
    if not args.trainer.is_file():
        raise UsageError(f"{args.trainer}: no such trainer")
    args.out.mkdir(parents=True, exist_ok=True)
    variants = {"base": []} | {text: text.split(",") for text in args.variants}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    for seed in args.seeds:  # seed by seed, so that a table cut short compares like with like
        for name, changes in variants.items():
            results[name].append(one_run(args, [*args.base, *changes], seed))
    base = np.array([run["bpb"] for run in results["base"]])
    return [row(name, runs, base) for name, runs in results.items()]


def row(name: str, runs: Sequence[dict[str, Any]], base: np.ndarray) -> dict[str, Any]:
    """Effect of a variant: the mean of the differences by seed, with its 95 % interval by Student's t."""
    scores = np.array([run["bpb"] for run in runs])
    effect = scores - base
    half = math.nan
    if len(effect) > 1:
        half = float(stats.t.ppf(0.975, len(effect) - 1) * effect.std(ddof=1) / math.sqrt(len(effect)))
    return {
        "variant": name,
        "bpb": [round(float(s), 5) for s in scores],
        "mean": round(float(scores.mean()), 5),
        "effect": round(float(effect.mean()), 5),
        "half_interval": None if math.isnan(half) else round(half, 5),
        "parameters": runs[0]["parameters"],
        "artifact_bytes": max(run["artifact_bytes"] for run in runs),
        "tokens": runs[0]["tokens"],
        "tokens_per_second": round(float(np.median([run["tokens_per_second"] for run in runs]))),
    }


def one_run(args: argparse.Namespace, settings: Sequence[str], seed: int) -> dict[str, Any]:
    """Train and score, or read what an earlier call left. The record is written when all is done."""
    budget = ["--steps", str(args.steps)] if args.steps else ["--seconds", str(args.seconds)]
    command = [str(args.trainer), "--track", args.track, "--seed", str(seed), *budget]
    command += ["--preset", args.preset] if args.preset else []
    command += [f"--set={setting}" for setting in settings]
    key = hashlib.sha256(
        json.dumps([*command, str(args.data), args.documents, source(args.trainer)]).encode()
    ).hexdigest()[:16]
    record = args.out / f"{key}.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    name = " ".join(settings) or "base"
    print(f"ablate: {name}, seed {seed}", file=sys.stderr)
    done = trial.train_and_score(command, args.out / f"{key}.zst", args.data, args.documents, not args.no_sandbox)
    result = {
        "command": command,
        "bpb": done.record["bpb"],
        "documents": done.record["documents"],
        "parameters": done.log["parameters"],
        "artifact_bytes": done.log["artifact_bytes"],
        "tokens": done.log["tokens"],
        "tokens_per_second": done.log["tokens"] / done.log["train_seconds"],
    }
    write_atomically(record, (json.dumps(result, indent=1) + "\n").encode())
    return result


def source(trainer: Path) -> str:
    """Digest of the trainer's folder and of naive's, which it may borrow from: other code, other runs."""
    digest = hashlib.sha256()
    folder = trainer.resolve().parent
    for path in sorted({*folder.glob("*.py"), *(folder.parent / "naive").glob("*.py")}):
        digest.update(path.read_bytes())
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


def plot(rows: Sequence[dict[str, Any]], path: Path) -> str | None:
    """Effects with their intervals; to the right of zero a variant is worse than the base. Returns as `draw` does."""
    variants = sorted((r for r in rows if r["variant"] != "base"), key=lambda r: r["effect"])

    def fill(axes: Any) -> None:
        for y, r in enumerate(variants):
            axes.errorbar(r["effect"], y, xerr=r["half_interval"] or 0, fmt="o", capsize=3, color="tab:blue")
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(variants)), [r["variant"] for r in variants])
        axes.set(xlabel=f"bpb minus the base's ({rows[0]['mean']:.4f}); 95 % interval over {len(rows[0]['bpb'])} seeds")

    return draw(path, (8, 1.5 + 0.35 * len(variants)), fill)


if __name__ == "__main__":
    sys.exit(main())
