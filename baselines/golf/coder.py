"""The weights as bytes: integer codes, entropy-coded group by group, and a few fp16 numbers.

    8 bytes   lengths of the header and of the models, little-endian, 4 bytes each
    header    JSON: {"config": {...}, "coded": [[name, [R, C], step], ...], "models": [[least code, length], ...],
              "plain": [[name, [sizes]], ...]}
    models    one byte per possible code: the logarithm of how often it occurs
    halves    fp16 numbers of the plain tensors; high bytes first, then low ones
    codes     one range-coded stream (constriction) of 32-bit words

A coded tensor is a matrix; a weight is code * step * 2^(scale / 8) with the scale of its row. The matrices of one role,
such as all `blocks.*.mlp.up.weight`, are coded together in four groups: row scales; for each row, whether its codes
are given as differences from the row before (tokens that never occur have rows nearly alike); the codes of rows
given directly; the differences. Every group has its own model, the histogram of its codes: a code that occurs n times
among N costs log2(N / n) bits, so the size is the entropy of the codes, and no general compressor comes near it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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
    counts = np.bincount(codes) if len(codes) else np.empty(0)
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


def roles(names: Iterable[str]) -> list[list[str]]:
    """Names that differ in their numbers only, together."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    return list(found.values())


def split(matrices: Sequence[Coded]) -> list[Codes]:
    """The four groups of matrices of one role."""
    scales, flags, direct, differences = [], [], [], []
    for matrix in matrices:
        change = np.diff(matrix.codes, axis=0, prepend=matrix.codes[:1] * 0)
        flag = np.log2(1 + np.abs(change)).sum(1) < 0.9 * np.log2(1 + np.abs(matrix.codes)).sum(1)
        scales.append(matrix.scales)
        flags.append(flag.astype(np.int32))
        direct.append(matrix.codes[~flag].ravel())
        differences.append(change[flag].ravel())
    return [np.concatenate(parts) for parts in (scales, flags, direct, differences)]


def dumps(config: Mapping[str, Any], coded: Mapping[str, Coded], plain: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Model shape and tensors as bytes (see above)."""
    groups = [group for names in roles(coded) for group in split([coded[name] for name in names])]
    leasts = [int(group.min(initial=0)) for group in groups]
    models, stream = encode([group - least for group, least in zip(groups, leasts, strict=True)])
    header = {
        "config": dict(config),
        "coded": [[name, list(matrix.codes.shape), matrix.step] for name, matrix in coded.items()],
        "models": [[least, len(model)] for least, model in zip(leasts, models, strict=True)],
        "plain": [[name, list(tensor.shape)] for name, tensor in plain.items()],
    }
    table = b"".join(model.tobytes() for model in models)
    numbers = [tensor.astype("<f2").ravel() for tensor in plain.values()]
    halves = np.concatenate([np.empty(0, "<f2"), *numbers]).view(np.uint8).reshape(-1, 2)
    text = json.dumps(header, separators=(",", ":")).encode()
    lengths = np.array([len(text), len(table)], dtype="<u4").tobytes()
    return b"".join([lengths, text, table, halves[:, ::-1].T.tobytes(), stream])


def parse(data: bytes) -> tuple[dict[str, Any], dict[str, Coded], dict[str, npt.NDArray[np.float32]]]:
    """What `dumps` was given. Raises ValueError when bytes are missing."""
    if len(data) < 8:
        raise ValueError(f"weights: {len(data)} bytes are no header")
    n_text, n_table = np.frombuffer(data, "<u4", 2).tolist()
    halves_at = 8 + n_text + n_table
    if len(data) < halves_at:
        raise ValueError(f"weights: {len(data)} bytes end inside the header")
    header = json.loads(data[8 : 8 + n_text])
    n_halves = sum(prod(shape) for _, shape in header["plain"])
    stream_at = halves_at + 2 * n_halves
    if len(data) < stream_at or (len(data) - stream_at) % 4:
        raise ValueError(f"weights: {len(data)} bytes do not hold what the header announces")
    planes = np.frombuffer(data, np.uint8, 2 * n_halves, halves_at).reshape(2, -1)
    halves = np.ascontiguousarray(planes[::-1].T).view("<f2").ravel().astype(np.float32)

    reader, at, models = Reader(data[stream_at:]), 8 + n_text, iter(header["models"])

    def take(size: int) -> Codes:
        nonlocal at
        least, length = next(models)
        at += length
        return reader.take(np.frombuffer(data, np.uint8, length, at - length), size) + least

    shapes = {name: (rows, columns, step) for name, (rows, columns), step in header["coded"]}
    coded: dict[str, Coded] = {}
    for names in roles(shapes):
        rows, columns, _ = zip(*(shapes[name] for name in names), strict=True)
        scales, flags = take(sum(rows)), take(sum(rows)).astype(bool)
        widths = np.repeat(columns, rows)
        direct, differences = take(int(widths[~flags].sum())), take(int(widths[flags].sum()))
        for name in names:
            n_rows, n_columns, step = shapes[name]
            flag, flags = flags[:n_rows], flags[n_rows:]
            codes = np.empty((n_rows, n_columns), np.int32)
            n_direct, n_different = codes[~flag].size, codes[flag].size
            codes[~flag] = direct[:n_direct].reshape(-1, n_columns)
            codes[flag] = differences[:n_different].reshape(-1, n_columns)
            direct, differences = direct[n_direct:], differences[n_different:]
            for row in np.flatnonzero(flag):
                codes[row] += codes[row - 1]
            coded[name], scales = Coded(codes, scales[:n_rows], step), scales[n_rows:]
    plain = {}
    for name, shape in header["plain"]:
        plain[name], halves = halves[: prod(shape)].reshape(shape).copy(), halves[prod(shape) :]
    return header["config"], {name: coded[name] for name in shapes}, plain


def loads(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
    """Model shape and tensors in fp32. Raises ValueError when bytes are missing."""
    config, coded, plain = parse(data)
    return config, {name: matrix.weights() for name, matrix in coded.items()} | plain


def entropy_bytes(codes: Codes) -> float:
    """The empirical zeroth-order entropy of codes, in bytes: what no code of single symbols can beat."""
    counts = np.unique(codes, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)
