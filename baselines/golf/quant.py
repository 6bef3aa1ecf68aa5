"""From trained weights to codes: how coarse, rounded how, so that the artifact just fits.

- The step of a row follows the standard deviation of its weights, not its largest one: once codes are
  entropy-coded, what counts is their entropy, and outliers may lie any number of steps out (contest, April).
- GPTQ (arXiv:2210.17323) rounds column by column and lets the columns still to come make up for the error, as far as
  the layer's inputs, seen on a few training batches, are correlated.
- Bits go where they are worth most: `balance` measures how much the rounding of each role (embedding, queries, ...)
  changes what the model predicts, and gives it finer or coarser steps than the others (mixed precision).
- One number, the step as a fraction of that deviation, scales all; `fit` searches the one that fills the limit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from coder import SCALES, Coded, roles
from torch import Tensor, nn

FINEST, COARSEST = 0.02, 64.0
"""Range of the step in standard deviations: 7.7 bits per weight at one end, nearly all codes 0 at the other."""
PROBE, APART = 0.25, 16.0
"""Step at which the roles are compared, and how far theirs may lie from the common one."""
MOST = 32767
"""Codes are at most so large: 40 standard deviations of the row in steps of FINEST / APART."""


class Inputs:
    """Collects X^T X (C, C) of the inputs X (N, C) of every linear layer, while it is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.grams: dict[str, Tensor] = {}
        self.hooks = [
            module.register_forward_pre_hook(lambda _, args, name=name: self.add(f"{name}.weight", args[0]))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
        ]

    def add(self, name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        gram = x.mT @ x
        self.grams[name] = self.grams[name] + gram if name in self.grams else gram

    def corrections(self) -> dict[str, "Correction"]:
        return {name: Correction.of(gram) for name, gram in self.grams.items()}

    def __enter__(self) -> "Inputs":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


def row_scales(weight: Tensor) -> tuple[Tensor, float]:
    """Scales (R,), in steps of 2^(1/SCALES), and base: base * 2^(scale/SCALES) is the deviation of each row (R, C)."""
    base = float(weight.std(correction=0).clamp_min(1e-8))
    rows = weight.square().mean(1).sqrt().clamp_min(1e-3 * base)
    return (SCALES * torch.log2(rows / base)).round().int(), base


def round_nearest(weight: Tensor, step: Tensor) -> Tensor:
    """Codes (..., R, C) of weights (..., R, C) with steps (..., R)."""
    return (weight / step[..., None]).round().clamp(-MOST, MOST)


@dataclass(frozen=True)
class Correction:
    """What GPTQ needs to know about the inputs of a layer."""

    order: Tensor
    """The columns (C,), those with the largest inputs first, while there are many left to make up for them."""
    factor: Tensor
    """Row i of this (C, C) says how an error in the i-th of these columns is made up for by later ones: the upper
    Cholesky factor of the inverse of the Gram matrix. Where there is none, nothing is made up for."""

    @classmethod
    def of(cls, gram: Tensor) -> "Correction":
        """From the Gram matrix (C, C) of the inputs."""
        order, identity = gram.diagonal().argsort(descending=True), torch.eye(len(gram), device=gram.device)
        gram = gram[order][:, order]
        for damp in (0.01, 0.1, 1.0):
            lower, failed = torch.linalg.cholesky_ex(gram + (damp * gram.diagonal().mean() + 1e-6) * identity)
            factor, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not (failed or failed_too):
                return cls(order, factor)
        return cls(order, identity)


def round_gptq(weight: Tensor, step: Tensor, corrections: Sequence[Correction], block: int = 128) -> Tensor:
    """Codes (N, R, C) of weights (N, R, C) with steps (N, R), all N at once."""
    N, R, C = weight.shape
    order, factor = torch.stack([c.order for c in corrections]), torch.stack([c.factor for c in corrections])
    left = weight.gather(2, order[:, None, :].expand(N, R, C)).clone()
    codes = torch.empty_like(left)
    for start in range(0, C, block):
        stop = min(start + block, C)
        errors = torch.empty_like(left[:, :, start:stop])
        for i in range(start, stop):
            column = left[:, :, i]
            codes[:, :, i] = (column / step).round().clamp(-MOST, MOST)
            error = (column - codes[:, :, i] * step) / factor[:, i, i, None]
            left[:, :, i + 1 : stop] -= error[:, :, None] * factor[:, None, i, i + 1 : stop]
            errors[:, :, i - start] = error
        left[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return codes.gather(2, order.argsort(dim=1)[:, None, :].expand(N, R, C))


def quantize(
    tensors: Mapping[str, Tensor],
    corrections: Mapping[str, Correction],
    step: float,
    relative: Mapping[str, float] | None = None,
) -> dict[str, Coded]:
    """Every matrix in steps of `step` deviations times its relative one (1 if there are none).

    By GPTQ where there is a correction. Those of one shape are done together.
    """
    groups: dict[tuple[torch.Size, bool], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.shape, name in corrections), []).append(name)
    coded: dict[str, Coded] = {}
    for (_, gptq), names in groups.items():
        weights = torch.stack([tensors[name].detach().float() for name in names])  # (N, R, C)
        scales, deviations = zip(*map(row_scales, weights), strict=True)
        bases = [d * step * (relative[name] if relative else 1.0) for name, d in zip(names, deviations, strict=True)]
        steps = torch.stack([base * torch.exp2(s.float() / SCALES) for s, base in zip(scales, bases, strict=True)])
        if gptq:
            codes = round_gptq(weights, steps, [corrections[name] for name in names])
        else:
            codes = round_nearest(weights, steps)
        for name, base, scale, code in zip(names, bases, scales, codes.int().cpu(), strict=True):
            coded[name] = Coded(code.numpy(), scale.cpu().numpy().astype(np.int32), base)
    return {name: coded[name] for name in tensors}


def balance(
    model: nn.Module, logits: Callable[[], Tensor], tensors: Mapping[str, Tensor], corrections: Mapping[str, Correction]
) -> dict[str, float]:
    """The relative step of each tensor, so that every bit is worth the same.

    Rounding n weights in steps of d adds about k d^2 to the loss, and a halved step costs a bit for each of them: at
    a given size the sum is least where k d^2 / n is the same for all (Lagrange; Cover and Thomas, section 10.3). k is
    measured role by role: quantised at PROBE, how far `logits` (N, V) move, as a Kullback-Leibler divergence. The
    geometric mean over the weights is 1, before all are kept within APART. `model` is as it was afterwards.
    """
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # they may be the model's own
    exact = logits().float().log_softmax(-1)
    probes = {name: torch.from_numpy(c.weights()) for name, c in quantize(tensors, corrections, PROBE).items()}
    logs, total = {}, 0.0
    for names in roles(tensors):
        model.load_state_dict({name: probes[name] for name in names}, strict=False)
        moved = F.kl_div(logits().float().log_softmax(-1), exact, reduction="batchmean", log_target=True).item()
        model.load_state_dict({name: tensors[name] for name in names}, strict=False)
        count = sum(tensors[name].numel() for name in names)
        log = 0.5 * math.log(count / max(moved, 1e-12))
        logs |= dict.fromkeys(names, log)
        total += count * log
    mean = total / sum(t.numel() for t in tensors.values())
    return {name: min(max(math.exp(log - mean), 1 / APART), APART) for name, log in logs.items()}


def fit(dump: Callable[[float], bytes], limit: int, weights: int, finest: float, tries: int = 5) -> tuple[bytes, float]:
    """The largest of `dump(step)` with at most `limit` bytes that a few tries find, and its step.

    The size falls about linearly with the logarithm of the step (secant method), at first by a bit for each of the
    `weights` per doubling. Unless the finest step fits, all tries are made: so packing for practice takes as long as
    packing under the clock. Raises ValueError, with the smallest size, when even the coarsest step is too large.
    """
    best, fine, coarse = (b"", 0.0), math.log2(finest), math.log2(COARSEST)  # the one to find lies between
    at, last, slope = fine, (fine, 0), weights / 8
    while tries > 0 or not best[0]:
        data, tries = dump(2**at), tries - 1
        if len(data) <= limit:
            best, coarse = max(best, (data, 2**at), key=lambda found: len(found[0])), at
            if at == fine:
                break
        elif at == coarse:
            raise ValueError(f"take {len(data):,} bytes at the coarsest step")
        else:
            fine = at
        if last[1]:
            slope = max((last[1] - len(data)) / (at - last[0]), 0.01 * weights)
        last = at, len(data)
        at += (len(data) - 0.9995 * limit) / slope  # aims a little below the limit
        if tries <= 0 or not fine < at < coarse:
            at = (fine + coarse) / 2 if tries > -6 else coarse
    return best
