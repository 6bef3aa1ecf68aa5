"""What the strong baseline adds to Muon: a better polynomial, and rows of equal length."""

import torch
from torch import Tensor

from pgolf.train import optim

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""Odd quintics, each the best for the interval that its predecessors leave (arXiv:2505.16932, from 1e-3)."""
SAFETY = 1.02
"""All but the last are taken at s / SAFETY: rounding in bf16 would else push values beyond where they converge."""
SAFE = (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]), POLAR_EXPRESS[-1])


def orthogonalize(
    batch: Tensor, polar: bool = True, row_norm: bool = True, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Matrices (N, R, C) with their singular values brought near 1, in `dtype`.

    With `row_norm` each row gets length 1 first, so that no row's gradient drowns another's (contest, MuonEq-R).
    """
    if row_norm:
        batch = batch / batch.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return optim.orthogonalize(batch, SAFE if polar else optim.NEWTON_SCHULZ, dtype)
