"""The strong baseline: model and switches, optimizer, coder, quantiser, trainer."""

import itertools
import lzma
import os
import signal
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard

from conftest import ROOT
from pgolf import __version__, rules
from pgolf.artifact import read
from pgolf.errors import UsageError
from pgolf.train import loop, settings
from pgolf.train.ranks import Ranks
from trainers import finish, lines, load, losses, restore_signals, start, unpack, wait_for_steps

GOLF = ROOT / "baselines" / "golf"
TRAINER = GOLF / "train.py"
MODULES = ("mixer", "coder", "model", "cache", "quant", "predict", "train")
TINY = """
    context=64 layers=4 dim=32 heads=4 kv_heads=2 mlp_ratio=2 rope_dims=4 batch_tokens=512 xsa=2
    calibration_tokens=512 prior_bytes=0 ema=0.9 warmup_steps=2 compile=0 log_every=1
    floor=0
"""
SHAPE = {"vocab_size": 96, "context": 32, "layers": 5, "dim": 48, "heads": 4, "kv_heads": 2, "rope_dims": 4}
SHAPE |= {"mlp_ratio": 2, "xsa": 3}


signals = pytest.fixture(autouse=True)(restore_signals)


@pytest.fixture(scope="module")
def golf() -> Iterator[Any]:
    yield from load_golf()


def load_golf() -> Iterator[Any]:
    return load(MODULES, GOLF, GOLF.parent / "naive")


