"""From trained weights to codes: how coarse, rounded how, so that the artifact just fits.

- Bits go where they are worth most: the step of each row of each matrix follows from how much rounding it changes what
  the model predicts (`row_steps`), not from the row's largest weight: codes are entropy-coded, so outliers may lie
  any number of steps out.
- GPTQ (arXiv:2210.17323) rounds column by column and lets the columns still to come make up for the error, as far as
  the layer's inputs, seen on a few training batches, are correlated.
- One number, the step in standard deviations, scales all; `fit` searches the one that fills the limit.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from coder import SCALES, Coded
from torch import Tensor, nn

FINEST, COARSEST = 0.02, 64.0
"""Range of the step in standard deviations: 7.7 bits per weight at one end, next to none at the other."""
APART = 16.0
"""The step of a row lies within this factor of the common one, in standard deviations of its matrix."""
PRIOR = 0.25
"""Of the sensitivity of a row, so much is its matrix's: a rare token's few gradients say little."""
SPAN = (2 * math.pi * math.e) ** 0.5
"""A normal number that is rounded to a multiple of a small step has an entropy of log2(SPAN / step) bits."""
MOST = 32767
"""Codes are at most so large: 40 standard deviations of the matrix in steps of FINEST / APART."""


@dataclass(frozen=True)
class Correction:
    """What GPTQ needs to know about the inputs of a layer."""

    order: Tensor
    """The columns (C,), those with the largest inputs first, while there are many left to make up for them."""
    factor: Tensor
    """Row i of this (C, C) says how an error in the i-th of these columns is made up for by later ones: the upper
    Cholesky factor U of the inverse of the Gram matrix G; the identity, which makes up for nothing, if it has none."""
    left: float
    """The part of the squared error that is left then: the mean of 1 / U[i, i]^2 over that of G[i, i]."""

    @classmethod
    def of(cls, gram: Tensor) -> "Correction":
        """From the Gram matrix (C, C) of the inputs."""
        order, identity = gram.diagonal().argsort(descending=True), torch.eye(len(gram), device=gram.device)
        gram = gram[order][:, order]
        for damp in (0.01, 0.1, 1.0):
            ridged = gram + (damp * gram.diagonal().mean() + 1e-6) * identity
            lower, failed = torch.linalg.cholesky_ex(ridged)
            factor, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not (failed or failed_too):
                return cls(order, factor, float(factor.diagonal().pow(-2).mean() / ridged.diagonal().mean()))
        return cls(order, identity, 1.0)


def calibrate(
    model: nn.Module, logits: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> tuple[dict[str, Correction], dict[str, Tensor]]:
    """A correction for each linear layer and the sensitivity of each row (R,) of each matrix, on batches of ids (B, T).

    The embedding has no correction: what GPTQ gains for it as the head it loses twice as the input.

    `logits` (B, T, V) are the model's. Small errors e in the weights add e^T F e / 2 to the Kullback-Leibler divergence
    of its predictions, with the Fisher information F: of that this is the diagonal, averaged by row. With targets drawn
    from the predictions themselves the gradients of tokens have mean 0 and are independent, so the square of
    their sum is the sum of their squares, on average (arXiv:1503.05671). Raises ValueError if logits are not finite.
    """
    matrices = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    sensitivity = {name: torch.zeros(len(p), device=p.device) for name, p in matrices.items()}
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    grams: dict[str, Tensor] = {}
    tokens = 0

    def add(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().flatten(0, -2).float()  # (N, C)
        grams[name] = grams.get(name, 0) + x.mT @ x

    linear = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    hooks = [module.register_forward_pre_hook(partial(add, name)) for name, module in linear.items()]
    with torch.enable_grad():
        for ids in batches:
            rows = logits(ids).flatten(0, 1)  # (N, V)
            if not rows.isfinite().all():
                raise ValueError("predictions are no longer finite")
            drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator).squeeze(1)
            F.cross_entropy(rows, drawn, reduction="sum").backward()
            for name, parameter in matrices.items():
                sensitivity[name] += parameter.grad.float().square().mean(1)
            model.zero_grad(set_to_none=True)
            tokens += ids.numel()
    for hook in hooks:
        hook.remove()
    return {name: Correction.of(gram) for name, gram in grams.items()}, {
        name: s / tokens for name, s in sensitivity.items()
    }


def row_deviations(weight: Tensor) -> Tensor:
    """Root mean squares (R,) of the rows of a matrix (R, C), but at least a thousandth of its deviation."""
    rows = weight.float().square().mean(1).sqrt()
    return rows.clamp_min(1e-3 * float(weight.std(correction=0))).clamp_min(1e-8)


def row_steps(
    tensors: Mapping[str, Tensor], corrections: Mapping[str, Correction], sensitivity: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Steps (R,) of the rows of each matrix (R, C), such that every bit is worth the same.

    Rounding a weight in steps of d adds about k d^2 to the divergence, and a halved step costs a bit for it: at a given
    size the sum is least where k d^2 is the same for all (Lagrange; Cover and Thomas, section 10.3). k is the
    sensitivity, times what GPTQ leaves. The geometric mean over all weights, in standard deviations of their matrix,
    is 1: so the size at a given step hardly depends on the model.
    """
    most = max(float(s.mean()) for s in sensitivity.values())
    deviations = {name: row_deviations(weight.flatten()[None]) for name, weight in tensors.items()}
    logs = {}
    for name in tensors:
        k = sensitivity[name].lerp(sensitivity[name].mean(), PRIOR).clamp_min(max(1e-12 * most, 1e-30))
        k = k * (corrections[name].left if name in corrections else 1.0)
        logs[name] = -0.5 * k.log() - deviations[name].log()
    count = sum(weight.numel() for weight in tensors.values())
    for bound in (math.log(APART), math.inf):  # centre, keep within bounds, and centre what is left
        mean = sum(float(log.sum()) * tensors[name].size(1) for name, log in logs.items()) / count
        logs = {name: (log - mean).clamp(-bound, bound) for name, log in logs.items()}
    return {name: log.exp() * deviations[name] for name, log in logs.items()}


