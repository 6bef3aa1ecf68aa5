"""What the commands of `pgolf` share: how each is declared, arguments, printed records, exit codes."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pgolf.errors import EnvironmentBroken, Refused
from pgolf.files import printable
from pgolf.sandbox import box

OUTPUT_LINES = 60  # of a sandbox, that --verbose shows
OUTPUT_COLUMNS = 400

Commands = Callable[..., argparse.ArgumentParser]
"""The `add_parser` of what `add_subparsers` returns."""


def add_command(
    commands: Commands,
    name: str,
    summary: str,
    description: str,
    example: str,
    run: Callable[[argparse.Namespace], int] | None = None,
) -> argparse.ArgumentParser:
    """Add a command that calls `run`; None: it has commands of its own."""
    parser = commands(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def note(sentence: str) -> None:
    """Say something beside the result."""
    print(f"pgolf: {sentence}", file=sys.stderr)


def add_text(parser: argparse.ArgumentParser) -> None:
    """How the text is found in a source of documents."""
    parser.add_argument("--field", default="text", help="where a row or JSON line has its text (default: %(default)s)")
    parser.add_argument("--lines", action="store_true", help="a text file holds a document per line, not just one")
    parser.add_argument("--config", help="configuration of a hub dataset")
    parser.add_argument("--split", default="train", help="its split (default: %(default)s)")


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="dataset folder (default: the only one in ./data)")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda (all GPUs), cuda:N (default: what is there)")


def add_sandbox(parser: argparse.ArgumentParser, practice: str = "") -> None:
    """Where and how the submission runs; `practice` says what the score is without sandbox."""
    add_device(parser)
    parser.add_argument("--no-sandbox", action="store_true", help=f"run code you trust without sandbox{practice}")


def add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verbose", action="store_true", help="show the end of what the code printed in the sandbox, and its traceback"
    )


@contextmanager
def shown_output(verbose: bool) -> Iterator[None]:
    """With `verbose`, the end of what is printed in each sandbox goes to stderr: escaped, since it is hostile."""
    previous = box.show_output.set(_print_output) if verbose else None
    try:
        yield
    finally:
        if previous:
            box.show_output.reset(previous)


def _print_output(role: str, output: str) -> None:
    for line in output.splitlines()[-OUTPUT_LINES:]:
        print(f"{role} | {printable(line[:OUTPUT_COLUMNS])}", file=sys.stderr)


def print_record(result: Mapping[str, Any], table: str, as_json: bool) -> None:
    """The record itself is on disk by now: a terminal that cannot show a name loses nothing."""
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))
    else:
        print(table, file=sys.stdout if result["status"] == "ok" else sys.stderr, flush=True)


def exit_code(status: str) -> int:
    return {"ok": 0, "refused": Refused.exit_code, "failed": EnvironmentBroken.exit_code}[status]