def tiny_model(golf: Any, **changes: Any) -> Any:
    """A model whose every weight matters: many start at zero, so all are moved."""
    torch.manual_seed(3)
    model = golf.model.GPT(golf.model.GPTConfig(**SHAPE | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def ids_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(96, shape or (2, 32), generator=torch.Generator().manual_seed(seed))


# Model


def test_main_preset_fits_its_limit(golf: Any) -> None:
    """Code, tokenizer and codes of 3.2 bits or more: below that quantisation costs too much."""
    with torch.device("meta"):
        model = golf.model.GPT(golf.model.GPTConfig())
    weights = sum(p.numel() for p in model.parameters())
    assert 30e6 < weights < 37e6
    assert weights * 3.2 / 8 + 180_000 < 16e6


def test_model_is_causal(golf: Any) -> None:
    model, ids = tiny_model(golf), ids_of(4) % 24
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 24
    with torch.no_grad():
        before, after, short = model(ids), model(changed), model(ids[:, :20])
    torch.testing.assert_close(before[:, :20], after[:, :20])
    torch.testing.assert_close(before[:, :20], short)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_every_parameter_takes_part(golf: Any) -> None:
    model = tiny_model(golf)
    ids = ids_of(5)
    model(ids, ids.roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize("off", ["xsa", "leak", "smear", "rope_dims"])
def test_each_switch_changes_the_model(golf: Any, off: str) -> None:
    on, changed = tiny_model(golf), tiny_model(golf, **{off: type(getattr(golf.model.GPTConfig(), off))(0)})
    changed.load_state_dict({k: v for k, v in on.state_dict().items() if k in changed.state_dict()})
    with torch.no_grad():
        assert not torch.allclose(on(ids_of(6)), changed(ids_of(6)))


def test_exclusive_attention_leaves_nothing_along_its_own_value(golf: Any) -> None:
    attention = tiny_model(golf).blocks[-1].attn
    y, v = torch.randn(2, 7, 4, 12), torch.randn(2, 7, 2, 12)
    out = attention.exclude(y, v)
    own = v.repeat_interleave(2, dim=2)  # heads 0 and 1 share the first value
    assert (out * own).sum(-1).abs().max() < 1e-5
    torch.testing.assert_close((out - y).norm(dim=-1), (F.cosine_similarity(y, own, dim=-1) * y.norm(dim=-1)).abs())


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_fused_loss_and_its_gradients(golf: Any, softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golf.model, "ROWS", 10)
    generator = torch.Generator().manual_seed(2)
    x, head = torch.randn(37, 8, generator=generator), torch.randn(50, 8, generator=generator) * 3
    targets = torch.randint(50, (37,), generator=generator)
    leaves = [t.double().requires_grad_() for t in (x, head)]
    fused = [t.detach().float().requires_grad_() for t in leaves]
    logits = leaves[0] @ leaves[1].T
    expected = F.cross_entropy(softcap * torch.tanh(logits / softcap) if softcap else logits, targets)
    loss = golf.model.capped_cross_entropy(*fused, targets, softcap)
    torch.testing.assert_close(loss.double(), expected)
    expected.backward()
    (loss * 1.0).backward()
    for a, b in zip(fused, leaves, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-3, atol=1e-6)


def test_compiles_without_graph_breaks(golf: Any) -> None:
    model, ids = tiny_model(golf), ids_of(7)
    compiled = torch.compile(model, dynamic=False, fullgraph=True, backend="aot_eager")
    loss = compiled(ids, ids)
    torch.testing.assert_close(loss, model(ids, ids))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# Coder


def gaussian(golf: Any, rows: int, columns: int, step: float, seed: int = 1) -> Any:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return golf.quant.quantize({"w": weight}, {}, step)["w"]


@pytest.mark.parametrize("step", [0.02, 0.3, 1.0, 4.0])
def test_weights_survive_their_file(golf: Any, step: float) -> None:
    coded = {"a": gaussian(golf, 64, 96, step), "b": gaussian(golf, 30, 7, step, 2)}
    plain = {"c": np.array([1.5, -2.25], np.float32), "d": np.zeros((2, 3), np.float32)}
    config, tensors = golf.coder.loads(golf.coder.dumps({"dim": 3}, coded, plain))
    assert config == {"dim": 3}
    assert list(tensors) == ["a", "b", "c", "d"]
    for name, matrix in coded.items():
        np.testing.assert_array_equal(tensors[name], matrix.weights())
    for name, tensor in plain.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_a_matrix_of_zeros_costs_nothing(golf: Any) -> None:
    zeros = golf.quant.quantize({"w": torch.zeros(64, 64)}, {}, 0.1)
    assert len(golf.coder.dumps({}, zeros, {})) < 150
    assert not golf.coder.loads(golf.coder.dumps({}, zeros, {}))[1]["w"].any()


def test_rows_like_the_one_before_cost_their_difference(golf: Any) -> None:
    one = gaussian(golf, 1, 256, 0.05)
    codes = one.codes + np.random.default_rng(1).integers(-1, 2, (200, 256), dtype=np.int32)
    coded = {"first": gaussian(golf, 3, 5, 0.3), "w": replace(one, codes=codes, scales=np.zeros(200, np.int32))}
    data = golf.coder.dumps({}, coded, {})
    assert len(data) < 1.05 * entropy_bytes(np.diff(codes, axis=0).ravel()) + 500
    np.testing.assert_array_equal(golf.coder.loads(data)[1]["w"], coded["w"].weights())


def entropy_bytes(codes: Any) -> float:
    counts = np.array(list(Counter(codes.tolist()).values()))
    return float((counts * np.log2(len(codes) / counts)).sum() / 8)


@pytest.mark.parametrize("step", [0.1, 0.4, 0.8])
def test_coded_size_is_the_entropy_and_beats_compressors(golf: Any, step: float) -> None:
    brotli = pytest.importorskip("brotli")
    coded = {str(i): gaussian(golf, 256, 512, step, i) for i in range(3)}
    size = len(golf.coder.dumps({}, coded, {}))
    assert size < 1.015 * sum(map(entropy_bytes, golf.coder.split(coded)))
    raw = b"".join(c.codes.astype(np.int8).tobytes() for c in coded.values())
    others = zstandard.ZstdCompressor(22).compress(raw), lzma.compress(raw, preset=9), zlib.compress(raw, 9)
    assert all(size < len(other) for other in (*others, brotli.compress(raw)))


def test_damaged_weights_files_are_refused(golf: Any) -> None:
    data = golf.coder.dumps({}, {"a": gaussian(golf, 16, 16, 0.3)}, {"c": np.ones(3)})
    for cut in (0, 7, 8, 40, len(data) - 3):
        with pytest.raises(ValueError, match="weights"):
            golf.coder.loads(data[:cut])


# Quantiser


def test_gptq_beats_rounding_where_inputs_are_correlated(golf: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(2, 48, 64, generator=generator)
    inputs = torch.randn(2, 2000, 8, generator=generator) @ torch.randn(2, 8, 64, generator=generator)
    inputs = inputs + 0.1 * torch.randn(2, 2000, 64, generator=generator)
    step = torch.full((2, 48), 0.3)
    nearest = golf.quant.round_nearest(weights, step)
    inverses = [golf.quant.InverseHessian.of(x.mT @ x) for x in inputs]
    gptq = golf.quant.round_gptq(weights, step, inverses, block=16)
    errors = [((codes * 0.3 - weights) @ inputs.mT).square().mean() for codes in (nearest, gptq)]
    assert errors[1] < 0.35 * errors[0]
    alone = golf.quant.round_gptq(weights[1:], step[1:], inverses[1:], block=64)
    assert (alone != gptq[1:]).float().mean() < 0.01  # neither batch nor block matters but for rounding


def test_gptq_without_usable_inputs_is_rounding(golf: Any) -> None:
    weights, step = torch.randn(1, 8, 6), torch.full((1, 8), 0.3)
    for gram in (torch.zeros(6, 6), torch.full((6, 6), torch.nan)):
        gptq = golf.quant.round_gptq(weights, step, [golf.quant.InverseHessian.of(gram)])
        assert torch.equal(gptq, golf.quant.round_nearest(weights, step))


def test_balance_spends_bits_where_rounding_hurts(golf: Any) -> None:
    """The logits are the sum of two linear maps, one of them times 0.1: its steps may be ten times as coarse."""
    torch.manual_seed(1)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 32, False), "b": torch.nn.Linear(64, 32, False)})
    weights = {name: p.detach() for name, p in model.named_parameters()}
    table = torch.randn(50, 64)
    with torch.no_grad():
        batches = torch.randint(50, (16, 4, 32))
        _, sensitivity = golf.quant.calibrate(
            model, lambda ids: model["a"](table[ids]) + 0.1 * model["b"](table[ids]), batches
        )
    steps = golf.quant.row_steps(weights, {}, sensitivity)
    ratio = steps["b.weight"].mean() / steps["a.weight"].mean()
    assert ratio == pytest.approx(10, rel=0.05)
    middle = (steps["b.weight"] * steps["a.weight"]).log().mean().exp() / (weights["a.weight"].std() ** 2)
    assert middle == pytest.approx(1, rel=0.05)  # as many of the one as of the other
    assert all(p.grad is None for p in model.parameters())


def test_sensitivity_is_the_divergence_that_small_errors_cause(golf: Any) -> None:
    torch.manual_seed(2)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(32, 40, False)})
    table = torch.randn(50, 32)
    ids = torch.randint(50, (64, 8, 32))
    _, sensitivity = golf.quant.calibrate(model, lambda ids: model["a"](table[ids]), ids)
    weight, rows = model["a"].weight.detach().double(), table[ids.flatten()].double()
    exact = (rows @ weight.mT).log_softmax(-1)
    for row in (0, 17, 39):
        found = []
        for _ in range(20):
            moved = weight.clone()
            moved[row] += 1e-3 * torch.randn(32)
            kl = F.kl_div((rows @ moved.mT).log_softmax(-1), exact, reduction="batchmean", log_target=True)
            found.append(2 * float(kl) / 1e-6 / 32)
        assert float(sensitivity["a.weight"][row]) == pytest.approx(np.mean(found), rel=0.3)


