"""Log-loss from logits. No other module computes it for a score."""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pgolf.errors import Refused
from pgolf.sandbox.wire import Ids
from pgolf.score.schedule import Index

Floats = npt.NDArray[np.float64]

_CHUNK = 1 << 16  # logits; a CPU does them in pieces that stay in its cache, at twice the speed
_GPU_CHUNK = 1 << 24


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln softmax(logits)[target] in nats: (R, V), (R,) -> (R,) float64; NaN where a logit is not finite.

    The exponentials are summed in fp64: in fp32 many small terms could be hidden from the sum, and probabilities would
    add up to more than one. They are fp32 powers of 2, five times as fast as those of e on an AMD CPU. An
    exponent d is rounded twice, each time by |d| 2^-24 at most; that changes the sum by ln(V) 2^-23, under 2e-6.
    """
    rows = max(1, (_GPU_CHUNK if logits.is_cuda else _CHUNK) // logits.shape[-1])
    parts = zip(torch.split(logits, rows), torch.split(targets, rows), strict=True)
    return torch.cat([_negative_log_likelihood(*part) for part in parts])


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.float()
    peak = logits.amax(dim=-1, keepdim=True)
    powers = (logits - peak).mul_(1 / math.log(2)).exp2_()
    total = powers.double().sum(dim=-1)  # faster on a CPU than a sum that converts as it goes
    target = logits.gather(-1, targets[:, None])
    nll = total.log_() + (peak.double() - target.double()).squeeze(-1)  # NaN where a logit is NaN or inf
    return nll.masked_fill_(logits.amin(dim=-1) == -torch.inf, torch.nan)


def log_losses(logits: Tensor, tokens: Ids, at: Index) -> Floats:
    """Log-loss in nats (R,) of the tokens at positions `at` (R,) of `tokens` (N,) under logits (R, V).

    Raises Refused where a logit is NaN or infinite.
    """
    targets = torch.from_numpy(tokens[at].astype(np.int64)).to(logits.device)
    nll: Floats = negative_log_likelihood(logits, targets).cpu().numpy()
    if bad := at[np.isnan(nll)].tolist():
        raise Refused(f"the logits for token {bad[0]} of the text hold NaN or infinity")
    return nll
