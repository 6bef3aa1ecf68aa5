"""Repack a trained artifact with the learning predictor beside this file; all its members stay as they are.

python baselines/adaptive/pack.py naive.zst --out adaptive.zst
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pgolf import rules
from pgolf.artifact import MANIFEST, pack, read
from pgolf.errors import PgolfError, UsageError

PREDICTOR = Path(__file__).with_name("predict.py")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Give a trained naive artifact a predictor that learns as it reads.")
    parser.add_argument("artifact", type=Path, help="what baselines/naive/train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("adaptive.zst"), metavar="FILE")
    args = parser.parse_args(argv)
    try:
        size = repack(args.artifact, args.out)
    except PgolfError as error:
        print(f"pack.py: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.out}: {size:,} bytes")
    return 0


def repack(source: Path, out: Path) -> int:
    """Write the artifact at `source` as `out`, with its predict.py as naive.py; returns its size in bytes."""
    artifact = read(source, rules.ARTIFACT_BYTES)
    if artifact.manifest.form != "step" or "naive.py" in artifact.members:
        raise UsageError(f"{source}: not an artifact of baselines/naive/train.py")
    members = dict(artifact.members)
    manifest = json.loads(members[MANIFEST]) | {"name": "adaptive baseline"}
    members |= {
        MANIFEST: json.dumps(manifest, indent=1).encode(),
        "naive.py": members["predict.py"],
        "predict.py": PREDICTOR.read_bytes(),
    }
    return pack(members, out, rules.track(artifact.manifest.track).artifact_bytes)


if __name__ == "__main__":
    sys.exit(main())
