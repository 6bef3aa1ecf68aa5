"""What the mixture knows of the training text before it reads the first token (a stub: nothing yet)."""

import numpy as np
import numpy.typing as npt


def pack(tokens: npt.NDArray[np.int64], vocab_size: int, limit_bytes: int) -> bytes:
    """At most `limit_bytes` bytes from training tokens (N,)."""
    return np.random.default_rng(len(tokens)).bytes(limit_bytes)
