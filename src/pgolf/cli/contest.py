"""`pgolf diff` and `pgolf rerun`: commands that compare submissions and run them again."""

import argparse
import json
import math
import sys
from pathlib import Path

from pgolf.cli.command import Commands, add_command, add_data, add_device, note, positive
from pgolf.contest import compare, rerun_record, verdict
from pgolf.contest.case import Options
from pgolf.contest.rerun import rerun
from pgolf.data.dataset import default_dataset
from pgolf.errors import EnvironmentBroken, Refused
from pgolf.files import printable


def add_diff(commands: Commands) -> None:
    parser = add_command(
        commands,
        "diff",
        "compare two scores document by document",
        "Compare two scores of the same text: difference in bits per byte with its interval over documents, sizes, "
        "seconds, and a plot of the difference over the text.",
        "pgolf diff runs/naive.score.json runs/golf.score.json --plot runs/diff.png",
        _diff,
    )
    parser.add_argument("a", type=Path, metavar="A", help="a record of `pgolf score`")
    parser.add_argument("b", type=Path, metavar="B", help="another one; differences are B minus A")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a PNG")
    parser.add_argument("--json", action="store_true", help="print the figures to standard output")


def _diff(args: argparse.Namespace) -> int:
    result = compare.compare(args.a, args.b)
    print(json.dumps(compare.as_json(result), indent=2, allow_nan=False) if args.json else compare.table(result))
    if args.plot and (fault := compare.plot(result, args.plot)):
        note(fault)
    return 0


def add_rerun(commands: Commands) -> None:
    parser = add_command(
        commands,
        "rerun",
        "train a submission again from its sources and judge its claim",
        "Train a submission again in a sandbox that gets its sources and the training data only, once for each seed; "
        "score what comes out, and say whether the claimed score reproduces. Killed and started again, it goes on.",
        "pgolf rerun submissions/2026-11-28_naive-3 --seeds 3 --data data/fineweb --score-data data/secret\n\n"
        "exit codes: 0 reproduces, inconclusive, quarantined or no claim; 1 does not reproduce, or refused;\n"
        "            2 wrong usage; 3 this machine or the data is broken, and a later start goes on",
        _rerun,
    )
    parser.add_argument("submission", type=Path, help="a submission's folder, or an artifact (.zst)")
    add_data(parser)
    parser.add_argument(
        "--score-data",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="score on this dataset too; the record names it by digest only (may be given again)",
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="trainings (default: %(default)s)")
    parser.add_argument("--nproc", type=positive, default=1, metavar="K", help="ranks (default: %(default)s)")
    parser.add_argument("--claim", type=_bpb, metavar="BPB", help="the claimed score, of an artifact without folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the re-run's folder (default: runs/rerun/DIGEST)")
    parser.add_argument(
        "--max-hours",
        type=_hours,
        default=24.0,
        metavar="H",
        help="end a training of a track without a limit after this (default: %(default)g)",
    )
    add_device(parser)
    parser.add_argument(
        "--fresh-machine",
        action="store_true",
        help="your word that this virtual machine was made for this and runs nothing else",
    )
    parser.add_argument("--json", action="store_true", help="print the record to standard output")


def _bpb(text: str) -> float:
    return _above_zero(text, "a score in bits per byte")


def _hours(text: str) -> float:
    return _above_zero(text, "a number of hours")


def _above_zero(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value


def _rerun(args: argparse.Namespace) -> int:
    """Run again, and print record and verdict."""
    options = Options(
        data=args.data or default_dataset(),
        score_data=tuple(args.score_data),
        seeds=args.seeds,
        processes=args.nproc,
        device=args.device,
        out=args.out,
        max_hours=args.max_hours,
        claimed=args.claim,
        fresh_machine=args.fresh_machine,
    )
    record, place = rerun(args.submission, options, _progress)
    if args.json:
        print(json.dumps(rerun_record.as_json(record), indent=2, allow_nan=False))
    else:
        print(rerun_record.table(record), file=sys.stdout if record.status == "ok" else sys.stderr, flush=True)
    if place:
        _progress(f"the record is {place}")
    if record.status == "failed":
        return EnvironmentBroken.exit_code
    return Refused.exit_code if record.verdict is None or record.verdict.status in verdict.FAILING else 0


def _progress(line: str) -> None:
    print(f"pgolf: {printable(line)}", file=sys.stderr, flush=True)
