"""The optimizer: Muon for the matrices of the blocks, Adam for tables and vectors, and all that ranks exchange.

Muon (Keller Jordan, https://kellerjordan.github.io/posts/muon/) moves each matrix by its momentum with all
singular values brought near 1. Matrices of one shape are a group, dealt over the ranks. A step is a pipeline
(parallel Muon, contest): all gradients are sent off at once, each rank receives the sum of its share only,
orthogonalises it while the next group's is still on its way, and sends the result off while it goes on.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""One steep quintic five times, from the Muon post."""


def orthogonalize(batch: Tensor, polar: bool = True, row_norm: bool = True) -> Tensor:
    """Matrices (N, R, C) with their singular values brought near 1, in bf16.

    With `row_norm` each row gets length 1 first, so that no row's gradient drowns another's (contest, MuonEq-R).
    """
    tall = batch.size(1) > batch.size(2)
    if row_norm:
        batch = batch / (batch.norm(dim=2, keepdim=True) + 1e-12)
    x = (batch / (1.01 * batch.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    x = x.mT if tall else x  # the Gram matrix is taken over the shorter side
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]]
    for a, b, c in [*safe, POLAR_EXPRESS[-1]] if polar else NEWTON_SCHULZ:
        gram = x @ x.mT  # (N, S, S)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Group:
    """Matrices of one shape; this rank holds the momentum of `share` of them."""

    def __init__(self, matrices: list[nn.Parameter], rank: int, world: int) -> None:
        self.matrices, self.world = matrices, world
        self.share = -(-len(matrices) // world)
        self.start = rank * self.share
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
        return own, dist.reduce_scatter_tensor(own, grads, async_op=True)

    def send_update(self, update: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Begin to collect the updates (N, R, C) of all ranks."""
        if self.world == 1:
            return update, None
        every = update.new_empty(self.world * self.share, *update.shape[1:])
        return every, dist.all_gather_into_tensor(every, update.contiguous(), async_op=True)


class Optimizer:
    """Both parts, with learning rates for matrices, tables and vectors."""

    def __init__(
        self,
        model: nn.Module,
        *,
        matrix_lr: float,
        table_lr: float,
        vector_lr: float,
        decay: float,
        orthogonalize: Callable[[Tensor], Tensor] = orthogonalize,
    ) -> None:
        """`decay` is the weight decay of matrices and tables, times their learning rates (decoupled)."""
        rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        tables, vectors = [], []
        owners = {id(p) for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
        for parameter in model.parameters():
            if id(parameter) in owners:
                shapes.setdefault(parameter.shape, []).append(parameter)
            else:
                (tables if parameter.ndim == 2 and len(parameter) > 64 else vectors).append(parameter)
        self.groups = [Group(matrices, rank, self.world) for matrices in shapes.values()]
        self.rest = [*tables, *vectors]
        self.adam = torch.optim.AdamW(
            [{"params": tables, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.8, 0.95),
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
            group.momentum.lerp_(grad, 1 - momentum)
            updates.append(group.send_update(self.orthogonalize(grad.lerp(group.momentum, momentum))))
        _wait(sent)
        loss = self._step_rest(flat, scale)
        lr = self.matrix_lr * scale
        for group, (update, arriving) in zip(self.groups, updates, strict=True):
            _wait(arriving)
            if self.decay:
                torch._foreach_mul_(group.matrices, 1 - lr * self.decay)
            each = list(update[: len(group.matrices)].float().unbind())
            torch._foreach_add_(group.matrices, each, alpha=-lr * group.size)
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
            parts = flat[:-1].split([p.numel() for p in self.rest])
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


def _forget(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None