def test_calibration_refuses_predictions_that_overflow(golf: Any) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8, False)})
    ids = torch.zeros(1, 2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="predictions are no longer finite"):
        golf.quant.calibrate(model, lambda ids: model["a"](torch.full((*ids.shape, 8), torch.inf)), ids)


@pytest.mark.parametrize(
    ("tails", "beside", "limits"),
    [
        (1, 0, [200_000, 100_000, 60_001, 30_000, 9_000]),
        (1, 7000, [200_000, 60_001, 40_000, 30_000, 20_000, 16_000]),
        (3, 7000, [200_000, 60_001, 40_000, 30_000, 20_000, 16_000]),
    ],
)
def test_fit_lands_just_under_the_limit(golf: Any, tails: int, beside: int, limits: list[int]) -> None:
    """Where weights are normal and where a few are large, alone and beside bytes that no step changes."""
    numbers = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    weights = {"blocks.0.mlp.up.weight": numbers**tails}

    def dump(step: float) -> bytes:
        return golf.coder.dumps({}, golf.quant.quantize(weights, {}, step), {}) + bytes(beside)

    for limit in limits:
        data, step = golf.quant.fit(dump, limit, 512 * 256)
        assert len(data) <= limit
        assert dump(step) == data
        assert step == pytest.approx(golf.quant.FINEST) or len(data) > 0.998 * limit, limit


