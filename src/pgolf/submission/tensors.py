"""Tensors in files whose format tells them by itself: .npy, .npz and safetensors. Nothing of an artifact runs.

Bits per weight are compared with the entropy of what is stored: of the values where they are integers (the codes of a
quantiser), of each byte of the weight, added up, where they are floating-point numbers. It is the zeroth-order
empirical entropy: a code that looks at one symbol at a time cannot do better, and pays for its table besides.
"""

import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pgolf import rules
from pgolf.errors import UsageError
from pgolf.score.losses import UNSOUND, read_arrays

Array = npt.NDArray[Any]

BITS = "bits:"
"""An array named `bits:NAME` holds one number: the bits that the author's coder spends on the tensor NAME."""

ROLES = ("embedding", "attention", "MLP", "norms", "other")
_NAMES = (  # the first that matches; as the common model codes name their tensors
    ("norms", r"norm|(^|\.)ln|_scale"),
    ("attention", r"att|qkv|query|[qkv]_proj|c_[qkv]\b"),
    ("MLP", r"mlp|ffn|feed_forward|(^|[._])fc|(up|down|gate)_proj"),
    ("embedding", r"embed|emb\b|wte|wpe|lm_head|unembed"),
)
_BF16: np.dtype[Any] = np.dtype("V2")  # which numpy cannot count with
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"}
_DTYPES = {**_FLOATS, **_INTEGERS, "BOOL": "u1", "BF16": "V2"}
_MOST = 100_000  # tensors in a file
_MOST_BITS = 1 << 53  # of a tensor
_HEADER_BYTES = 1 << 24  # of a safetensors header, whose JSON takes many times its size in memory
_DIMENSIONS = 64  # numpy's own limit


@dataclass(frozen=True)
class Tensor:
    """One tensor's figures."""

    name: str
    role: str
    """One of `ROLES`, guessed from the name."""
    shape: tuple[int, ...]
    dtype: str
    weights: int
    distinct: int
    """Different values."""
    entropy: float
    """Bits per weight."""
    stored: float | None
    """Bits per weight that its author's coder spends, where the file says so."""


@dataclass(frozen=True)
class Group:
    """The tensors of one role."""

    role: str
    tensors: int
    weights: int
    entropy: float
    """Bits per weight, each tensor with its own histogram."""
    stored: float | None
    """Bits per weight; None where that of a tensor is not known."""


def recognise(data: bytes) -> dict[str, Array] | None:
    """The tensors of an .npy, .npz or safetensors file by name; None: something else, or a damaged file."""
    try:
        if data[:6] == b"\x93NUMPY":
            arrays = {"": np.load(io.BytesIO(data), allow_pickle=False)}
        elif data[:4] == b"PK\x03\x04":
            arrays = read_arrays(data, rules.UNPACKED_BYTES)
        else:
            arrays = _safetensors(data)
    except (*UNSOUND, TypeError, AttributeError, OverflowError, RecursionError):
        return None
    sound = 0 < len(arrays) <= _MOST and all(isinstance(a, np.ndarray) and _is_number(a) for a in arrays.values())
    return arrays if sound else None


def _is_number(array: Array) -> bool:
    return array.dtype.kind in "iufb" or array.dtype == _BF16


def _safetensors(data: bytes) -> dict[str, Array]:
    """8 bytes length of the header, the header in JSON, then the tensors. Raises ValueError and the like."""
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 < start <= len(data):
        raise ValueError("no header")
    if start > _HEADER_BYTES:
        raise ValueError("a header of more than 16 MiB")
    header = json.loads(data[8:start])
    arrays, left = {}, len(data) - start
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape = entry["shape"]  # bounded before it is multiplied
            if len(shape) > _DIMENSIONS or not all(type(size) is int and 0 <= size <= len(data) for size in shape):
                raise ValueError(f"{name}: no shape of a tensor in this file")
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data) - start or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name}: not inside the file")
            if (left := left - (end - begin)) < 0:
                raise ValueError(f"{name}: overlaps another tensor")  # as many could, each as large as the file
            arrays[name] = np.frombuffer(data, dtype, math.prod(shape), start + begin).reshape(shape)
    return arrays


def figures(arrays: Mapping[str, Array]) -> list[Tensor]:
    """The figures of each tensor that has weights. Raises UsageError for `bits:` that are no number."""
    found = []
    for name, array in arrays.items():
        if name.startswith(BITS) or not array.size:
            continue
        stored = None
        if (bits := arrays.get(BITS + name)) is not None:
            if bits.size != 1 or bits.dtype.kind not in "iuf" or not 0 <= bits.item() <= _MOST_BITS:
                raise UsageError(f"{BITS}{name}: has to be one number, the bits that all weights of {name} take")
            stored = float(bits.item()) / array.size
        symbols = array.ravel()
        distinct = len(np.unique(symbols.view("<u2") if symbols.dtype == _BF16 else symbols))
        found.append(
            Tensor(
                name,
                role(name),
                array.shape,
                "bfloat16" if array.dtype == _BF16 else str(array.dtype),
                array.size,
                distinct,
                entropy(symbols),
                stored,
            )
        )
    return found


def role(name: str) -> str:
    """Of a tensor, guessed from its name."""
    return next((kind for kind, pattern in _NAMES if re.search(pattern, name.lower())), "other")


def entropy(values: Array) -> float:
    """Zeroth-order empirical entropy of values (N,), N > 0, in bits per value (see the module)."""
    planes = [values] if values.dtype.kind in "iub" else list(values.view(np.uint8).reshape(len(values), -1).T)
    total = 0.0
    for plane in planes:
        share = np.unique(plane, return_counts=True)[1] / len(plane)
        total -= float((share * np.log2(share)).sum())
    return abs(total)  # not -0.0


def groups(tensors: Sequence[Tensor]) -> list[Group]:
    """The tensors added up by role, and all of them as role "all"."""
    found = [_group(kind, [t for t in tensors if t.role == kind]) for kind in ROLES]
    return [*filter(lambda group: group.tensors, found), _group("all", tensors)]


def _group(kind: str, tensors: Iterable[Tensor]) -> Group:
    members = list(tensors)
    weights = sum(t.weights for t in members)
    bits = [t.stored * t.weights for t in members if t.stored is not None]
    stored = sum(bits) / weights if bits and len(bits) == len(members) else None
    return Group(kind, len(members), weights, sum(t.entropy * t.weights for t in members) / max(1, weights), stored)
