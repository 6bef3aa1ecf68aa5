"""The optimizer: Muon for the matrices of the blocks, Adam for embedding and vectors.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) moves each matrix by its momentum with all
singular values brought near 1. Matrices of one shape are handled as a batch, and the batch is dealt over the
ranks: each orthogonalises its share, then all gather all shares. So every rank holds the same weights.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # odd quintic with a steep slope at 0, from the Muon post
NEWTON_SCHULZ_STEPS = 5


def orthogonalize(batch: Tensor) -> Tensor:
    """Matrices (N, R, C) with their singular values brought to about 0.7 to 1.2, in bf16.

    The polynomial p(s) = a s + b s^3 + c s^5 acts on every singular value s without computing any.
    """
    a, b, c = NEWTON_SCHULZ
    tall = batch.size(1) > batch.size(2)
    x = (batch / (batch.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    x = x.mT if tall else x  # the Gram matrix is taken over the shorter side
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # (N, S, S)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised. Gradients have to be the same on all ranks."""

    def __init__(
        self, matrices: Iterable[nn.Parameter], orthogonalize: Callable[[Tensor], Tensor] = orthogonalize
    ) -> None:
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.orthogonalize = orthogonalize
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        self.groups = list(shapes.values())
        # Each rank keeps the momentum of its own share only; shares are padded to the same length.
        self.momenta = [g[0].new_zeros(-(-len(g) // self.world), *g[0].shape) for g in self.groups]

    @torch.no_grad()
    def step(self, lr: float, momentum: float) -> None:
        """Apply the gradients; Nesterov's form of the momentum."""
        for group, velocity in zip(self.groups, self.momenta, strict=True):
            share = len(velocity)
            own = group[self.rank * share : (self.rank + 1) * share]
            grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in own]
            grads += [torch.zeros_like(group[0])] * (share - len(own))
            grad = torch.stack(grads)  # (share, R, C)
            velocity.mul_(momentum).add_(grad)
            update = self.orthogonalize(grad.add(velocity, alpha=momentum))
            if self.world > 1:
                update = update.contiguous()
                shares = update.new_empty(self.world * share, *group[0].shape)
                dist.all_gather_into_tensor(shares, update)
                update = shares
            rows, columns = group[0].shape
            # A tall matrix has more outputs than inputs: this keeps the size of the change per output.
            size = max(1.0, rows / columns) ** 0.5
            torch._foreach_add_(group, list(update[: len(group)].float().unbind()), alpha=-lr * size)


class Optimizer:
    """Both parts, with learning rates for matrices, embedding and vectors."""

    def __init__(
        self,
        model: nn.Module,
        matrix_lr: float,
        embed_lr: float,
        vector_lr: float,
        orthogonalize: Callable[[Tensor], Tensor] = orthogonalize,
    ) -> None:
        matrices, embeds, vectors = [], [], []
        for name, parameter in model.named_parameters():
            kind = embeds if name == "embed.weight" else matrices if name.endswith(".weight") else vectors
            kind.append(parameter)
        self.muon = Muon(matrices, orthogonalize)
        self.adam = torch.optim.Adam([{"params": embeds}, {"params": vectors}], betas=(0.9, 0.95), fused=True)
        self.matrix_lr, self.adam_lrs = matrix_lr, (embed_lr, vector_lr)

    def step(self, scale: float, momentum: float) -> None:
        """One step with all learning rates times `scale`; `momentum` is Muon's. Drops the gradients."""
        for group, lr in zip(self.adam.param_groups, self.adam_lrs, strict=True):
            group["lr"] = lr * scale
        self.adam.step()
        self.muon.step(self.matrix_lr * scale, momentum)
        for group in (*self.muon.groups, *(g["params"] for g in self.adam.param_groups)):
            for parameter in group:
                parameter.grad = None
