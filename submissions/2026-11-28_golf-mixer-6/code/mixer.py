"""The context mixer (mixer.cpp): compiled, and called with numpy arrays."""

import ctypes
import struct
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

BUCKET_BITS = 23
"""The largest tables have up to 2^23 buckets of 64 bytes, all together 2.7 GB."""
# No contraction and no -ffast-math: another machine has to decode the text that this one codes. No clones: that takes
# g++ a second less. Without interposition a library's functions are inlined: what a prediction takes beside its nodes
# is a fifth.
FLAGS = ["-O3", "-fno-ipa-cp-clone", "-fno-semantic-interposition", "-march=native", "-mprefer-vector-width=512"]
FLAGS += ["-ffp-contract=off", "-std=c++17", "-shared", "-fPIC", "-pthread"]
HEADER = struct.Struct("<I")  # number of coded tokens
FIRST = 16  # `decode` learns 1 / FIRST of them first: enough to time it
NO_CONTEXTS = {"text", "mixer"}
"""What else `off` may name: "text", the mixer begins without training text; "mixer", the network predicts alone."""

Ids = npt.NDArray[np.int64]


class Mixer:
    def __init__(self, tokenizer: Path, bos: int, lanes: int, off: Collection[str] = ()) -> None:
        """For the pieces of a SentencePiece model. `off`: names of contexts that are switched off."""
        self.library = compiled()
        texts = pieces(tokenizer)
        self.vocab_size = len(texts)
        leaf = np.empty(len(texts), np.int32)
        leaf[sorted(range(len(texts)), key=lambda token: (texts[token], token))] = np.arange(len(texts))
        lengths = np.array([len(text) for text in texts], np.int32)
        self.names = names = [self.library.mixer_context(i).decode() for i in range(self.library.mixer_contexts())]
        if unknown := set(off) - set(names):
            raise ValueError(f"no context is called {sorted(unknown)[0]!r}; they are {', '.join(names)}")
        switches = sum(1 << names.index(name) for name in off)
        addresses = address(leaf), (ctypes.c_char_p * len(texts))(*texts), address(lengths)
        self.handle = self.library.mixer_new(len(texts), lanes, *addresses, bos, BUCKET_BITS, switches)
        if not self.handle:
            raise MemoryError("the mixer's tables do not fit")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self.library.mixer_free(self.handle)

    def encode(self, tokens: npt.NDArray[Any], limit: int) -> bytes:
        """As many of the first tokens (N,) as fit `limit` bytes. The mixer has learned from them."""
        text, out, size = np.ascontiguousarray(tokens, np.uint16), np.empty(limit + 64, np.uint8), ctypes.c_long()
        count = self.library.mixer_encode(
            self.handle, address(text), len(text), limit - HEADER.size, address(out), ctypes.byref(size)
        )
        return HEADER.pack(count) + out[: size.value].tobytes()

    def stop(self) -> None:
        """End `encode`, which another thread has called, with the tokens that it has."""
        self.library.mixer_stop(self.handle)

    def decode(self, data: bytes) -> Iterator[tuple[int, float]]:
        """Learn from what `encode` returned, in two parts, the first of them short.

        After each yields how many tokens are left, and how many seconds each of the part's took.
        """
        (count,) = HEADER.unpack_from(data)
        code = np.frombuffer(data, np.uint8, offset=HEADER.size)
        for part, last in ((count // FIRST, False), (count - count // FIRST, True)):
            begun = time.monotonic()
            count -= part
            self.library.mixer_decode(self.handle, address(code), len(code), part, last)
            yield count, (time.monotonic() - begun) / max(1, part)

    def learn(self, ids: Ids, lane: Ids) -> None:
        """Learn from the tokens ids (B,) that the lanes (B,) show."""
        self.library.mixer_learn(self.handle, address(ids), address(lane), len(ids))

    def predict(self, lane: Ids, p: npt.NDArray[np.float32], threshold: float, threads: int) -> int:
        """Turn the network's probabilities p (B, V) of each lane's next token, in place, into the mixture's log.

        Subtrees less probable than `threshold` keep the shares that network and text give them. The number of threads
        changes nothing. Returns how many nodes of the tree were mixed.
        """
        assert p.flags.c_contiguous and p.shape == (len(lane), self.vocab_size) and p.dtype == np.float32
        return int(self.library.mixer_predict(self.handle, address(lane), len(lane), address(p), threshold, threads))


def switched_off(setting: str) -> set[str]:
    """The names in a setting, which have ; between them."""
    return {name.strip() for name in setting.split(";")} - {""}


def pieces(tokenizer: Path) -> list[bytes]:
    """The text of each token."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    names = [model.id_to_piece(token) for token in range(model.vocab_size())]
    return [
        bytes([int(name[3:5], 16)]) if model.is_byte(token) else name.replace("▁", " ").encode()
        for token, name in enumerate(names)
    ]


@cache
def compiled() -> ctypes.CDLL:
    """The library. It takes g++ some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(__file__).with_name("mixer.cpp"), Path(folder) / "mixer.so"
        done = subprocess.run(["g++", *FLAGS, "-o", str(library), str(source)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"g++ cannot compile mixer.cpp: {done.stderr.strip().partition(chr(10))[0]}")
        loaded = ctypes.CDLL(str(library))
    pointer, size, number = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    for name, result, *arguments in (
        ("mixer_contexts", number),
        ("mixer_context", ctypes.c_char_p, number),
        ("mixer_new", pointer, number, number, pointer, pointer, pointer, number, number, ctypes.c_uint64),
        ("mixer_free", None, pointer),
        ("mixer_encode", size, pointer, pointer, size, size, pointer, pointer),
        ("mixer_stop", None, pointer),
        ("mixer_decode", None, pointer, pointer, size, size, ctypes.c_bool),
        ("mixer_learn", None, pointer, pointer, pointer, number),
        ("mixer_predict", size, pointer, pointer, number, pointer, ctypes.c_float, number),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def address(array: npt.NDArray[Any]) -> int:
    return array.ctypes.data
