"""The naive baseline: model, weights file, trainer under its clock, and parity with the contest's own model."""

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch

from conftest import ROOT, SHARED, needs_fineweb
from pgolf import rules
from pgolf.artifact import read
from pgolf.data.loader import batches
from pgolf.data.shards import read_shard, write_shard
from trainers import finish, lines, load, losses, start, unpack, wait_for_steps

NAIVE = ROOT / "baselines" / "naive"
MODULES = ("model", "cache", "quant", "optim", "team", "runlog", "command", "loop", "predict", "train")
TINY = ["context=64", "layers=3", "dim=32", "heads=4", "kv_heads=2", "batch_tokens=512", "warmup_steps=2"]
TINY += ["compile=0", "log_every=1"]
TRAINER = NAIVE / "train.py"
FORMER = SHARED / "artifacts" / "d384_l7_seq512.int8.ptz"


@pytest.fixture(scope="module")
def naive() -> Iterator[Any]:
    yield from load(MODULES, NAIVE)


def tiny_model(naive: Any) -> Any:
    """A model whose every weight matters: projections start at zero, so all are moved."""
    torch.manual_seed(3)
    model = naive.model.GPT(naive.model.GPTConfig(vocab_size=96, context=32, layers=5, dim=48, heads=4, kv_heads=2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def options(data: Path, out: Path, *more: str) -> list[str]:
    sets = [f"--set={item}" for item in TINY]
    return ["--data", str(data), "--out", str(out), "--track", "laptop", *sets, *more]


# Model


def test_default_shape_is_the_contests(naive: Any) -> None:
    with torch.device("meta"):
        model = naive.model.GPT(naive.model.GPTConfig())
    assert sum(p.numel() for p in model.parameters()) == 17_059_912


def test_model_is_causal(naive: Any) -> None:
    model = tiny_model(naive)
    ids = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(4))
    changed = ids.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % 96
    with torch.no_grad():
        before, after, short = model(ids), model(changed), model(ids[:, :20])
    torch.testing.assert_close(before[:, :20], after[:, :20])
    torch.testing.assert_close(before[:, :20], short)
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_every_parameter_takes_part(naive: Any) -> None:
    model = tiny_model(naive)
    ids = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(5))
    model(ids, ids.roll(-1, 1)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_bf16_keeps_parameters_tables_and_logits_in_fp32(naive: Any) -> None:
    model = tiny_model(naive)
    ids = torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        exact = model(ids)
        model.dtype = torch.bfloat16
        rounded = model(ids)
    assert {t.dtype for t in (*model.parameters(), model.cos, model.sin, rounded)} == {torch.float32}
    assert 0 < (exact - rounded).abs().max() < 0.3


@needs_fineweb
def test_parity_with_the_contests_model(naive: Any) -> None:
    """A model trained by the contest's script, its own weights format: the published figure is 2.0076 in fp32."""
    (scripts,) = load(["contest_model"], ROOT / "scripts")
    weights = scripts.contest_model.contest_weights(FORMER)
    config = naive.model.GPTConfig(**scripts.contest_model.shape(weights), context=512)
    assert (config.layers, config.dim, config.heads, config.kv_heads, config.mlp_ratio) == (7, 384, 8, 4, 2)
    model = naive.model.GPT(config)
    model.load_state_dict(weights)
    data = SHARED / "fineweb10B_sp1024"
    tokens = read_shard(data / "fineweb_val_000000.bin", 1024)[: 65_536 + 1].astype(np.int64)
    x, y = torch.from_numpy(tokens[:-1]).view(-1, 512), torch.from_numpy(tokens[1:]).view(-1, 512)
    with torch.inference_mode():
        nats = np.mean([model(a, b).item() for a, b in zip(x.split(16), y.split(16), strict=True)])
    tokenizer = spm.SentencePieceProcessor(model_file=str(SHARED / "tokenizers" / "fineweb_1024_bpe.model"))
    documents = [d.tolist() for d in np.split(tokens, np.flatnonzero(tokens == 1))]
    size = sum(len(tokenizer.decode(d[1:]).encode()) for d in documents if d)
    assert nats / np.log(2) * 65_536 / size == pytest.approx(2.0076, abs=1e-4)


# Weights file


def test_quantisation_error_is_bounded(naive: Any) -> None:
    generator = torch.Generator().manual_seed(7)
    matrix = torch.randn(64, 96, generator=generator) * torch.logspace(-3, 1, 64)[:, None]
    matrix[3] = 0
    matrix[4, 5] = 30.0  # an outlier that sets its row's step
    codes, step = naive.quant.quantize(matrix)
    back = naive.quant.dequantize(codes, step)
    half_step = step.float()[:, None] / 2
    assert ((matrix - back).abs() <= half_step * 1.001 + 1e-12).all()
    usual = matrix.square().mean(1).sqrt() / naive.quant.FINEST
    assert (step.float() <= 1.001 * torch.maximum(usual, matrix.abs().amax(1) / 127).clamp_min(1e-4)).all()
    assert (back[3] == 0).all()


def test_weights_file_round_trip(naive: Any) -> None:
    model = tiny_model(naive)
    config, state = naive.quant.loads(naive.quant.dumps(vars(model.config), model.state_dict()))
    assert naive.model.GPTConfig(**config) == model.config
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        spread = tensor.square().mean().sqrt()
        assert (tensor - state[name]).abs().max() < 0.05 * spread


def test_damaged_weights_files_are_refused(naive: Any) -> None:
    model = tiny_model(naive)
    data = naive.quant.dumps(vars(model.config), model.state_dict())
    for cut in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(ValueError, match="weights"):
            naive.quant.loads(data[:cut])
    with pytest.raises(ValueError, match="weights"):
        naive.quant.loads(data + b"\0")


# Data


def test_batches_are_one_stream_for_any_world(tmp_path: Path) -> None:
    sizes, stream = (37, 5, 90), np.arange(132, dtype=np.uint16)
    shards = [tmp_path / f"train_{i}.bin" for i in range(3)]
    for shard, part in zip(shards, np.split(stream, np.cumsum(sizes)[:-1]), strict=True):
        write_shard(shard, part)
    endless = np.tile(stream, 8)
    for world in (1, 2, 4):
        feeds = [batches(shards, 132, 64, 8, rank=rank, world=world) for rank in range(world)]
        for k in range(10):
            ids, targets = (torch.cat(parts) for parts in zip(*map(next, feeds), strict=True))
            assert ids.shape == targets.shape == (8, 8)
            np.testing.assert_array_equal(ids.ravel(), endless[64 * k : 64 * (k + 1)])
            np.testing.assert_array_equal(targets.ravel(), endless[64 * k + 1 : 64 * (k + 1) + 1])


# Trainer


def test_warm_up_is_undone_bit_for_bit(naive: Any, dataset: Path, tmp_path: Path) -> None:
    train = naive.train
    args, team = naive.command.parse(options(dataset, tmp_path / "a.zst"), "", []), naive.team.Team()
    run = train.build(args, naive.command.read_settings(args, team, train.PRESETS), team)
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    random = torch.get_rng_state()
    naive.loop.warm_up(run, train.Trainer(run))
    assert all(torch.equal(t, before[name]) for name, t in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []


def test_budget_ends_in_time(naive: Any) -> None:
    clock, steps = naive.loop.Budget(None, 100.0, 2.0, 0), naive.loop.Budget(4, 1.0, 1.0, 0)
    assert clock.left(0, 0.0) == 50  # by the warm-up's steps
    assert (clock.left(10, 50.0), clock.done(10, 50.0)) == (10, 0.5)
    assert clock.left(1, 60.0, begun=58.0) == 20  # what came before the first step is no step
    assert clock.left(10, 96.0) < 1 <= clock.left(90, 97.0)  # a step has taken 9.6 s so far, or 1.1 s
    assert replace(clock, ahead=2).left(90, 97.0) < 1  # two steps are still under way
    assert (steps.left(3, 50.0), steps.left(4, 0.0), steps.done(3, 50.0)) == (1, 0, 0.75)


def test_two_ranks_train_like_one(naive: Any, dataset: Path, tmp_path: Path) -> None:
    # In fp32, where only the order of sums is left to differ.
    runs = [(tmp_path / "one.zst", 0), (tmp_path / "two.zst", 2)]
    more = "--steps", "8", "--set=micro_tokens=256", "--set=bf16=0"
    processes = [start(TRAINER, options(dataset, out, *more), n) for out, n in runs]
    for process in processes:
        finish(process)
    one, two = (losses(out.with_suffix(".jsonl")) for out, _ in runs)
    assert len(one) == len(two) == 8
    assert one[-1] < one[0] - 0.3
    np.testing.assert_allclose(one, two, atol=1e-3)


def test_artifact_and_log_of_a_timed_run(naive: Any, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.zst"
    printed = finish(start(TRAINER, options(dataset, out, "--seconds", "4")))
    assert f"pgolf score {out} --data {dataset}" in printed
    first, *steps, last = lines(out.with_suffix(".jsonl"))
    assert first["seed"] == 1
    assert first["settings"]["dim"] == 32
    assert [line["step"] for line in steps] == list(range(1, last["steps"] + 1))
    assert set(steps[0]) == {"step", "loss", "tokens", "seconds", "lr_scale", "tokens_per_second"}
    assert last["tokens"] == 512 * last["steps"]
    assert last["artifact_bytes"] == out.stat().st_size
    assert steps[-1]["lr_scale"] < steps[0]["lr_scale"] <= 1
    assert steps[-1]["seconds"] < last["seconds"] < 4.5  # half a second for a busy machine
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    folder = unpack(out, tmp_path / "unpacked")
    predictor = naive.predict.load(folder, torch.device("cpu"), 3, 20)
    logits = predictor.step(torch.ones(2, dtype=torch.long), torch.tensor([0, 2]))
    assert logits.shape == (2, json.loads((folder / "submission.json").read_text())["vocab_size"])
    assert logits.isfinite().all()


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_signal_ends_training_with_an_artifact(
    number: signal.Signals, ranks: int, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a.zst"
    process = start(TRAINER, options(dataset, out, "--seconds", "600"), ranks)
    wait_for_steps(out.with_suffix(".jsonl"))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert (process.returncode == 0) == (ranks == 0)  # torchrun reports the signal, whatever its workers did
    last = lines(out.with_suffix(".jsonl"))[-1]
    assert last["stopped"] and last["steps"] > 0
    assert read(out, rules.TRACKS["laptop"].artifact_bytes).size == last["artifact_bytes"]


@pytest.mark.parametrize(
    ("more", "code", "sentence"),
    [
        (["--data", "nowhere"], 2, "no such dataset"),
        (["--set", "dimm=3"], 2, "no such setting"),
        (["--set", "vocab_size=3"], 2, "no such setting"),
        (["--set", "dim=wide"], 2, "not a number"),
        (["--set", "dim=64.5"], 2, "not a number"),
        (["--set", "dim=30"], 2, "does not split into 4 heads"),
        (["--set", "layers=1"], 2, "at least 2"),
        (["--set", "batch_tokens=100"], 2, "not a multiple"),
        (["--seconds", "0.2"], 2, "too few"),
        (["--steps", "0"], 2, "positive"),
        (["--track", "unlimited"], 2, "no time limit"),
        (["--set", "dim=320", "--set", "compile=0"], 1, "the limit is 1,000,000"),
        (["--set", "vector_lr=1e39", "--steps", "9"], 1, "diverged"),
        (["--log", "/nowhere/log"], 3, "No such file"),
    ],
)
def test_errors_are_one_sentence(
    more: list[str], code: int, sentence: str, naive: Any, dataset: Path, tmp_path: Path, capfd: Any
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert naive.train.main(options(dataset, tmp_path / "a.zst", *more)) == code
    for number, handler in handlers.items():
        signal.signal(number, handler)
    error = capfd.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "a.zst").exists()


def test_a_rank_that_fails_ends_the_others(dataset: Path, tmp_path: Path) -> None:
    process = start(TRAINER, options(dataset, tmp_path / "a.zst", "--set=dim=320"), ranks=2)
    _, error = process.communicate(timeout=100)
    assert process.returncode != 0
    assert error.count("the limit is 1,000,000") == 1
    assert "another process" not in error and "RuntimeError" not in error


def test_world_size_must_divide_the_batch(
    naive: Any, dataset: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert naive.train.main(options(dataset, tmp_path / "a.zst")) == 2
    assert "8 sequences per step do not split evenly over 3 processes" in capfd.readouterr().err
