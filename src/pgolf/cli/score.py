"""`pgolf score`, and `pgolf doctor`: whether scores on this machine count."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from pgolf import artifact, rules
from pgolf.cli.command import (
    Commands,
    add_command,
    add_data,
    add_device,
    add_sandbox,
    add_verbose,
    exit_code,
    positive,
    print_record,
    shown_output,
)
from pgolf.data.dataset import default_dataset, open_dataset
from pgolf.errors import EnvironmentBroken, PgolfError, UsageError
from pgolf.files import beside, check_replaceable, printable
from pgolf.sandbox import lock, probe
from pgolf.score import losses, record, tokens
from pgolf.score.devices import Runtime, find_device
from pgolf.score.losses import Losses
from pgolf.score.score import Options, score
from pgolf.score.tokens import TokenLosses


def add_score(commands: Commands) -> None:
    parser = add_command(
        commands,
        "score",
        "check an artifact and compute its bits per byte",
        "Check an artifact against the limits of its track and compute its bits per byte, in a sandbox that is shown "
        "each token only after its logits have left.",
        "python -m pgolf.score artifact.zst --data data/demo\n\n"
        "exit codes: 0 scored, 1 the submission is refused, 2 wrong usage, 3 this machine or the data is broken",
        _score,
    )
    parser.add_argument("artifact", type=Path, help="the submission: one .zst file")
    add_data(parser)
    parser.add_argument("--track", choices=rules.TRACKS, help="score under this track's limits, not its own")
    parser.add_argument("--documents", type=positive, metavar="N", help="only the first N: a practice score")
    add_sandbox(parser, ": a practice score")
    add_verbose(parser)
    parser.add_argument(
        "--fresh-machine",
        action="store_true",
        help="your word that this virtual machine was made for this score and runs nothing else",
    )
    parser.add_argument(
        "--per-token", action="store_true", help="keep the log-loss of each token beside the record, for `pgolf plot`"
    )
    parser.add_argument("--out", type=Path, help="the record (default: artifact.score.json beside the artifact)")
    parser.add_argument("--json", action="store_true", help="print the record to standard output")


def _score(args: argparse.Namespace) -> int:
    """Score, write the record, print it."""
    data = args.data or default_dataset()
    out = args.out or beside(args.artifact, ".score.json")
    if out.resolve() == args.artifact.resolve():
        raise UsageError(f"{out}: the record would overwrite the artifact")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder for the record")
    dataset = open_dataset(data)
    check_replaceable(out)
    check_replaceable(losses.path(out))
    check_replaceable(tokens.path(out))
    options = Options(args.track, args.device, args.documents, not args.no_sandbox, args.fresh_machine)
    kept: list[Losses] = []
    with shown_output(args.verbose):
        result = score(args.artifact, dataset, options, kept.append)
    record.write(result, out)
    for found in kept:
        losses.write(found, losses.path(out))
        if args.per_token:
            _keep_tokens(found, args, out)
    print_record(record.as_json(result), record.table(result), args.json)
    return exit_code(result.status)


def _keep_tokens(found: Losses, args: argparse.Namespace, out: Path) -> None:
    """Write the log-loss of each token. The score stands and is written: whatever fails here only loses this file."""
    try:
        runtime = Runtime(find_device(args.device), not args.no_sandbox)
        packed = artifact.read(args.artifact, rules.ARTIFACT_BYTES)
        tokens.write(TokenLosses.of(found, packed, runtime), tokens.path(out))
    except (PgolfError, OSError) as error:
        words = error if isinstance(error, PgolfError) else f"{tokens.path(out)}: {error.strerror}"
        print(f"pgolf: the score stands, but there are no log-losses by token: {printable(words)}", file=sys.stderr)


def add_doctor(commands: Commands) -> None:
    parser = add_command(
        commands,
        "doctor",
        "say whether scores on this machine count",
        "Try everything that a counting score needs of this machine: what holds, what does not, and the remedy.",
        "pgolf doctor\n\nexit codes: 0 a score on this machine counts, 3 it does not",
        _doctor,
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the checks to standard output")


def _doctor(args: argparse.Namespace) -> int:
    """Print each check; the exit code says whether all that a score needs hold."""
    with lock.hold():
        checks = probe.report(find_device(args.device))
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2, allow_nan=False))
    else:
        for check in checks:
            word = "ok" if check.holds else "MISSING" if check.needed else "missing"
            print(f"{word:<8} {check.name:<13} {check.reason}")
            if not check.holds:
                print(f"{'':<8} {'':<13} {check.remedy}")
    return 0 if all(check.holds for check in checks if check.needed) else EnvironmentBroken.exit_code
