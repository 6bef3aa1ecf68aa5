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

import torch
import torch.nn.functional as F
from coder import SCALES, Coded
from torch import Tensor, nn

FINEST, COARSEST = 0.02, 64.0
"""Range of the step in standard deviations: 7.7 bits per weight at one end, nearly all codes 0 at the other."""
APART = 16.0
"""How far the step of a row may lie from the common one."""
PRIOR = 0.25
"""Of the sensitivity of a row, so much is its matrix's: a rare token's few gradients say little."""
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

    def __enter__(self) -> "Inputs":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()


@dataclass(frozen=True)
class Correction:
    """What GPTQ needs to know about the inputs of a layer."""

    order: Tensor
    """The columns (C,), those with the largest inputs first, while there are many left to make up for them."""
    factor: Tensor
    """Row i of this (C, C) says how an error in the i-th of these columns is made up for by later ones: the upper
    Cholesky factor of the inverse of the Gram matrix. Where there is none, nothing is made up for."""
    left: float
    """The part of the squared error that is left then: det(G)^(1/C) / (tr(G) / C) for the Gram matrix G."""

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
                mean_log = factor.diagonal().log().mean()
                return cls(order, factor, float((-2 * mean_log).exp() / ridged.diagonal().mean()))
        return cls(order, identity, 1.0)


def calibrate(
    model: nn.Module, logits: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> tuple[dict[str, Correction], dict[str, Tensor]]:
    """A correction for each linear layer and the sensitivity of each row (R,) of each matrix, on batches of ids (B, T).

    `logits` (B, T, V) are the model's. Small errors e in the weights add e^T F e / 2 to the Kullback-Leibler divergence
    of its predictions, with the Fisher information F: of that this is the diagonal, averaged by row. With targets drawn
    from the predictions themselves the gradients of tokens have mean 0 and are independent, so the square of
    their sum is the sum of their squares, on average (arXiv:1503.05671).
    """
    matrices = {name: p for name, p in model.named_parameters() if name.endswith("weight")}
    sensitivity = {name: torch.zeros(len(p), device=p.device) for name, p in matrices.items()}
    generator, tokens = None, 0
    with Inputs(model) as inputs, torch.enable_grad():
        for ids in batches:
            generator = generator or torch.Generator(ids.device).manual_seed(0)
            rows = logits(ids).flatten(0, 1)  # (N, V)
            drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator).squeeze(1)
            F.cross_entropy(rows, drawn, reduction="sum").backward()
            for name, parameter in matrices.items():
                if parameter.grad is not None:
                    sensitivity[name] += parameter.grad.float().square().mean(1)
            model.zero_grad(set_to_none=True)
            tokens += ids.numel()
    corrections = {name: Correction.of(gram) for name, gram in inputs.grams.items()}
    return corrections, {name: s / tokens for name, s in sensitivity.items()}


def row_deviations(weight: Tensor) -> Tensor:
    """Root mean squares (R,) of the rows of a matrix (R, C), and not far below that of all of it."""
    rows = weight.float().square().mean(1).sqrt()
    return rows.clamp_min(1e-3 * float(weight.std(correction=0))).clamp_min(1e-8)


def row_steps(
    tensors: Mapping[str, Tensor], corrections: Mapping[str, Correction], sensitivity: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Steps (R,) of the rows of each matrix (R, C), such that every bit is worth the same.

    Rounding a weight in steps of d adds about k d^2 to the divergence, and a halved step costs a bit for it: at a given
    size the sum is least where k d^2 is the same for all (Lagrange; Cover and Thomas, section 10.3). k is the
    sensitivity, times what GPTQ leaves. In standard deviations of their matrix, the steps have the geometric mean 1
    before all are kept within APART.
    """
    most = max(float(s.mean()) for s in sensitivity.values())
    logs, total = {}, 0.0
    for name, weight in tensors.items():
        k = sensitivity[name].lerp(sensitivity[name].mean(), PRIOR).clamp_min(max(1e-12 * most, 1e-30))
        k = k * (corrections[name].left if name in corrections else 1.0)
        logs[name] = -0.5 * k.log() - row_deviations(weight.flatten()[None]).log()
        total += float(logs[name].sum()) * weight.size(1)
    mean, bound = total / sum(t.numel() for t in tensors.values()), math.log(APART)
    return {
        name: (log - mean).clamp(-bound, bound).exp() * row_deviations(tensors[name].flatten()[None])
        for name, log in logs.items()
    }


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
        bases = [float(f"{base:.5g}") for base in wanted.log().mean(1).exp().tolist()]
        scales = (SCALES * torch.log2(wanted / wanted.new_tensor(bases)[:, None])).round()
        steps = torch.exp2(scales / SCALES) * wanted.new_tensor(bases)[:, None]
        if gptq:
            codes = round_gptq(weights, steps, [corrections[name] for name in names])
        else:
            codes = round_nearest(weights, steps)
        for name, base, scale, code in zip(names, bases, scales.int().cpu(), codes.int().cpu(), strict=True):
            coded[name] = Coded(code.numpy(), scale.numpy(), base)
    return {name: coded[name] for name in tensors}


def fit(dump: Callable[[float], bytes], limit: int, weights: int, finest: float, tries: int = 5) -> tuple[bytes, float]:
    """The largest of `dump(step)` with at most `limit` bytes that a few tries find, and its step.

    The size falls about linearly with the logarithm of the step (secant method), at first by a bit for each of the
    `weights` per doubling. Unless the finest step fits, all tries are made: so packing for practice takes as long as
    packing under the clock. Raises ValueError, with the smallest size, when even the coarsest step is too large.
    """
    best, at, end = (b"", 0.0), math.log2(finest), math.log2(COARSEST)
    large: tuple[float, int] | None = None  # the coarsest step that was too fine, and its size
    small: tuple[float, int] | None = None  # the finest one that fits
    slope = weights / 8
    while tries > 0 or not best[0]:
        data, tries = dump(2**at), tries - 1
        size = len(data)
        if size > limit:
            if at == end:
                raise ValueError(f"take {size:,} bytes at the coarsest step")
            if large and not small:
                slope = max((large[1] - size) / (at - large[0]), 0.01 * weights)
            large = at, size
        else:
            best, small = max(best, (data, 2**at), key=lambda found: len(found[0])), (at, size)
            if large is None:
                break
        if large and small:
            slope = max((large[1] - small[1]) / (small[0] - large[0]), 0.01 * weights)
        aim = 0.9995 if tries > 0 else 0.97  # out of tries, a size that surely fits
        at = large[0] + (large[1] - aim * limit) / slope
        upper = small[0] if small else end
        if not large[0] < at < upper:
            at = (large[0] + upper) / 2 if tries > -6 and small else upper
    return best
