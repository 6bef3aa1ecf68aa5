"""The `pgolf` command."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from pgolf import __version__
from pgolf.cli import contest, data, proof, score, submission, tokenizer
from pgolf.errors import EnvironmentBroken, PgolfError
from pgolf.files import printable
from pgolf.machine import exit_on_signals


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 refused, 2 wrong usage, 3 broken environment."""
    exit_on_signals()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a name is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    args = command_line().parse_args(argv)
    try:
        return int(args.run(args))
    except PgolfError as error:
        print(f"pgolf: {printable(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("pgolf: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"pgolf: {printable(error.filename or 'input or output failed')}: {error.strerror}", file=sys.stderr)
        return EnvironmentBroken.exit_code


def command_line() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="pgolf",
        description="Parameter Golf: train under a clock, pack under a byte limit, score without trust.",
        epilog="example:\n  pgolf data demo && python baselines/naive/train.py --data data/demo --track laptop "
        "--out runs/a.zst && pgolf score runs/a.zst",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="command", required=True).add_parser
    data.add_data(commands)
    tokenizer.add_tokenizer(commands)
    submission.add_new(commands)
    submission.add_import(commands)
    submission.add_pack(commands)
    submission.add_check(commands)
    submission.add_inspect(commands)
    submission.add_plot(commands)
    submission.add_ablate(commands)
    submission.add_try(commands)
    contest.add_diff(commands)
    contest.add_rerun(commands)
    score.add_score(commands)
    proof.add_compress(commands)
    proof.add_decompress(commands)
    proof.add_prove(commands)
    score.add_doctor(commands)
    parser.add_argument("--version", action="version", version=f"pgolf {__version__}")
    return parser
