"""`python -m pgolf`, and what the `pgolf` command runs."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. The imports, which take seconds, end without a traceback on Ctrl-C too."""
    try:
        from pgolf.cli import main as cli

        return cli.main(argv)
    except KeyboardInterrupt:
        print("pgolf: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
