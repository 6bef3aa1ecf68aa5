"""`python -m pgolf.score artifact.zst`."""

import sys

from pgolf.cli import main

sys.exit(main(["score", *sys.argv[1:]]))
