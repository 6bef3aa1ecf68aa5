"""The codes in a baseline's weights as an .npz, for `pgolf inspect --tensors`.

Only the code of this checkout runs, never that of the artifact.
"""

import argparse
import io
import json
from math import prod
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from density import GOLF

from pgolf import rules
from pgolf.artifact import read
from pgolf.errors import UsageError
from pgolf.files import write_atomically
from pgolf.submission.modules import loaded
from pgolf.submission.tensors import BITS

Arrays = dict[str, npt.NDArray[Any]]


def write_codes(args: argparse.Namespace) -> None:
    """Write the arrays of `args.artifact` to `args.out`."""
    members = read(args.artifact, rules.ARTIFACT_BYTES).members
    data = members.get("weights.bin", b"")
    if "coder.py" in members:
        with loaded(GOLF, names=("coder",)) as golf:
            if members["coder.py"] != (GOLF / "coder.py").read_bytes():
                raise UsageError(f"{args.artifact}: has another coder.py than {GOLF}")
            arrays = golf_codes(golf.coder, data)
    else:
        try:
            arrays = naive_codes(data)
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{args.artifact}: not an artifact of baselines/naive or baselines/golf") from None
    file = io.BytesIO()
    np.savez_compressed(file, **cast("dict[str, Any]", arrays))
    write_atomically(args.out, file.getvalue())
    print(f"{args.out}: {sum(not name.startswith(BITS) for name in arrays)} tensors")


def golf_codes(coder: Any, data: bytes) -> Arrays:
    """Of each matrix the codes, and their bits under the model of the rows of their kind."""
    _, coded, plain = coder.parse(data)
    matrices = {name: matrix.codes for name, matrix in coded.items()}
    coded_as = {name: coder.as_coded(codes) for name, codes in matrices.items()}
    bits = dict.fromkeys(matrices, 0.0)
    for kind in np.unique(np.concatenate([kinds for _, kinds in coded_as.values()])):
        parts = {name: codes[kinds == kind].ravel() for name, (codes, kinds) in coded_as.items()}
        low = min(part.min() for part in parts.values() if len(part))
        model = coder.histogram(np.concatenate(list(parts.values())) - low)
        weights = np.where(model, 2.0 ** ((model.astype(float) - 1) / 8), 0)
        for name, part in parts.items():
            bits[name] -= float(np.log2(weights[part - low] / weights.sum()).sum())
    halves = {name: tensor.astype(np.float16) for name, tensor in plain.items()}
    sizes = {BITS + name: np.array(16.0 * tensor.size) for name, tensor in halves.items()}
    return {**matrices, **halves, **{BITS + name: np.array(size) for name, size in bits.items()}, **sizes}


def naive_codes(data: bytes) -> Arrays:
    """The codes of the matrices, which stand at the end of the file."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    matrices = {name: shape for name, shape in header["tensors"] if name.endswith("weight")}
    codes = np.frombuffer(data, np.int8)[-sum(map(prod, matrices.values())) :]
    found = {}
    for name, shape in matrices.items():
        found[name], codes = codes[: prod(shape)].reshape(shape), codes[prod(shape) :]
    return found
