"""The weights as bytes: matrices as int8 with one step size per row, all else as fp16.

    8 bytes   length of the header, little-endian
    header    JSON: {"config": {...}, "tensors": [[name, [sizes]], ...]}
    halves    fp16 numbers: the step sizes of all matrices, then all other tensors; high bytes first, then low ones
    codes     int8, matrix by matrix, row by row

Names that end in "weight" are matrices. High bytes lie together, and so do codes, because like bytes compress.
"""

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVELS = 127
FINEST = 32
"""Steps per root mean square of a row, at most. With 127 steps to its largest weight an evenly spread row,
which is what an untrained one is, would cost 8 bits per weight; like this it costs 7."""


def quantize(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (R, C) int8 and step sizes (R,) fp16 of a matrix (R, C); no weight moves by more than half a step."""
    matrix = matrix.detach().float().cpu()
    step = torch.maximum(matrix.abs().amax(1) / LEVELS, matrix.square().mean(1).sqrt() / FINEST)
    step = step.half().clamp_min(torch.finfo(torch.float16).smallest_normal)
    codes = (matrix / step.float()[:, None]).round().clamp(-LEVELS, LEVELS)
    return codes.to(torch.int8), step


def dequantize(codes: Tensor, step: Tensor) -> Tensor:
    """Matrix (R, C) fp32 from codes (R, C) and step sizes (R,)."""
    return codes.float() * step.float()[:, None]


def dumps(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> bytes:
    """Model shape and weights as bytes (see above)."""
    steps, others, codes = [], [], []
    for name, tensor in state.items():
        if name.endswith("weight"):
            code, step = quantize(tensor)
            codes.append(code.numpy().tobytes())
            steps.append(step.numpy())
        else:
            others.append(tensor.detach().cpu().half().numpy().ravel())
    halves = np.concatenate([*steps, *others]).astype("<f2").view(np.uint8).reshape(-1, 2)
    tensors = [[name, list(tensor.shape)] for name, tensor in state.items()]
    header = json.dumps({"config": dict(config), "tensors": tensors}, separators=(",", ":")).encode()
    return b"".join([len(header).to_bytes(8, "little"), header, halves[:, ::-1].T.tobytes(), *codes])


def loads(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Model shape and weights in fp32. Raises ValueError when a byte is missing or left over."""
    start = 8 + int.from_bytes(data[:8], "little")
    if len(data) < start:
        raise ValueError(f"weights: {len(data)} bytes end inside the header")
    header = json.loads(data[8:start])
    tensors = {name: tuple(shape) for name, shape in header["tensors"]}
    matrices = {name: shape for name, shape in tensors.items() if name.endswith("weight")}
    n_steps = sum(shape[0] for shape in matrices.values())
    n_codes = sum(map(prod, matrices.values()))
    n_halves = n_steps + sum(map(prod, tensors.values())) - n_codes
    if len(data) != start + 2 * n_halves + n_codes:
        raise ValueError(f"weights: {len(data)} bytes where {start + 2 * n_halves + n_codes} were announced")
    planes = np.frombuffer(data, np.uint8, 2 * n_halves, start).reshape(2, -1)
    halves = torch.from_numpy(np.ascontiguousarray(planes[::-1].T).view("<f2").ravel().astype(np.float32))
    codes = torch.from_numpy(np.frombuffer(data, np.int8, n_codes, start + 2 * n_halves).copy())
    steps, others = halves[:n_steps], halves[n_steps:]
    state: dict[str, Tensor] = {}
    for name, shape in tensors.items():
        if name in matrices:
            state[name] = dequantize(codes[: prod(shape)].view(shape), steps[: shape[0]])
            codes, steps = codes[prod(shape) :], steps[shape[0] :]
        else:
            state[name], others = others[: prod(shape)].view(shape).clone(), others[prod(shape) :]
    return header["config"], state
