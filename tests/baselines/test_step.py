"""Predictors in step form: what is shown token by token gives the logits that whole windows give."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import ROOT
from trainers import load

NAIVE, GOLF = ROOT / "baselines" / "naive", ROOT / "baselines" / "golf"
SHAPE = {"vocab_size": 96, "context": 16, "layers": 5, "dim": 48, "heads": 4, "kv_heads": 2, "mlp_ratio": 2}


SWITCHES = {"rope_dims": 4, "xsa": 3}


@pytest.fixture
def naive() -> Iterator[Any]:
    yield from load(("model", "quant", "cache", "predict"), NAIVE)


@pytest.fixture
def golf() -> Iterator[Any]:
    yield from load(("mixer", "coder", "model", "cache", "predict"), GOLF, NAIVE)


def moved(model: Any) -> Any:
    """The model with every weight moved, for many start at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def naive_model(naive: Any, **changes: Any) -> Any:
    return moved(naive.model.GPT(naive.model.GPTConfig(**SHAPE | changes)))


def golf_model(golf: Any, **changes: Any) -> Any:
    return moved(golf.model.GPT(golf.model.GPTConfig(**SHAPE | SWITCHES | changes)))


def ids_of(seed: int, *shape: int) -> Tensor:
    return torch.randint(96, shape, generator=torch.Generator().manual_seed(seed))


def stepped(predictor: Any, ids: Tensor) -> Tensor:
    """Log-probabilities (B, T, V) when ids (B, T) are shown one by one, in all lanes."""
    lanes = torch.arange(len(ids))
    return torch.stack([predictor.step(column, lanes).float().log_softmax(-1) for column in ids.T], 1)


def in_windows(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids).log_softmax(-1)


def close(one: Tensor, two: Tensor) -> None:
    """To 1e-5 nats."""
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_steps_equal_a_window(naive: Any, kv_heads: int) -> None:
    model = naive_model(naive, kv_heads=kv_heads)
    ids = ids_of(1, 3, 16)
    close(stepped(naive.predict.Predictor(model, 3), ids), in_windows(model, ids))


def test_rolling_cache_is_the_last_tokens(naive: Any) -> None:
    """In a model of two layers, the first of which only adds; so the reach of one attention shows."""
    model = naive_model(naive, layers=2)
    with torch.no_grad():
        model.blocks[0].attn_scale.zero_()
    ids = ids_of(2, 2, 3 * 16)
    found = stepped(naive.predict.Predictor(model, 2), ids)
    for end in range(16, ids.size(1) + 1):
        close(found[:, end - 1], in_windows(model, ids[:, end - 16 : end])[:, -1])


def test_lanes_are_independent(naive: Any) -> None:
    """Whichever others are active beside it, a lane's logits are those that it gets alone."""
    model, generator = naive_model(naive), torch.Generator().manual_seed(4)
    ids, at = ids_of(3, 6, 40), torch.zeros(6, dtype=torch.int64)
    expected = torch.stack([stepped(naive.predict.Predictor(model, 1), row[None])[0] for row in ids])
    predictor = naive.predict.Predictor(model, 6)
    for _ in range(60):
        lane = (torch.rand(6, generator=generator) < 0.6).logical_and(at < 40).nonzero().squeeze(1)
        if len(lane):
            found = predictor.step(ids[lane, at[lane]], lane).log_softmax(-1)
            close(found, expected[lane, at[lane]])
            at[lane] += 1
    assert at.min() > 20


def test_steps_in_bf16(naive: Any) -> None:
    model = naive_model(naive)
    ids = ids_of(5, 2, 40)
    exact = stepped(naive.predict.Predictor(model, 2), ids)
    model.dtype = torch.bfloat16
    rounded = stepped(naive.predict.Predictor(model, 2), ids)
    assert rounded.isfinite().all()
    assert (rounded - exact).abs().mean() < 0.1 < exact.std()


OFF = [{}, {"xsa": 0}, {"leak": 0.0}, {"smear": False}, {"rope_dims": 0}]


@pytest.mark.parametrize("change", [*OFF, {"softcap": 0.0, "kv_heads": 1}])
def test_golf_steps_equal_a_window(golf: Any, change: dict[str, Any]) -> None:
    """With every switch, and without each."""
    model = golf_model(golf, **change)
    ids = ids_of(6, 3, 16) % 24
    close(stepped(golf.predict.Network(model, 3), ids), in_windows(model, ids))


def test_golf_cache_rolls(golf: Any) -> None:
    """As in a window of the last tokens; without smear, for which the window's first token has none before it."""
    model = golf_model(golf, layers=2, smear=False)
    with torch.no_grad():
        model.blocks[0].attn_scale.zero_()
    ids = ids_of(7, 2, 40) % 24
    found = stepped(golf.predict.Network(model, 2), ids)
    for end in range(16, 41):
        close(found[:, end - 1], in_windows(model, ids[:, end - 16 : end])[:, -1])


def test_golf_lanes_are_independent(golf: Any) -> None:
    model, lane = golf_model(golf), torch.tensor([0, 2, 3])
    ids = ids_of(8, 4, 24) % 24
    predictor, alone = golf.predict.Network(model, 4), golf.predict.Network(model, 1)
    expected = stepped(alone, ids[2:3])[0]
    found = []
    for at in range(24):
        active = lane if at % 3 else lane[1:]
        found.append(predictor.step(ids[active, at], active)[-2].log_softmax(-1))
    close(torch.stack(found), expected)


def test_golf_steps_in_bf16(golf: Any) -> None:
    model = golf_model(golf)
    ids = ids_of(5, 2, 40) % 24
    exact = stepped(golf.predict.Network(model, 2), ids)
    model.dtype = torch.bfloat16
    rounded = stepped(golf.predict.Network(model, 2), ids)
    assert rounded.isfinite().all()
    assert (rounded - exact).abs().mean() < 0.1 < exact.std()