def test_fit_finds_what_only_coarse_steps_reach(golf: Any) -> None:
    data, step = golf.quant.fit(lambda step: b"x" * max(10, round(900 - 10 * step)), 300, 1000)
    assert len(data) <= 300
    assert step >= 60


@pytest.mark.parametrize("power", [0.2, 0.5, 1, 2, 4])
@pytest.mark.parametrize(("limit", "weights"), [(3_000, 100), (30_000, 10_000), (100_000, 10_000), (100_000, 200_000)])
def test_fit_fills_the_limit_however_the_size_grows(golf: Any, power: float, limit: int, weights: int) -> None:
    """Where the line through two tries leads nowhere, too."""
    quant = golf.quant

    def size(step: float) -> int:
        return 10 + round(weights / 8 * quant.bits(step) ** power)

    data, step = quant.fit(lambda step: b"x" * size(step), limit, weights)
    assert 0.93 * min(limit, size(quant.FINEST)) < len(data) == size(step) <= limit


def test_fit_says_when_nothing_does(golf: Any) -> None:
    with pytest.raises(ValueError, match="500 bytes at the coarsest"):
        golf.quant.fit(lambda step: b"x" * 500, 499, 1000)


# Trainer


def options(data: Path, out: Path, *more: str) -> list[str]:
    sets = [f"--{item}" for item in TINY.split()]
    return ["--data", str(data), "--out", str(out), "--track", "laptop", *sets, *more]


def built(golf: Any, data: Path, folder: Path, *more: str) -> Any:
    """The run of a command line, ready to train."""
    return golf.train.build(*settings.parse(options(data, folder / "a.zst", *more), "", golf.train.PRESETS), Ranks())


def test_training_text_is_coded_with_the_contexts_that_will_read_it(golf: Any, dataset: Path, tmp_path: Path) -> None:
    """What is switched off is off in both, or the predictor would read another text."""
    run = built(golf, dataset, tmp_path, "--prior_bytes=2000", "--off=text; order 2;word")
    text = np.arange(2, 200) % run.data.vocab_size
    alone = golf.mixer.Mixer(run.data.tokenizer, run.data.bos, 0, {"order 2", "word"})
    assert golf.train.Trainer(run).mixer.encode(text, 2000) == alone.encode(text, 2000)
    with pytest.raises(UsageError, match="off is 'order 7': no context is called 'order 7'; they are order 0, "):
        golf.train.Trainer(built(golf, dataset, tmp_path, "--prior_bytes=2000", "--off=order 7"))


