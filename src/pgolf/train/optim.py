"""The optimizer: Muon for the matrices of the blocks, Adam for tables and vectors, and the collectives.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) moves each matrix by its momentum with all
singular values brought near 1. Matrices of one shape are a group, sharded over the ranks. A step is a pipeline
(parallel Muon, contest): all gradients are sent off at once, each rank receives the sum of its share only,
orthogonalises it while the next group's is still on its way, and sends the result off while it goes on.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

# torch 2.13 deprecates the longer names, older releases have no others.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""One odd quintic with a steep slope at 0, five times: from the Muon post."""


def orthogonalize(
    batch: Tensor, quintics: Sequence[tuple[float, float, float]] = NEWTON_SCHULZ, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Matrices (N, R, C) with their singular values brought near 1 (to 0.7 to 1.2 by default), in `dtype`.

    Each polynomial p(s) = a s + b s^3 + c s^5 acts on every singular value s without computing any.
    """
    tall = batch.size(1) > batch.size(2)
    x: Tensor = (batch / (batch.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    x = x.mT if tall else x  # the Gram matrix is taken over the shorter side
    for a, b, c in quintics:
        gram = x @ x.mT  # (N, S, S)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


class Group:
    """Matrices of one shape; this rank holds the momentum of `share` of them."""

    def __init__(self, matrices: list[nn.Parameter], rank: int, world: int) -> None:
        self.matrices, self.world = matrices, world
        self.share = -(-len(matrices) // world)  # the last rank's is padded
        self.momentum = matrices[0].new_zeros(self.share, *matrices[0].shape)
        rows, columns = matrices[0].shape
        # A tall matrix has more outputs than inputs: this keeps the size of the change per output.
        self.size = max(1.0, rows / columns) ** 0.5

    def send_gradients(self) -> tuple[Tensor, dist.Work | None]:
        """Begin to sum this rank's share (share, R, C) over all ranks."""
        first = self.matrices[0]
        padding = [torch.zeros_like(first)] * (self.world * self.share - len(self.matrices))
        grads = torch.stack([torch.zeros_like(m) if m.grad is None else m.grad for m in self.matrices] + padding)
        if self.world == 1:
            return grads, None
        own = torch.empty_like(self.momentum)
        return own, reduce_scatter(own, grads, async_op=True)

    def send_update(self, update: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to collect the updates (N, R, C) of all ranks."""
        if self.world == 1:
            return update, None
        every = update.new_empty(self.world * self.share, *update.shape[1:])
        return every, all_gather(every, update.contiguous(), async_op=True)


class Optimizer:
    """Both parts, with learning rates for matrices (weights of nn.Linear), tables (other weights) and vectors."""

    def __init__(
        self,
        model: nn.Module,
        *,
        matrix_lr: float,
        table_lr: float,
        vector_lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        decay: float = 0.0,
        orthogonalize: Callable[[Tensor], Tensor] = orthogonalize,
    ) -> None:
        """`betas` are Adam's; `decay` is the decoupled weight decay of matrices and tables, times learning rate."""
        rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        tables: list[Tensor] = []
        vectors: list[Tensor] = []
        linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        for name, parameter in model.named_parameters():
            if id(parameter) in linear:
                shapes.setdefault(parameter.shape, []).append(parameter)
            else:
                (tables if name.endswith("weight") else vectors).append(parameter)
        self.groups = [Group(matrices, rank, self.world) for matrices in shapes.values()]
        self.rest = [*tables, *vectors]
        self.adam = torch.optim.AdamW(
            [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=betas,
            fused=True,
        )
        self.orthogonalize = orthogonalize
        self.matrix_lr, self.adam_lrs, self.decay = matrix_lr, (table_lr, vector_lr), decay

    @torch.no_grad()
    def step(self, scale: float, momentum: float, loss: Tensor) -> Tensor:
        """One step with all learning rates times `scale`; returns the loss averaged over all ranks.

        `momentum` is Muon's, in Nesterov's form. Drops the gradients.
        """
        sums = [group.send_gradients() for group in self.groups]
        flat, sent = self._send_rest(loss)
        updates = []
        for group, (grad, arriving) in zip(self.groups, sums, strict=True):
            _wait(arriving)
            group.momentum.mul_(momentum).add_(grad)
            updates.append(group.send_update(self.orthogonalize(grad.add(group.momentum, alpha=momentum))))
        _wait(sent)
        loss = self._step_rest(flat, scale)
        lr = self.matrix_lr * scale
        for group, (update, arriving) in zip(self.groups, updates, strict=True):
            _wait(arriving)
            matrices: list[Tensor] = [*group.matrices]
            if self.decay:
                torch._foreach_mul_(matrices, 1 - lr * self.decay)
            each = list(update[: len(group.matrices)].float().unbind())
            torch._foreach_add_(matrices, each, alpha=-lr * group.size)
        _forget(self.rest)
        for group in self.groups:
            _forget(group.matrices)
        return loss

    def _send_rest(self, loss: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to sum the gradients of tables and vectors and, as the last number, the loss."""
        if self.world == 1:
            return loss.reshape(1), None
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.rest]
        flat = torch.cat([*(g.flatten() for g in grads), loss.reshape(1)])
        return flat, dist.all_reduce(flat, async_op=True)

    def _step_rest(self, flat: Tensor, scale: float) -> Tensor:
        flat = flat / self.world
        if self.world > 1:
            parts = torch.split(flat[:-1], [p.numel() for p in self.rest])
            for parameter, grad in zip(self.rest, parts, strict=True):
                parameter.grad = grad.view_as(parameter)
        for settings, lr in zip(self.adam.param_groups, self.adam_lrs, strict=True):
            settings["lr"] = lr * scale
        self.adam.step()
        return flat[-1]


def _wait(work: dist.Work | None) -> None:
    """On a GPU this makes the stream wait, not the host."""
    if work is not None:
        work.wait()


def _forget(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