def round_nearest(weight: Tensor, step: Tensor) -> Tensor:
    """Codes (..., R, C) of weights (..., R, C) with steps (..., R)."""
    return (weight / step[..., None]).round().clamp(-MOST, MOST)


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
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, Coded]:
    """Every matrix in steps of `step` times those of its rows, which are their deviations if not given.

    By GPTQ where there is a correction. Those of one shape are done together.
    """
    groups: dict[tuple[torch.Size, bool], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.shape, name in corrections), []).append(name)
    coded: dict[str, Coded] = {}
    for (_, gptq), names in groups.items():
        weights = torch.stack([tensors[name].detach().float() for name in names])  # (N, R, C)
        wanted = torch.stack([rows[name] if rows else row_deviations(tensors[name]) for name in names]) * step  # (N, R)
        bases = [float(f"{base:.5g}") for base in wanted.log().mean(1).exp().tolist()]  # short in the header
        scales = (SCALES * torch.log2(wanted / wanted.new_tensor(bases)[:, None])).round()
        steps = torch.exp2(scales / SCALES) * wanted.new_tensor(bases)[:, None]
        if gptq:
            codes = round_gptq(weights, steps, [corrections[name] for name in names])
        else:
            codes = round_nearest(weights, steps)
        for name, base, scale, code in zip(names, bases, scales.int().cpu(), codes.int().cpu(), strict=True):
            coded[name] = Coded(code.numpy(), scale.numpy(), base)
    return {name: coded[name] for name in tensors}


def bits(step: float) -> float:
    """About the entropy of a normal number that is rounded to a multiple of `step` deviations."""
    return math.log2(1 + SPAN / step)


AIMS = 0.9995, 0.9995, 0.999, 0.998, 0.97
"""Parts of the limit that each try's successor is meant to fill: the last ones rather fit than fill it."""


def fit(dump: Callable[[float], bytes], limit: int, weights: int, finest: float) -> tuple[bytes, float]:
    """The largest of `dump(step)` with at most `limit` bytes that a few tries find, and its step.

    The size rises about linearly with `bits(step)` (secant method), at first as for so many normal `weights`. Unless
    the finest step fits, all tries are made, and more if none fits: so packing for practice takes as long as under the
    clock. Raises ValueError, with the size, when even the coarsest is too large.
    """
    slope, small, large = weights / 8, bits(COARSEST), math.inf  # what fits and what does not, as bits
    best, tries, last = (b"", 0.0), 0, (0.0, 0)
    most = bits(finest)
    at = min(max(small, limit / slope), most)
    while (tries < len(AIMS) and small < most) or not best[0]:
        step = SPAN / (2**at - 1)
        data, aim = dump(step), AIMS[min(tries, len(AIMS) - 1)]
        size, tries = len(data), tries + 1
        if size <= limit:
            best, small = max(best, (data, step), key=lambda found: len(found[0])), at
        elif at > small:
            large = at
        else:
            raise ValueError(f"take {size:,} bytes at the coarsest step")
        if tries > 1 and at != last[0]:
            slope = max((size - last[1]) / (at - last[0]), slope / 2)
        last = at, size
        at = min(at + (aim * limit - size) / slope, most)
        if tries > 10 or not small < at < large:
            at = (small + min(large, most)) / 2 if best[0] else small
    return best