@pytest.mark.parametrize(("until", "stops"), [("--seconds=9", 1), ("--steps=3", 0)])
def test_encoding_ends_with_a_timed_training(
    golf: Any, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: str, stops: int
) -> None:
    """Counted steps make the same artifact on any machine."""
    calls: list[int] = []
    trainer = golf.train.Trainer(built(golf, dataset, tmp_path, "--prior_bytes=2000", until))
    monkeypatch.setattr(trainer.mixer, "stop", lambda: calls.append(1))
    trainer.begin()
    assert trainer.members({})["prior.bin"]
    assert len(calls) == stops


def test_index_that_contradicts_its_tokenizer(golf: Any, dataset: Path, tmp_path: Path) -> None:
    """Tokens that the mixer does not have would be written beyond its tables."""
    run = built(golf, dataset, tmp_path, "--prior_bytes=2000")
    more = replace(run.settings, vocab_size=run.settings.vocab_size + 1)
    with pytest.raises(UsageError, match=r"has \d+ pieces, the dataset"):
        golf.train.Trainer(replace(run, settings=more))


def test_warm_up_is_undone_bit_for_bit(golf: Any, dataset: Path, tmp_path: Path) -> None:
    train = golf.train
    run = built(golf, dataset, tmp_path)
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    random = torch.get_rng_state()
    loop.warm_up(run, train.Trainer(run), ())
    assert all(torch.equal(t, before[name]) for name, t in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_train_like_one_and_its_artifact_predicts(golf: Any, dataset: Path, tmp_path: Path) -> None:
    runs = [(tmp_path / "one.zst", 0), (tmp_path / "two.zst", 2)]
    more = "--steps", "8", "--micro_tokens=256", "--bf16=0", "--prior_bytes=2000"
    processes = [start(TRAINER, options(dataset, out, *more), n) for out, n in runs]
    printed = [finish(process) for process in processes]
    one, two = (losses(o.with_suffix(".jsonl")) for o, _ in runs)
    assert len(one) == len(two) == 8
    assert one[-1] < one[0] - 0.3
    np.testing.assert_allclose(one, two, atol=1e-3)
    out = runs[0][0]
    assert f"pgolf score {out} --data {dataset}" in printed[0]
    first, *steps, last = lines(out.with_suffix(".jsonl"))
    assert first["settings"]["dim"] == 32
    assert last["artifact_bytes"] == out.stat().st_size
    assert steps[-1]["lr_scale"] < steps[0]["lr_scale"] <= 1
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    folder = unpack(out, tmp_path / "unpacked")
    alone = "import sys, torch, pathlib; sys.path[:0] = ['.']; import predict; "
    alone += "p = predict.load(pathlib.Path('.'), torch.device('cpu'), 2, 9); predict.LATE = -1; "
    alone += "slow = predict.load(pathlib.Path('.'), torch.device('cpu'), 2, 9); plans = p.plan, slow.plan; "
    alone += "slow.plan = p.plan; logits, same = (x.step(torch.ones(2).long(), torch.arange(2)) for x in (p, slow)); "
    alone += "print(logits.log_softmax(-1).exp().sum().item(), torch.equal(logits, same), *plans)"
    done = subprocess.run([sys.executable, "-I", "-c", alone], cwd=folder, capture_output=True, text=True)
    assert done.stdout, done.stderr
    total, same, plan, slow = done.stdout.split()
    assert float(total) == pytest.approx(2, abs=1e-4)
    assert int(plan) > int(slow) == 0 and same == "True"  # a slow machine follows a quicker one's plan


def test_warm_up_teaches_nothing(dataset: Path, tmp_path: Path) -> None:
    """The same losses and weights after one step of warm-up and after four."""
    outs = [tmp_path / f"{n}.zst" for n in (1, 4)]
    for out, n in zip(outs, (1, 4), strict=True):
        finish(start(TRAINER, options(dataset, out, "--steps", "4", "--bf16=0", f"--warmup_steps={n}")))
    assert losses(outs[0].with_suffix(".jsonl")) == losses(outs[1].with_suffix(".jsonl"))
    assert read(outs[0], 1_000_000).members["weights.bin"] == read(outs[1], 1_000_000).members["weights.bin"]


def test_packed_weights_are_the_average_of_the_last_steps(golf: Any, dataset: Path, tmp_path: Path) -> None:
    run = built(golf, dataset, tmp_path, "--ema=0.5")
    trainer, seen = golf.train.Trainer(run), []
    ids = torch.randint(run.data.vocab_size, (8, 64), generator=torch.Generator().manual_seed(1))
    for step in range(30):
        trainer.step(step, 1.0, 0.5, ids, ids)
        seen.append(run.model.embed.weight.detach().clone())
    trainer.save(tmp_path / "a.zst", iter([(ids, ids)] * 9), {})
    expected = seen[0]
    for step in range(1, 30):
        expected = expected.lerp(seen[step], max(0.5, 10 / (10 + step)))
    torch.testing.assert_close(run.model.embed.weight.detach(), expected)


def test_artifact_trains_again_from_its_own_code(dataset: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "a.zst", tmp_path / "b.zst"
    more = "--steps", "2", "--bf16=0"
    finish(start(TRAINER, options(dataset, first, *more)))
    folder = unpack(first, tmp_path / "code")
    command = [sys.executable, str(folder / "train.py"), *options(dataset, again, *more)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read(first, 1_000_000).members == read(again, 1_000_000).members
    assert read(again, 1_000_000).manifest.pgolf == __version__


LOSSES = """
import sys
sys.path[:0] = sys.argv[1:]
import train  # with what it sets for the compiler
import torch
from model import GPT, GPTConfig

config = GPTConfig(vocab_size=64, context=32, layers=1, dim=64, heads=2, kv_heads=1, rope_dims=0, xsa=0, softcap=0.0)
model = GPT(config)
ids, targets = torch.randint(64, (2, 64, 32))
compiled = torch.compile(model, dynamic=False, fullgraph=True)
for threads in (1, 2, 1):
    torch.set_num_threads(threads)
    loss = compiled(ids, targets)
    loss.backward()
    print(loss.item() / model(ids, targets).item())
"""


def test_loss_is_the_same_with_any_number_of_threads() -> None:
    """As torch compiles it: with dynamic threads a scalar sum was divided once by each of them."""
    folders = [str(TRAINER.parent), str(ROOT / "src")]
    done = subprocess.run([sys.executable, "-c", LOSSES, *folders], capture_output=True, text=True, check=True)
    assert [float(ratio) for ratio in done.stdout.split()] == pytest.approx([1, 1, 1], rel=1e-4)


def test_timed_run_ends_in_time(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zst"
    finish(start(TRAINER, options(dataset, out, "--seconds", "6")))
    _, *steps, last = lines(out.with_suffix(".jsonl"))
    assert last["steps"] == steps[-1]["step"] > 0
    ends = [(0, 0.0), *((step["step"], step["seconds"]) for step in steps)]
    slowest = max((t - before) / (n - m) for (m, before), (n, t) in itertools.pairwise(ends))  # of a busy machine
    assert ends[-1][1] < last["seconds"] < 6 + 2 * slowest


def test_sigterm_ends_training_with_an_artifact(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zst"
    process = start(TRAINER, options(dataset, out, "--seconds", "600"), ranks=2)
    log = out.with_suffix(".jsonl")
    wait_for_steps(log)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    last = lines(log)[-1]
    assert last["stopped"] and last["steps"] > 0
    assert read(out, rules.TRACKS["laptop"].artifact_bytes).size == last["artifact_bytes"]


def test_artifact_fills_the_limit_it_is_given(golf: Any, dataset: Path, tmp_path: Path) -> None:
    for limit in (80_000, 70_000):
        out = tmp_path / f"{limit}.zst"
        assert golf.train.main(options(dataset, out, "--steps", "40", "--dim=64", f"--limit={limit}")) == 0
        assert 0.9 * limit < out.stat().st_size <= limit


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        (["--data", "nowhere"], 2, "no such dataset"),
        (["--dimm=3"], 2, "Unrecognized options"),
        (["--dim=30"], 2, "does not split into 4 heads"),
        (["--matrix_lr=nan"], 2, "must be finite"),
        (["--smear=2"], 2, "a switch is 0 or 1"),
        (["--rope_dims=3"], 2, "odd or wider"),
        (["--dim=8", "--rope_dims=2"], 2, "below the 12 channels"),
        (["--prior_bytes=3"], 2, "prior_bytes is 3; it must be 0, or at least 64"),
        (["--limit=-1"], 2, "limit is -1; it cannot be below 0"),
        (["--prior_bytes=-5"], 2, "prior_bytes is -5; it must be 0, or at least 64"),
        (["--ema=1.5"], 2, "from 0 to 1"),
        (["--out", "."], 2, "is a folder"),
        (["--seconds", "inf"], 2, "must be finite"),
        (["--seconds", "0.2"], 2, "too few"),
        (["--track", "unlimited"], 2, "no time limit"),
        (["--limit=20000"], 1, "cannot fit its limit of 20,000 bytes"),
        (["--vector_lr=1e39", "--steps", "9"], 1, "diverged"),
        (["--log", "/nowhere/log"], 3, "No such file"),
    ],
)
def test_errors_are_one_sentence(
    more: list[str], code: int, sentence: str, golf: Any, dataset: Path, tmp_path: Path, capfd: Any
) -> None:
    assert golf.train.main(options(dataset, tmp_path / "a.zst", *more)) == code
    error = capfd.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "a.zst").exists()


def test_a_slower_machine_gets_a_coarser_plan(golf: Any) -> None:
    predict = golf.predict
    plans = [predict.affordable(20.0 * slower, 6.0 * slower, 70.0, 2) for slower in (0.1, 0.5, 1, 1.2, 2, 8)]
    assert plans[0] == predict.MOST and plans[-2:] == [predict.FEWEST, 0]
    assert plans == sorted(plans, reverse=True) and len(set(plans)) > 4
    assert predict.affordable(20.0, 6.0, 70.0, 16) > predict.affordable(20.0, 6.0, 70.0, 2)


@pytest.mark.parametrize("plan", [4, 12])
def test_predictions_visit_as_many_nodes_as_planned(plan: int, golf: Any) -> None:
    """Also when the text changes, and has twice as many nodes above a threshold."""

    visited: list[int] = []

    class Mixer:
        def decode(self, prior: bytes) -> Any:
            return iter(())

        def learn(self, ids: Any, lanes: Any) -> None:
            pass

        def predict(self, lanes: Any, p: Any, threshold: float, threads: int) -> int:
            visited.append(int(len(lanes) * (1 if len(visited) < 500 else 2) * threshold**-0.5))
            return visited[-1]

    network = SimpleNamespace(step=lambda ids, lane: torch.zeros(len(ids), 8))
    predictor = golf.predict.Predictor(network, Mixer(), b"")
    predictor.plan = plan
    lanes = torch.arange(64)
    for _ in range(1000):
        predictor.step(lanes % 8, lanes)
    assert np.mean(visited[200:500]) / 64 == pytest.approx(plan, rel=0.05)
    assert np.mean(visited[700:]) / 64 == pytest.approx(plan, rel=0.05)


def test_schedules(golf: Any) -> None:
    recipe = replace(golf.train.Settings(), warmdown=0.5, floor=0.1)
    assert [recipe.lr_scale(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 0.1]
    assert recipe.lr_scale(0.75) == pytest.approx(0.55)
