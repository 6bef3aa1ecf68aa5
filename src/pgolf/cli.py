"""The `pgolf` command."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from pgolf import artifact, rules, score
from pgolf.data import cli as data_cli
from pgolf.errors import PgolfError

_Commands = argparse._SubParsersAction  # argparse has no public name for it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 refused, 2 wrong usage, 3 broken environment."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that boxes are torn down
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except PgolfError as error:
        print(f"pgolf: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pgolf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf",
        description="Parameter Golf: train under a clock, pack under a byte limit, score without trust.",
        epilog="example:\n  pgolf data demo && python baselines/naive/train.py --data data/demo --track laptop "
        "--out runs/a.zst && pgolf score runs/a.zst",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", required=True)
    data_cli.add_parser(commands)
    _add_pack(commands)
    scorer = commands.add_parser(
        "score",
        help="check an artifact and compute its bits per byte",
        description=score.DESCRIPTION,
        epilog=score.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    score.add_arguments(scorer)
    return parser


def _add_pack(commands: "_Commands[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "pack",
        help="pack a submission's folder into one artifact",
        description="Pack a folder with submission.json, predict.py, train.py, weights and tokenizer into one "
        "artifact; the same files give the same bytes.",
        epilog="example:\n  pgolf pack my-entry/ -o artifact.zst",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("artifact.zst"))
    parser.set_defaults(run=_pack)


def _pack(args: argparse.Namespace) -> int:
    limit = max(track.artifact_bytes for track in rules.TRACKS.values())
    size = artifact.pack(artifact.folder_members(args.folder), args.out, limit)
    print(f"{args.out}: {size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
