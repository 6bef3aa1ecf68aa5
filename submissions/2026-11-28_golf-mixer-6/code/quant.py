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
"""The step of a row lies within about this factor of the common one, in standard deviations of its matrix."""
SHRINKAGE = 0.25
"""Weight of a row's sensitivity towards the matrix mean: a rare token's few gradients say little."""
SPAN = (2 * math.pi * math.e) ** 0.5
"""A normal number that is rounded to a multiple of a small step has an entropy of log2(SPAN / step) bits."""
MAX_CODE = 32767
"""40 standard deviations of the matrix in steps of FINEST / APART."""


@dataclass(frozen=True)
class InverseHessian:
    """The inverse-Hessian factor of a layer, from its inputs: what GPTQ needs to know."""

    order: Tensor
    """The columns (C,), those with the largest inputs first, while there are many left to make up for them."""
    factor: Tensor
    """Row i of this (C, C) says how an error in the i-th of these columns is made up for by later ones: the upper
    Cholesky factor U of the inverse of the Gram matrix G; the identity, which makes up for nothing, if it has none."""
    residual: float
    """The part of the squared error that is left then: the mean of 1 / U[i, i]^2 over that of G[i, i]."""

    @classmethod
    def of(cls, gram: Tensor) -> "InverseHessian":
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
) -> tuple[dict[str, InverseHessian], dict[str, Tensor]]:
    """Inverse-Hessian factors of the linear layers and sensitivities of the rows (R,) of all matrices, on ids (B, T).

    The embedding has no factor: what GPTQ gains for it as the head it loses twice as the input.

    `logits` (B, T, V) are the model's. Small errors e in the weights add e^T F e / 2 to the Kullback-Leibler divergence
    of its predictions, with the Fisher information F: of that this is the diagonal, averaged by row. With targets
    sampled from the predictions themselves the gradients of tokens have mean 0 and are independent, so the square of
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
            predicted = logits(ids).flatten(0, 1)  # (N, V)
            if not predicted.isfinite().all():
                raise ValueError("predictions are no longer finite")
            sampled = torch.multinomial(predicted.detach().softmax(-1), 1, generator=generator).squeeze(1)
            F.cross_entropy(predicted, sampled, reduction="sum").backward()
            for name, parameter in matrices.items():
                assert parameter.grad is not None
                sensitivity[name] += parameter.grad.float().square().mean(1)
            model.zero_grad(set_to_none=True)
            tokens += ids.numel()
    for hook in hooks:
        hook.remove()
    return {name: InverseHessian.of(gram) for name, gram in grams.items()}, {
        name: s / tokens for name, s in sensitivity.items()
    }


def row_deviations(weight: Tensor) -> Tensor:
    """Root mean squares (R,) of the rows of a matrix (R, C), but at least a thousandth of its deviation."""
    rows = weight.float().square().mean(1).sqrt()
    return rows.clamp_min(1e-3 * float(weight.std(correction=0))).clamp_min(1e-8)


def row_steps(
    tensors: Mapping[str, Tensor], inverses: Mapping[str, InverseHessian], sensitivity: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Steps (R,) of the rows of each matrix (R, C), such that every bit is worth the same.

    Rounding a weight in steps of d adds about k d^2 to the divergence, and a halved step costs a bit for it: at a given
    size the sum is least where k d^2 is the same for all (Lagrange; Cover and Thomas, section 10.3). k is the
    sensitivity, times what GPTQ leaves. The geometric mean over all weights, in standard deviations of their matrix,
    is 1: so the size at a given step hardly depends on the model.
    """
    largest = max(float(s.mean()) for s in sensitivity.values())
    deviations = {name: row_deviations(weight.flatten()[None]) for name, weight in tensors.items()}  # of one long row
    logs = {}
    for name in tensors:
        k = sensitivity[name].lerp(sensitivity[name].mean(), SHRINKAGE).clamp_min(max(1e-12 * largest, 1e-30))
        k = k * (inverses[name].residual if name in inverses else 1.0)
        logs[name] = -0.5 * k.log() - deviations[name].log()
    count = sum(weight.numel() for weight in tensors.values())
    for bound in (math.log(APART), math.inf):  # centre, keep within bounds, and centre what is left
        mean = sum(float(log.sum()) * tensors[name].size(1) for name, log in logs.items()) / count
        logs = {name: (log - mean).clamp(-bound, bound) for name, log in logs.items()}
    return {name: log.exp() * deviations[name] for name, log in logs.items()}


def round_nearest(weight: Tensor, step: Tensor) -> Tensor:
    """Codes (..., R, C) of weights (..., R, C) with steps (..., R)."""
    return (weight / step[..., None]).round().clamp(-MAX_CODE, MAX_CODE)


