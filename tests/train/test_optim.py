"""Muon against a reference that handles one matrix at a time, and its split over ranks."""

import contextlib
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from pgolf.train import optim
from pgolf.train.ranks import Ranks

SHAPES = [(24, 16), (16, 24), (24, 16), (16, 16), (24, 16)]


def exact_orthogonalize(batch: Tensor) -> Tensor:
    """The Newton-Schulz polynomial applied to the singular values themselves, in fp64."""
    u, s, vh = torch.linalg.svd(batch.double(), full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s[:, None, :]) @ vh


def reference_step(weight: Tensor, grad: Tensor, velocity: Tensor, lr: float, momentum: float) -> Tensor:
    """Muon for one matrix in fp64."""
    velocity.mul_(momentum).add_(grad)
    update = exact_orthogonalize((grad + momentum * velocity)[None])[0]
    rows, columns = weight.shape
    return weight - lr * max(1.0, rows / columns) ** 0.5 * update


def model_of(shapes: Sequence[tuple[int, int]] = SHAPES) -> nn.Module:
    """Matrices (R, C) of some shapes, a table and a vector."""
    torch.manual_seed(1)
    model = nn.Module()
    model.matrices = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in shapes)
    model.table = nn.Embedding(8, 4)
    model.vector = nn.Parameter(torch.ones(4))
    return model


RATES = {"matrix_lr": 0.1, "table_lr": 0.2, "vector_lr": 0.3}


def test_matches_one_matrix_at_a_time() -> None:
    model = model_of()
    weights = [module.weight for module in model.matrices]
    expected = [w.detach().double() for w in weights]
    velocities = [torch.zeros_like(e) for e in expected]
    optimizer = optim.Optimizer(model, **RATES, orthogonalize=exact_orthogonalize)
    for _ in range(4):
        grads = [torch.randn_like(w) for w in weights]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad.clone()
        optimizer.step(1.0, 0.9, torch.zeros(()))
        expected = [
            reference_step(e, g.double(), v, 0.1, 0.9) for e, g, v in zip(expected, grads, velocities, strict=True)
        ]
    for weight, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach().double(), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 24, 16), (3, 64, 64), (3, 128, 64), (3, 64, 128)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_orthogonalize_follows_the_polynomial(shape: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = exact_orthogonalize(batch)
    # bf16 rounds to 2^-9 of each value, and the polynomial's slope of 3.4 at 0 grows that over five iterations.
    found = optim.orthogonalize(batch, dtype=dtype)
    assert found.dtype == dtype
    assert (found.double() - exact).norm() < error * exact.norm()


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 128, 64), (3, 64, 128)])
def test_result_is_nearly_orthogonal(shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    singular = torch.linalg.svdvals(optim.orthogonalize(batch).float())
    # The smallest values of a square random matrix may be left behind; the bulk ends near 1.
    assert singular.max() < 1.3
    assert singular.quantile(0.1) > 0.6


def test_zero_gradient_moves_nothing() -> None:
    assert torch.equal(optim.orthogonalize(torch.zeros(2, 8, 8)), torch.zeros(2, 8, 8, dtype=torch.bfloat16))


def train_a_little(model: nn.Module, rank: int = 0, world: int = 1) -> Any:
    """Three steps; each of two ranks has its own gradients, one alone has their mean."""
    in_fp32 = partial(optim.orthogonalize, dtype=torch.float32)
    optimizer = optim.Optimizer(model, **RATES, decay=0.1, orthogonalize=in_fp32)
    for step in range(3):
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + number)
            own = [torch.randn(parameter.shape, generator=generator) for _ in range(2)]
            parameter.grad = own[rank] if world == 2 else (own[0] + own[1]) / 2
        loss = optimizer.step(1.0, 0.9, torch.tensor(float(rank)))
    assert all(p.grad is None for p in model.parameters())
    return loss


def test_any_world_size_gives_the_same_weights(tmp_path: Path) -> None:
    alone = model_of()
    train_a_little(alone)
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert together.pop("loss") == 0.5
        for name, tensor in alone.state_dict().items():
            torch.testing.assert_close(tensor, together[name], atol=1e-4, rtol=0)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = model_of()
    loss = train_a_little(model, rank, world)
    torch.save(model.state_dict() | {"loss": loss}, Path(folder) / f"{rank}.pt")
    Ranks().leave()
    deadline = time.monotonic() + 20
    while threads_of_gloo():
        assert time.monotonic() < deadline, "a thread of the group is left, which may abort the exit"
        time.sleep(0.01)


def threads_of_gloo() -> int:
    count = 0
    for name in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            count += "gloo" in name.read_text()
    return count


def test_adam_gets_tables_and_vectors() -> None:
    model = model_of([(4, 4)])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.Optimizer(model, **RATES).step(0.5, 0.9, torch.zeros(()))
    # Adam's first step is the learning rate times the sign of the gradient.
    torch.testing.assert_close(model.table.weight.detach(), before["table.weight"] - 0.1)
    torch.testing.assert_close(model.vector.detach(), before["vector"] - 0.15)


def test_decay_shrinks_matrices_and_tables() -> None:
    model = model_of()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optim.Optimizer(model, **RATES, decay=0.5).step(1.0, 0.9, torch.zeros(()))
    for name, rate in [("matrices.0.weight", 0.1), ("table.weight", 0.2), ("vector", 0.0)]:
        torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * (1 - rate * 0.5))
