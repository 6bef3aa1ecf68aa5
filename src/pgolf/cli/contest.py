"""`pgolf diff`: commands that compare submissions."""

import argparse
import json
import sys
from pathlib import Path

from pgolf.cli.command import Commands, add_command
from pgolf.contest import compare


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
    print(json.dumps(compare.as_json(result), indent=2) if args.json else compare.table(result))
    if args.plot and (fault := compare.plot(result, args.plot)):
        print(f"pgolf: {fault}", file=sys.stderr)
    return 0
