"""How dense the coded weights are: against the entropy of the codes and against general compressors.

Without an artifact of the golf baseline this takes untrained weights of its main shape, in steps that fill 16 MB.
"""

import argparse
import lzma
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from peers import brotli_11

from pgolf import rules
from pgolf.artifact import read
from pgolf.errors import UsageError
from pgolf.submission.modules import loaded

GOLF = Path(__file__).parents[2] / "baselines" / "golf"
MAIN_ROOM = 15_800_000  # of the main track's limit, for the weights


def bench_density(args: argparse.Namespace) -> None:
    """Print the table."""
    with loaded(GOLF, names=("coder", "model", "quant")) as golf:
        report(golf.coder, main_shape(golf) if args.artifact is None else weights_of(args.artifact))


def weights_of(path: Path) -> bytes:
    """The coded weights of an artifact."""
    members = read(path, rules.ARTIFACT_BYTES).members
    if members.get("coder.py") != (GOLF / "coder.py").read_bytes():
        raise UsageError(f"{path}: not an artifact of this baselines/golf")
    return members["weights.bin"]


def main_shape(golf: Any) -> bytes:
    """Gaussian weights of the main preset's shapes, rows of different spread, quantised to MAIN_ROOM bytes."""
    with torch.device("meta"):
        shapes = {
            n: t.shape for n, t in golf.model.GPT(golf.model.GPTConfig()).state_dict().items() if n[-6:] == "weight"
        }
    torch.manual_seed(0)
    weights = {n: torch.randn(shape) * torch.rand(shape[0], 1).add(0.5) for n, shape in shapes.items()}
    count = sum(w.numel() for w in weights.values())

    def dump(step: float) -> bytes:
        return bytes(golf.coder.dumps({}, golf.quant.quantize(weights, {}, step), {}))

    return bytes(golf.quant.fit(dump, MAIN_ROOM, count)[0])


def report(coder: Any, data: bytes) -> None:
    """Sizes on one line each, smallest first, and the time of decoding."""
    start = time.perf_counter()
    _, coded, plain = coder.parse(data)
    seconds = time.perf_counter() - start
    raw = b"".join(narrow(part) for c in coded.values() for part in (c.codes, c.scales))
    count = sum(c.codes.size for c in coded.values())
    entropy = sum(map(entropy_bytes, coder.split(coded)))
    own = len(data) - 2 * sum(t.size for t in plain.values())
    sizes = {
        "entropy of each group": entropy,
        "coder.py, models and header included": own,
        "zstd 22": len(zstandard.ZstdCompressor(22).compress(raw)),
        "brotli 11": brotli_11(raw),
        "lzma 9e": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
        "zlib 9": len(zlib.compress(raw, 9)),
    }
    print(f"{count:,} weights in {len(coded)} matrices, {8 * own / count:.3f} bits each")
    for name, size in sizes.items():
        print(f"| {name} | {size:,.0f} | {size / entropy:.4f} |")
    print(f"decoded in {seconds:.2f} s, {len(data) / seconds / 1e6:.1f} MB/s")


def entropy_bytes(codes: npt.NDArray[np.int32]) -> float:
    """The empirical zeroth-order entropy of codes, in bytes: what no code of single symbols can beat."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def narrow(codes: npt.NDArray[np.int32]) -> bytes:
    """Codes as int8 where they fit, else as all low bytes before all high ones, to a compressor's liking."""
    if np.abs(codes).max() < 128:
        return codes.astype(np.int8).tobytes()
    return codes.astype("<i2").ravel().view(np.uint8).reshape(-1, 2).T.tobytes()