def round_gptq(weight: Tensor, step: Tensor, inverses: Sequence[InverseHessian], block: int = 128) -> Tensor:
    """Codes (N, R, C) of weights (N, R, C) with steps (N, R), all N at once."""
    N, R, C = weight.shape
    order, factor = torch.stack([c.order for c in inverses]), torch.stack([c.factor for c in inverses])
    left = weight.gather(2, order[:, None, :].expand(N, R, C)).clone()
    codes = torch.empty_like(left)
    for start in range(0, C, block):
        stop = min(start + block, C)
        errors = torch.empty_like(left[:, :, start:stop])
        for i in range(start, stop):
            column = left[:, :, i]
            codes[:, :, i] = (column / step).round().clamp(-MAX_CODE, MAX_CODE)
            error = (column - codes[:, :, i] * step) / factor[:, i, i, None]
            left[:, :, i + 1 : stop] -= error[:, :, None] * factor[:, None, i, i + 1 : stop]
            errors[:, :, i - start] = error
        left[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    return codes.gather(2, order.argsort(dim=1)[:, None, :].expand(N, R, C))


def quantize(
    tensors: Mapping[str, Tensor],
    inverses: Mapping[str, InverseHessian],
    step: float,
    rows: Mapping[str, Tensor] | None = None,
) -> dict[str, Coded]:
    """Every matrix in steps of `step` times those of its rows, which are their deviations if not given.

    By GPTQ where there is a factor. Those of one shape are done together.
    """
    groups: dict[tuple[torch.Size, bool], list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.shape, name in inverses), []).append(name)
    coded: dict[str, Coded] = {}
    for (_, gptq), names in groups.items():
        weights = torch.stack([tensors[name].detach().float() for name in names])  # (N, R, C)
        wanted = torch.stack([rows[name] if rows else row_deviations(tensors[name]) for name in names]) * step  # (N, R)
        bases = [float(f"{base:.5g}") for base in wanted.log().mean(1).exp().tolist()]  # short in the header
        scales = (SCALES * torch.log2(wanted / wanted.new_tensor(bases)[:, None])).round()
        steps = torch.exp2(scales / SCALES) * wanted.new_tensor(bases)[:, None]
        if gptq:
            codes = round_gptq(weights, steps, [inverses[name] for name in names])
        else:
            codes = round_nearest(weights, steps)
        for name, base, scale, code in zip(names, bases, scales.int().cpu(), codes.int().cpu(), strict=True):
            coded[name] = Coded(code.numpy(), scale.numpy(), base)
    return {name: coded[name] for name in tensors}


def bits(step: float) -> float:
    """About the entropy of a normal number that is rounded to a multiple of `step` deviations."""
    return math.log2(1 + SPAN / step)


AIMS = 0.9995, 0.9995, 0.999, 0.998, 0.97
"""Fractions of the limit that the tries aim at: the last ones rather fit than fill it."""


MOST_TRIES = 20
"""Before the coarsest step is tried, as nothing else fits."""


def fit(dump: Callable[[float], bytes], limit: int, weights: int) -> tuple[bytes, float]:
    """The largest of `dump(step)` with at most `limit` bytes that a few tries find, and its step.

    Secant method within a bracket, over `bits(step)`, in which the size is nearly linear. Unless the finest step fits,
    all tries are made, and more if none fits: so packing for practice takes as long as under the clock. Raises
    ValueError, with the size, when even the coarsest is too large.
    """
    coarsest, top = bits(COARSEST), bits(FINEST)
    fits, too_large, best, tries = coarsest, math.inf, (b"", 0.0), 0
    slope = weights / 8  # bytes for each bit, at first as for normal weights
    last, at = (0.0, 0), min(max(coarsest, limit / slope), top)
    while (tries < len(AIMS) and fits < top) or not best[0]:
        step = SPAN / (2**at - 1)
        data = dump(step)
        if len(data) <= limit:
            best, fits = max(best, (data, step), key=lambda found: len(found[0])), at
        elif at > coarsest:
            too_large = at
        else:
            raise ValueError(f"take {len(data):,} bytes at the coarsest step")
        # The line through the last two tries says where the size is the aim; noise must not make it too flat ...
        slope = max((len(data) - last[1]) / (at - last[0]), slope / 2) if tries else slope
        aim = AIMS[min(tries, len(AIMS) - 1)] * limit
        last, at, tries = (at, len(data)), min(at + (aim - len(data)) / slope, top), tries + 1
        # ... and bisection takes over where that leaves the bracket.
        if tries >= MOST_TRIES:
            at = coarsest
        elif not fits < at < too_large:
            at = (fits + min(too_large, top)) / 2
    return best
