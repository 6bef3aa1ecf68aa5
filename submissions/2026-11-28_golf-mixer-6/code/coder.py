"""The weights as bytes: integer codes, entropy-coded group by group, and a few fp16 numbers.

    4 bytes   length of the head, little-endian
    head      deflated (zlib): a line of JSON, {"config": {...}, "coded": [[name, [R, C], step], ...],
              "models": [[lowest code, length], ...], "plain": [[name, [sizes]], ...]}; then the models,
              one byte per possible code: the logarithm of how often it occurs
    halves    the plain tensors in fp16
    codes     one range-coded stream (constriction) of 32-bit words

A coded tensor is a matrix; a weight is code * step * 2^(scale / 8) with the scale of its row. A row that is much
closer to the row before it than to zero is coded as the difference: the embeddings of pieces that training never saw
are almost equal. Rows of one kind, codes or differences that spread alike, are coded together, whatever matrix they
are from: first come the scales of all rows, then their kinds, then the codes of all rows of each kind. Each of these
groups has its own model, the histogram of its codes: a code that occurs n times among N costs log2(N / n) bits, so the
size is the entropy of the codes, and no general compressor comes near it.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.int32]
DIFFERENCE = 64  # above all spreads
SCALES = 8
"""Row scales per doubling."""
_FINE = 8  # steps per doubling in a model: a count is known to 4.4 %, which costs 0.0005 bits per code
_EIGHTHS = np.array([65536, 71468, 77936, 84990, 92682, 101070, 110218, 120194])  # 2^16 * 2^(k / 8)


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
    # In whole numbers up to the one division: encoder and decoder may be different machines.
    octave, eighth = np.divmod(model.astype(np.int64) - 1, _FINE)
    weights = np.where(model, _EIGHTHS[eighth] << octave.clip(0), 0)
    return constriction.stream.model.Categorical((weights / weights.sum()).astype(np.float32), perfect=False)


def as_coded(codes: Codes) -> tuple[Codes, Codes]:
    """Codes (R, C) as they are coded, less the row before where that leaves less than half the power; their kinds (R,).

    The kind of a row is the logarithm of its root mean square, two per doubling, -16 where all are 0, and DIFFERENCE
    more where it is a difference.
    """
    less = np.diff(codes, axis=0, prepend=np.int32(0))
    chosen = 2 * np.square(less, dtype=np.float64).sum(1) < np.square(codes, dtype=np.float64).sum(1)
    coded = np.where(chosen[:, None], less, codes)
    rms: npt.NDArray[np.float64] = np.sqrt(np.square(coded, dtype=np.float64).mean(1))
    spreads = np.round(2 * np.log2(np.maximum(rms, 2**-8)))
    return coded, (spreads + DIFFERENCE * chosen).astype(np.int32)


def split(coded: Mapping[str, Coded]) -> list[Codes]:
    """The groups: scales of all rows, their kinds, and the codes of all rows of each kind, in rising order."""
    pairs = [(np.empty((0, 1), np.int32), np.empty(0, np.int32)), *(as_coded(c.codes) for c in coded.values())]
    by_row = np.concatenate([kinds for _, kinds in pairs])
    by_code = np.repeat(by_row, np.concatenate([np.full(len(codes), codes.shape[1]) for codes, _ in pairs]))
    codes = np.concatenate([codes.ravel() for codes, _ in pairs])
    scales = np.concatenate([np.empty(0, np.int32), *(c.scales for c in coded.values())])
    return [scales, by_row, *(codes[by_code == kind] for kind in np.unique(by_row))]


def dumps(config: Mapping[str, Any], coded: Mapping[str, Coded], plain: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Model shape and tensors as bytes (see above)."""
    encoder, models = constriction.stream.queue.RangeEncoder(), []
    for group in split(coded):
        low = int(group.min(initial=0))
        models.append((low, model := histogram(group - low)))
        if len(model) > 1:  # else there is only one code, and nothing to say
            encoder.encode(group - low, _categorical(model))
    header = {
        "config": dict(config),
        "coded": [[name, list(matrix.codes.shape), matrix.step] for name, matrix in coded.items()],
        "models": [[low, len(model)] for low, model in models],
        "plain": [[name, list(tensor.shape)] for name, tensor in plain.items()],
    }
    line = json.dumps(header, separators=(",", ":")).encode() + b"\n"
    head = zlib.compress(b"".join([line, *(model.tobytes() for _, model in models)]), 9)
    halves = (tensor.astype("<f2").tobytes() for tensor in plain.values())
    stream = encoder.get_compressed().astype("<u4")
    return b"".join([len(head).to_bytes(4, "little"), head, *halves, stream.tobytes()])


def parse(data: bytes) -> tuple[dict[str, Any], dict[str, Coded], dict[str, npt.NDArray[np.float32]]]:
    """What `dumps` was given. Raises ValueError when the sizes do not add up; a stream cut by whole words passes."""
    halves_at = 4 + int.from_bytes(data[:4], "little")
    try:
        line, _, table = zlib.decompress(data[4:halves_at]).partition(b"\n")
    except zlib.error as error:
        raise ValueError(f"weights: the head is damaged ({error})") from None
    header = json.loads(line)
    n_halves = sum(prod(shape) for _, shape in header["plain"])
    stream_at = halves_at + 2 * n_halves
    if len(data) < stream_at or (len(data) - stream_at) % 4:
        raise ValueError(f"weights: {len(data)} bytes do not hold what the head announces")
    halves, plain = np.frombuffer(data, "<f2", n_halves, halves_at).astype(np.float32), {}
    for name, shape in header["plain"]:
        plain[name], halves = halves[: prod(shape)].reshape(shape).copy(), halves[prod(shape) :]

    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(data[stream_at:], "<u4").astype(np.uint32))
    models = iter(header["models"])

    def take(size: int | np.integer[Any]) -> Codes:  # the next group
        nonlocal table
        low, length = next(models)
        model, table = np.frombuffer(table[:length], np.uint8), table[length:]
        codes: Codes = decoder.decode(_categorical(model), int(size)) if length > 1 else np.zeros(size, np.int32)
        return codes + np.int32(low)

    shapes = np.array([shape for _, shape, _ in header["coded"]], np.int64).reshape(-1, 2)
    scales, by_row = take(shapes[:, 0].sum()), take(shapes[:, 0].sum())
    by_code = np.repeat(by_row, shapes[:, 1].repeat(shapes[:, 0]))
    codes = np.empty(len(by_code), np.int32)
    for kind in np.unique(by_row):
        of_kind = by_code == kind
        codes[of_kind] = take(np.count_nonzero(of_kind))
    coded = {}
    for name, (rows, columns), step in header["coded"]:
        own, codes = np.split(codes, [rows * columns])
        (scale, scales), (kinds, by_row) = np.split(scales, [rows]), np.split(by_row, [rows])
        own = own.reshape(rows, columns)
        for row in np.flatnonzero(kinds > DIFFERENCE // 2):
            own[row] += own[row - 1]
        coded[name] = Coded(own, scale, step)
    return header["config"], coded, plain


def loads(data: bytes) -> tuple[dict[str, Any], dict[str, npt.NDArray[np.float32]]]:
    """Model shape and tensors in fp32 (see `parse`)."""
    config, coded, plain = parse(data)
    return config, {name: matrix.weights() for name, matrix in coded.items()} | plain
