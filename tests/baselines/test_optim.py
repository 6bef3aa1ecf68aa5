"""Muon against a reference that handles one matrix at a time, and its split over ranks."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from conftest import ROOT
from trainers import load

NAIVE = ROOT / "baselines" / "naive"
SHAPES = [(24, 16), (16, 24), (24, 16), (16, 16), (24, 16)]


@pytest.fixture(scope="module")
def optim() -> Iterator[SimpleNamespace]:
    yield from load_optim()


def load_optim() -> Iterator[Any]:
    return (modules.optim for modules in load(["optim"], NAIVE))


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


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matches_one_matrix_at_a_time(optim: Any) -> None:
    parameters = matrices()
    expected = [p.detach().double() for p in parameters]
    velocities = [torch.zeros_like(e) for e in expected]
    muon = optim.Muon(parameters, exact_orthogonalize)
    for step in range(4):
        give_gradients(parameters, step)
        muon.step(0.1, 0.9)
        expected = [
            reference_step(e, p.grad.double(), v, 0.1, 0.9)
            for e, p, v in zip(expected, parameters, velocities, strict=True)
            if p.grad is not None
        ]
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(3, 24, 16), (3, 64, 64), (3, 128, 64), (3, 64, 128)])
def test_orthogonalize_follows_the_polynomial(optim: Any, shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = exact_orthogonalize(batch)
    # bf16 rounds to 2^-9 of each value, and the polynomial's slope of 3.4 at 0 grows that over five iterations.
    assert (optim.orthogonalize(batch).double() - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 128, 64), (3, 64, 128)])
def test_result_is_nearly_orthogonal(optim: Any, shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 1e-3
    singular = torch.linalg.svdvals(optim.orthogonalize(batch).float())
    # The smallest values of a square random matrix may be left behind; the bulk ends near 1.
    assert singular.max() < 1.3
    assert singular.quantile(0.1) > 0.6


def test_zero_gradient_moves_nothing(optim: Any) -> None:
    assert torch.equal(optim.orthogonalize(torch.zeros(2, 8, 8)), torch.zeros(2, 8, 8, dtype=torch.bfloat16))


def test_any_world_size_gives_the_same_weights(optim: Any, tmp_path: Path) -> None:
    alone = matrices()
    muon = optim.Muon(alone)
    for step in range(3):
        give_gradients(alone, step)
        muon.step(0.1, 0.9)
    mp.spawn(_rank, args=(2, str(tmp_path)), nprocs=2)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, b in zip(alone, together, strict=True):
            # Same arithmetic per matrix; only the batch that the kernel sees differs.
            torch.testing.assert_close(a.detach(), b, atol=2e-3, rtol=0)


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    optim = next(load_optim())
    parameters = matrices()
    muon = optim.Muon(parameters)
    for step in range(3):
        give_gradients(parameters, step)
        muon.step(0.1, 0.9)
    torch.save([p.detach() for p in parameters], Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_adam_gets_embedding_and_vectors(optim: Any) -> None:
    model = nn.Module()
    model.embed = nn.Embedding(8, 4)
    model.out = nn.Linear(4, 4, bias=False)
    model.scale = nn.Parameter(torch.ones(4))
    optimizer = optim.Optimizer(model, matrix_lr=0.1, embed_lr=0.2, vector_lr=0.3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(scale=0.5, momentum=0.9)
    # Adam's first step is the learning rate times the sign of the gradient.
    torch.testing.assert_close(model.embed.weight.detach(), before["embed.weight"] - 0.1)
    torch.testing.assert_close(model.scale.detach(), before["scale"] - 0.15)
    assert not torch.equal(model.out.weight, before["out.weight"])
    assert all(p.grad is None for p in model.parameters())
