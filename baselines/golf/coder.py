"""The weights as bytes: integer codes, entropy-coded group by group, and a few fp16 numbers.

    8 bytes   lengths of the header and of the models, little-endian, 4 bytes each
    header    JSON: {"config": {...}, "coded": [[name, [R, C], step, least, most, least, most], ...],
              "plain": [[name, [sizes]], ...]}
    models    one byte per possible code: the logarithm of how often it occurs
    halves    fp16 numbers of the plain tensors; high bytes first, then low ones
    codes     one range-coded stream (constriction) of 32-bit words

Each coded tensor is a matrix and makes two groups: the row scales, in steps of 2^(1/8), and the codes. A weight is
code * step * 2^(scale / 8). Every group has its own model, the histogram of its codes: a code that occurs n times
among N costs log2(N / n) bits, so the size is the entropy of the codes (Huffman's successors; ANS and range coding
are arXiv:1311.2540 and Martin 1979) and no general compressor comes near it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int32]
SCALES = 8
"""Row scales per doubling."""
_FINE = 8  # steps per doubling in a model: a count is known to 4.4 %, which costs 0.0005 bits per code


@dataclass(frozen=True)
class Coded:
    """A quantised matrix: codes (R, C), row scales (R,), and the step that both multiply."""

    codes: Codes
    scales: Codes
    step: float

    def weights(self) -> npt.NDArray[np.float32]:
        """The matrix (R, C)."""
        rows = np.float32(self.step) * np.exp2(self.scales.astype(np.float32) / SCALES)
        return self.codes.astype(np.float32) * rows[:, None]


def histogram(codes: Codes) -> npt.NDArray[np.uint8]:
    """The model of codes (N,) that begin at 0: 0 where none occurs, else 1 + the logarithm of its count."""
    counts = np.bincount(codes)
    return np.where(counts, 1 + np.round(_FINE * np.log2(np.maximum(counts, 1))), 0).astype(np.uint8)


def _categorical(model: npt.NDArray[np.uint8]) -> Any:
    weights = np.where(model, np.exp2((model.astype(np.float64) - 1) / _FINE), 0)
    return constriction.stream.model.Categorical((weights / weights.sum()).astype(np.float32), perfect=False)


def encode(groups: list[Codes]) -> tuple[list[npt.NDArray[np.uint8]], bytes]:
    """Models and stream of groups of codes that begin at 0."""
    coder = constriction.stream.queue.RangeEncoder()
    models = [histogram(codes) for codes in groups]
    for codes, model in zip(groups, models, strict=True):
        if len(model) > 1:  # else there is only one code, and nothing to say
            coder.encode(codes, _categorical(model))
    return models, coder.get_compressed().astype("<u4").tobytes()


class Reader:
    """Takes the groups from a stream again, in order."""

    def __init__(self, stream: bytes) -> None:
        self.coder = constriction.stream.queue.RangeDecoder(np.frombuffer(stream, "<u4").astype(np.uint32))

    def take(self, model: npt.NDArray[np.uint8], size: int) -> Codes:
        """The next group, of `size` codes."""
        return self.coder.decode(_categorical(model), size) if len(model) > 1 else np.zeros(size, np.int32)


def dumps(config: Mapping[str, Any], coded: Mapping[str, Coded], plain: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Model shape and tensors as bytes (see above)."""
    header: dict[str, Any] = {"config": dict(config), "coded": [], "plain": []}
    groups: list[Codes] = []
    for name, matrix in coded.items():
        entry: list[Any] = [name, list(matrix.codes.shape), matrix.step]
        for codes in (matrix.scales, matrix.codes):
            least, most = int(codes.min()), int(codes.max())
            entry += [least, most]
            groups.append((codes.ravel() - least).astype(np.int32))
        header["coded"].append(entry)
    header["plain"] = [[name, list(tensor.shape)] for name, tensor in plain.items()]
    models, stream = encode(groups)
    table = b"".join(model.tobytes() for model in models)
    numbers = [tensor.astype("<f2").ravel() for tensor in plain.values()]
    halves = np.concatenate([np.empty(0, "<f2"), *numbers]).view(np.uint8).reshape(-1, 2)
    text = json.dumps(header, separators=(",", ":")).encode()
    lengths = np.array([len(text), len(table)], dtype="<u4").tobytes()
    return b"".join([lengths, text, table, halves[:, ::-1].T.tobytes(), stream])


def loads(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
    """Model shape and tensors in fp32. Raises ValueError when bytes are missing."""
    if len(data) < 8:
        raise ValueError(f"weights: {len(data)} bytes are no header")
    n_text, n_table = np.frombuffer(data, "<u4", 2).tolist()
    if len(data) < 8 + n_text + n_table:
        raise ValueError(f"weights: {len(data)} bytes end inside the header")
    header = json.loads(data[8 : 8 + n_text])
    table = np.frombuffer(data, np.uint8, n_table, 8 + n_text)
    halves_at = 8 + n_text + n_table
    n_halves = sum(prod(shape) for _, shape in header["plain"])
    stream_at = halves_at + 2 * n_halves
    if len(data) < stream_at or (len(data) - stream_at) % 4:
        raise ValueError(f"weights: {len(data)} bytes do not hold what the header announces")
    planes = np.frombuffer(data, np.uint8, 2 * n_halves, halves_at).reshape(2, -1)
    halves = np.ascontiguousarray(planes[::-1].T).view("<f2").ravel().astype(np.float32)

    reader, groups = Reader(data[stream_at:]), []
    for _, (rows, columns), _, *ranges in header["coded"]:
        for size, least, most in ((rows, *ranges[:2]), (rows * columns, *ranges[2:])):
            groups.append(reader.take(table[: most - least + 1], size) + least)
            table = table[most - least + 1 :]

    tensors: dict[str, npt.NDArray[np.float32]] = {}
    for (name, shape, step, *_), scales, codes in zip(header["coded"], groups[::2], groups[1::2], strict=True):
        tensors[name] = Coded(codes.reshape(shape), scales, step).weights()
    for name, shape in header["plain"]:
        tensors[name], halves = halves[: prod(shape)].reshape(shape).copy(), halves[prod(shape) :]
    return header["config"], tensors


def entropy_bytes(codes: Codes) -> float:
    """The empirical zeroth-order entropy of codes, in bytes: what no code of single symbols can beat."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)
