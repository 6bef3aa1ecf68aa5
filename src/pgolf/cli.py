"""The `pgolf` command."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pgolf import artifact, record, rules
from pgolf.data import cli as data_cli
from pgolf.data.dataset import default_dataset, open_dataset
from pgolf.errors import EnvironmentBroken, PgolfError, Refused, UsageError
from pgolf.score import score

Commands = argparse._SubParsersAction  # argparse has no public name for it


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
    _add_score(commands)
    return parser


def _command(
    commands: "Commands[argparse.ArgumentParser]",
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    description: str,
    epilog: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_pack(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands,
        "pack",
        _pack,
        "pack a submission's folder into one artifact",
        "Pack a folder with submission.json, predict.py, train.py, weights and tokenizer into one artifact; the same "
        "files give the same bytes.",
        "example:\n  pgolf pack my-entry/ -o artifact.zst",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("artifact.zst"))


def _pack(args: argparse.Namespace) -> int:
    limit = max(track.artifact_bytes for track in rules.TRACKS.values())
    size = artifact.pack(artifact.folder_members(args.folder), args.out, limit)
    print(f"{args.out}: {size:,} bytes")
    return 0


def _add_score(commands: "Commands[argparse.ArgumentParser]") -> None:
    parser = _command(
        commands,
        "score",
        _score,
        "check an artifact and compute its bits per byte",
        "Check an artifact against the limits of its track and compute its bits per byte, in a sandbox; then audit it: "
        "a sample of its tokens is scored again without their future.",
        "example:\n  python -m pgolf.score artifact.zst --data data/demo\n\n"
        "exit codes: 0 scored, 1 the submission is refused, 2 wrong usage, 3 this machine or the data is broken",
    )
    parser.add_argument("artifact", type=Path, help="the submission: one .zst file")
    parser.add_argument("--data", type=Path, help="dataset folder (default: the only one in ./data)")
    parser.add_argument("--track", choices=rules.TRACKS, help="score under this track's limits, not its own")
    parser.add_argument("--device", default="auto", help="cpu, cuda (all GPUs), cuda:N (default: what is there)")
    parser.add_argument("--documents", type=_positive, metavar="N", help="only the first N: a trial, not eligible")
    parser.add_argument("--no-sandbox", action="store_true", help="run code you trust unboxed: not eligible")
    parser.add_argument("--no-audit", action="store_true", help="skip the blind audit: not eligible")
    parser.add_argument(
        "--audit-seed", type=int, metavar="N", help="repeat an audit (default: a secret seed, told by the record)"
    )
    parser.add_argument("--out", type=Path, help="the record (default: artifact.score.json beside the artifact)")
    parser.add_argument("--json", action="store_true", help="print the record to standard output")


def _score(args: argparse.Namespace) -> int:
    """Score, write the record, print it."""
    data = args.data or default_dataset()
    out = args.out or args.artifact.with_suffix(".score.json")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder for the record")
    open_dataset(data)
    result = score(
        args.artifact,
        data,
        args.track,
        args.device,
        args.documents,
        isolated=not args.no_sandbox,
        audited=not args.no_audit,
        audit_seed=args.audit_seed,
    )
    record.write(result, out)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        print(record.table(result), file=sys.stdout if result["status"] == "ok" else sys.stderr)
    return {"ok": 0, "refused": Refused.exit_code, "failed": EnvironmentBroken.exit_code}[result["status"]]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
