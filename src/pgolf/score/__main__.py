"""`python -m pgolf.score artifact.zst`."""

import sys

from pgolf.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
