"""How every command of `pgolf` is declared: one line in the overview, a description, an example."""

import argparse
from collections.abc import Callable

Commands = argparse._SubParsersAction  # argparse has no public name for it


def add_command(
    commands: "Commands[argparse.ArgumentParser]",
    name: str,
    summary: str,
    description: str,
    example: str,
    run: Callable[[argparse.Namespace], int] | None = None,
) -> argparse.ArgumentParser:
    """Add a command that calls `run`; None: it has commands of its own."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser
