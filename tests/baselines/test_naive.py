"""The naive baseline: model, weights file, trainer under its clock, and parity with the contest's own model."""

import fcntl
import io
import json
import os
import pty
import signal
import sys
import termios
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
import torch

from conftest import ROOT, SHARED, needs_fineweb
from pgolf import rules
from pgolf.artifact import read
from pgolf.data.shards import Shard, read_shard, write_shard
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import beside
from pgolf.train import loop, settings
from pgolf.train.loader import batches
from pgolf.train.log import Log, say
from pgolf.train.ranks import Ranks
from trainers import LINUX_ONLY, finish, lines, load, losses, restore_signals, start, unpack, wait_for_steps

NAIVE = ROOT / "baselines" / "naive"
MODULES = ("model", "cache", "quant", "predict", "train")
TINY = ["context=64", "layers=3", "dim=32", "heads=4", "kv_heads=2", "batch_tokens=512", "warmup_steps=2"]
TINY += ["compile=0", "log_every=1"]
TRAINER = NAIVE / "train.py"
GOLF_TRAINER = NAIVE.parent / "golf" / "train.py"
FORMER = SHARED / "artifacts" / "d384_l7_seq512.int8.ptz"


signals = pytest.fixture(autouse=True)(restore_signals)


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
    sets = [f"--{item}" for item in TINY]
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
    (scripts,) = load(["contest_model"], ROOT / "scripts" / "benchmarks")
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
    shards = [Shard(tmp_path / f"train_{i}.bin", size) for i, size in enumerate(sizes)]
    for shard, part in zip(shards, np.split(stream, np.cumsum(sizes)[:-1]), strict=True):
        write_shard(shard.path, part)
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
    run = train.build(*settings.parse(options(dataset, tmp_path / "a.zst"), "", train.PRESETS), Ranks())
    before = {name: t.clone() for name, t in run.model.state_dict().items()}
    random = torch.get_rng_state()
    loop.warm_up(run, train.Trainer(run), ())
    assert all(torch.equal(t, before[name]) for name, t in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []


def test_budget_ends_in_time(naive: Any) -> None:
    clock, steps = loop.Budget(None, 100.0, 2.0, 0), loop.Budget(4, 1.0, 1.0, 0)
    assert clock.left(0, 0.0) == 50  # by the warm-up's steps
    assert (clock.left(10, 50.0), clock.done(10, 50.0)) == (10, 0.5)
    assert clock.left(1, 60.0, begun=58.0) == 20  # what came before the first step is no step
    assert clock.left(10, 96.0) < 1 <= clock.left(90, 97.0)  # a step has taken 9.6 s so far, or 1.1 s
    assert replace(clock, in_flight=2).left(90, 97.0) < 1  # two steps are still under way
    assert (steps.left(3, 50.0), steps.left(4, 0.0), steps.done(3, 50.0)) == (1, 0, 0.75)


def test_two_ranks_train_like_one(naive: Any, dataset: Path, tmp_path: Path) -> None:
    # In fp32, where only the order of sums is left to differ.
    runs = [(tmp_path / "one.zst", 0), (tmp_path / "two.zst", 2)]
    more = "--steps", "8", "--micro_tokens=256", "--bf16=0"
    processes = [start(TRAINER, options(dataset, out, *more), n) for out, n in runs]
    for process in processes:
        finish(process)
    one, two = (losses(out.with_suffix(".jsonl")) for out, _ in runs)
    assert len(one) == len(two) == 8
    assert one[-1] < one[0] - 0.3
    np.testing.assert_allclose(one, two, atol=1e-3)


def test_artifact_and_log_of_a_timed_run(naive: Any, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "Jürgen.zst"
    printed = finish(start(TRAINER, options(dataset, out, "--seconds", "4")))
    assert f"pgolf score '{out}' --data {dataset}".replace("ü", "\\xfc") in printed
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


@pytest.mark.parametrize(("number", "ranks"), [(signal.SIGINT, 0), (signal.SIGHUP, 2)])
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
        (["--dimm=3"], 2, "Unrecognized options"),
        (["--vocab_size=3"], 2, "Unrecognized options"),
        (["--dim=wide"], 2, "'wide' is not a whole number"),
        (["--dim=64.5"], 2, "not a whole number"),
        (["--dim=30"], 2, "does not split into 4 heads"),
        (["--layers=1"], 2, "at least 2"),
        (["--batch_tokens=100"], 2, "not a multiple"),
        (["--seconds", "0.2"], 2, "too few"),
        (["--steps", "0"], 2, "positive"),
        (["--steps", f"{10**400}"], 2, "at most"),
        (["--seconds", "nan"], 2, "finite"),
        (["--seed", "-1"], 2, "from 0 to"),
        (["--seed", f"{2**63}"], 2, "at most"),
        (["--steps", "5", "--seconds", "5"], 2, "give one"),
        (["--track", "moon"], 2, "--track moon: choose from main, "),
        (["--preset", "moon"], 2, "--preset moon: choose from main, "),
        (["moon"], 2, "Unrecognized options: moon"),
        (["--dim=1099511627776"], 3, "out of memory"),
        (["--track", "unlimited"], 2, "no time limit"),
        (["--dim=320"], 1, "the limit is 1,000,000"),
        (["--vector_lr=1e39", "--steps", "9"], 1, "diverged"),
        (["--log", "/nowhere/log"], 3, "No such file"),
        (["--log", "/"], 2, "is a folder"),
        (["--out", "/dev/null"], 3, "/dev/null: is a device, not a file that can be replaced"),
    ],
)
def test_errors_are_one_sentence(
    more: list[str], code: int, sentence: str, naive: Any, dataset: Path, tmp_path: Path, capfd: Any
) -> None:
    assert naive.train.main(options(dataset, tmp_path / "a.zst", *more)) == code
    error = capfd.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert not (tmp_path / "a.zst").exists()


def test_a_rank_that_fails_ends_the_others(dataset: Path, tmp_path: Path) -> None:
    process = start(TRAINER, options(dataset, tmp_path / "a.zst", "--dim=320"), ranks=2)
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


# Machines and terminals as they are


@pytest.mark.parametrize(
    ("artifact", "log"),
    [
        ("a.zst", "a.jsonl"),
        ("lr0.01", "lr0.01.jsonl"),
        ("lr0.01.zst", "lr0.01.jsonl"),
        ("a.png", "a.png.jsonl"),
        ("a.zst.zst", "a.zst.jsonl"),
        ("x/a.b/c", "x/a.b/c.jsonl"),
    ],
)
def test_names_beside_an_artifact_are_appended(artifact: str, log: str) -> None:
    assert beside(Path(artifact), ".jsonl") == Path(log)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--log", "HERE/a.zst"], "--out and --log are both"),
        (["--log", "HERE/link"], "--out and --log are both"),
        (["--log", "HERE/a.png"], "--log and the picture of the loss are both"),
        (["--log", "DATA/train_000000.bin"], "--log DATA/train_000000.bin lies in the dataset folder"),
        (["--out", "DATA/val_000000.bin"], "--out DATA/val_000000.bin lies in the dataset folder"),
        (["--out", "HERE/data/new/a.zst"], "--out HERE/data/new/a.zst lies in the dataset folder"),
        (["--out", "HERE/folder.zst"], "the log HERE/folder.jsonl is a folder"),
    ],
)
def test_collisions_are_refused_before_training(
    more: list[str], sentence: str, naive: Any, dataset: Path, tmp_path: Path, capfd: Any
) -> None:
    (tmp_path / "link").symlink_to("a.zst")
    (tmp_path / "data").symlink_to(dataset)
    (tmp_path / "folder.jsonl").mkdir()
    before = {path: path.read_bytes() for path in dataset.iterdir()}, sorted(tmp_path.rglob("*"))
    places = {"HERE": str(tmp_path), "DATA": str(dataset)}
    for name, place in places.items():
        more, sentence = [item.replace(name, place) for item in more], sentence.replace(name, place)
    assert naive.train.main(options(dataset, tmp_path / "a.zst", *more)) == 2
    assert sentence in capfd.readouterr().err
    assert before == ({path: path.read_bytes() for path in dataset.iterdir()}, sorted(tmp_path.rglob("*")))


def test_a_log_has_one_writer(naive: Any, dataset: Path, tmp_path: Path, capfd: Any) -> None:
    first = Log(tmp_path / "a.jsonl", 1, 1.0, 1, 1)
    first.write(step=1)
    assert naive.train.main(options(dataset, tmp_path / "a.zst", "--steps", "1")) == 2
    assert "another run is writing this log" in capfd.readouterr().err
    assert lines(tmp_path / "a.jsonl") == [{"step": 1}]
    first.close()
    Log(tmp_path / "a.jsonl", 1, 1.0, 1, 1).close()
    assert lines(tmp_path / "a.jsonl") == []


def test_a_figure_that_json_has_not_ends_no_run(tmp_path: Path) -> None:
    log = Log(tmp_path / "a.jsonl", 1, 1.0, 1, 1)
    log.write(step=1)
    log.write(bits=float("nan"))
    assert log.failure and lines(tmp_path / "a.jsonl") == [{"step": 1}]


def test_results_are_complete_before_the_picture(
    naive: Any, dataset: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    plot = Log.plot

    def plot_later(log: Any, path: Path) -> str | None:
        found.extend([lines(tmp_path / "a.jsonl")[-1], (tmp_path / "a.zst").stat().st_size, path.name])
        return plot(log, path)

    monkeypatch.setattr(Log, "plot", plot_later)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as if it were not installed
    assert naive.train.main(options(dataset, tmp_path / "a.zst", "--steps", "2")) == 0
    last, size, picture = found
    assert (last["steps"], last["artifact_bytes"], picture) == (2, size, "a.png")
    printed = capfd.readouterr()
    assert "score it with" in printed.out
    assert printed.err.count("\n") == 1 and "a.png: no picture" in printed.err
    assert not (tmp_path / "a.png").exists()


def test_a_picture_that_cannot_be_written_is_one_line(naive: Any, tmp_path: Path) -> None:
    fault = Log(None, 1, 1.0, 1, 1).plot(tmp_path / "missing" / "a.png")
    assert (
        fault
        == f"{tmp_path}/missing/a.png: no picture ([Errno 2] No such file or directory: '{tmp_path}/missing/a.png')"
    )


@pytest.mark.parametrize("name", ["$x^", "a_{", "\udcff", "\u57fa\u7ebf"])
def test_any_name_has_a_picture(name: str, naive: Any, tmp_path: Path, capfd: Any) -> None:
    log = Log(None, 1, 1.0, 1, 1)
    log.step(1, 2.0, 1.0, 1.0)
    assert log.plot(tmp_path / f"{name}.png") is None
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert capfd.readouterr().err == ""


def test_a_full_disk_under_the_log_costs_the_log_only(naive: Any, dataset: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "a.zst"
    assert naive.train.main(options(dataset, out, "--steps", "2", "--log", "/dev/full")) == 3
    assert capfd.readouterr().err == (
        f"train.py: /dev/full: No space left on device; the log is cut short, {out} is complete\n"
    )
    assert read(out, 1_000_000).manifest.name == "naive baseline"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-16"])
def test_any_text_can_be_said_on_any_terminal(encoding: str, naive: Any) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    say("Jürgen \u57fa \udcff", stream)
    assert "rgen" in stream.buffer.getvalue().decode(encoding)


def test_a_reader_that_is_gone_ends_nothing(naive: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        say("to nobody", stream)
        stream.write("and the exit flushes in peace")


def test_a_bar_on_a_lost_terminal_leaves_nothing_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, end = pty.openpty()
    with os.fdopen(end, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log = Log(tmp_path / "a.jsonl", None, 100.0, 1, 1)
        os.close(terminal)
        log.step(1, 2.0, 50.0, 1.0)
        log.close()
        stream.flush()  # as at the exit of Python


def test_a_lost_terminal_ends_training_with_an_artifact(dataset: Path, tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and from then on every write to the terminal fails."""
    terminal, end = pty.openpty()

    def attach() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        fcntl.ioctl(end, termios.TIOCSCTTY, 0)

    streams = {"stdin": end, "stdout": end, "stderr": end}
    args = options(dataset, tmp_path / "a.zst", "--seconds", "600")
    process = start(TRAINER, args, **streams, start_new_session=True, preexec_fn=attach)
    os.close(end)
    wait_for_steps(tmp_path / "a.jsonl")
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    last = lines(tmp_path / "a.jsonl")[-1]
    assert last["stopped"] and last["artifact_bytes"] == (tmp_path / "a.zst").stat().st_size


def test_signals_that_the_caller_ignores_stay_ignored(naive: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    stop = settings.stop_on_signals()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.is_set()
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_end_before_the_clock_leaves_nothing(
    number: signal.Signals, naive: Any, dataset: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naive.train, "pack", lambda *_: signal.raise_signal(number))
    signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored
    assert naive.train.main(options(dataset, tmp_path / "a.zst")) == 130
    assert capfd.readouterr().err == "train.py: interrupted before the clock started\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trainer", [TRAINER, GOLF_TRAINER])
def test_interrupted_imports_give_no_traceback(trainer: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "coder.py").write_text("import torch\n")
    process = start(trainer, [], env={"PYTHONPATH": str(tmp_path)})
    assert process.stdout and process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == -signal.SIGINT


def test_a_compiler_that_cannot_compile_means_eager_mode(dataset: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"  # it is there, and answers, and cannot build
    compiler.write_text(
        "#!/bin/sh\ncase $* in *-shared*) echo 'fatal error: Python.h' >&2; exit 1;; esac; exec g++ $*\n"
    )
    compiler.chmod(0o755)
    more = "--steps", "2", "--compile=1"
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    process = start(TRAINER, options(dataset, tmp_path / "a.zst", *more), env=environment)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert error.startswith("train.py: torch.compile does not work here (fatal error: Python.h); training without it")
    assert error.count("\n") == 1
    assert lines(tmp_path / "a.jsonl")[0]["compiled"] is False


def test_one_rank_without_a_compiler_is_enough_for_eager_mode(naive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, laptop = Ranks(), naive.train.LAPTOP
    monkeypatch.setattr(settings, "compiler_error", lambda: None)
    assert settings.use_compiler(laptop, ranks)
    assert not settings.use_compiler(replace(laptop, compile=False), ranks)
    monkeypatch.setattr(ranks, "all_reduce_max", lambda *_: [1.0])
    assert not settings.use_compiler(laptop, ranks)


def test_a_compiler_failure_later_on_is_the_machines_fault(naive: Any) -> None:
    from torch._inductor.exc import CppCompileError

    fault = CppCompileError(["nvcc"], "note\nfatal error: no room\n")
    expected = pytest.raises(EnvironmentBroken, match=r"torch\.compile failed \(fatal error: no room\).*compile=0$")
    with expected, settings.one_sentence(naive.train.LAPTOP):
        raise fault


def test_help_is_the_table_of_settings(naive: Any) -> None:
    """With the defaults of the track, on a terminal that knows ASCII only."""
    printed = finish(start(TRAINER, ["--track", "laptop", "--help"]))
    for field in fields(naive.train.Settings):
        assert (f"  --{field.name} " in printed) == (field.name != "vocab_size")
    assert "Width of the residual stream. (default: 128)" in printed
    assert "example:" in printed
    assert len(finish(start(GOLF_TRAINER, ["--help"]))) > len(printed)  # its help has letters beyond ASCII


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1" + 400 * "0", "", "x", "2"])
def test_settings_outside_their_kind_are_refused(text: str, naive: Any, dataset: Path, tmp_path: Path) -> None:
    for field in fields(naive.train.Settings):
        kind = type(getattr(naive.train.LAPTOP, field.name))
        if field.name == "vocab_size" or (text == "2" and kind is not bool):
            continue
        args = options(dataset, tmp_path / "a.zst", f"--{field.name}={text}")
        with pytest.raises(UsageError, match=f"--{field.name}"):
            settings.parse(args, "", naive.train.PRESETS)


def test_the_largest_seed_can_be_used(naive: Any, dataset: Path, tmp_path: Path) -> None:
    args = options(dataset, tmp_path / "a.zst", f"--seed={2**63 - 1}")
    naive.train.build(*settings.parse(args, "", naive.train.PRESETS), Ranks())


@pytest.mark.parametrize(
    ("variable", "value", "code", "sentence"),
    [("RANK", "first", 3, "must be numbers"), ("WORLD_SIZE", "2", 2, "start with torchrun, or unset it")],
)
def test_half_of_torchruns_environment_is_one_sentence(
    variable: str, value: str, code: int, sentence: str, naive: Any, dataset: Path, capfd: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv(variable, value)
    assert naive.train.main(options(dataset, Path("a.zst"))) == code
    error = capfd.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.parametrize("trainer", [TRAINER, GOLF_TRAINER])
def test_training_needs_nothing_that_only_linux_has(trainer: Path, dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "mac.py").write_text(LINUX_ONLY)
    args = options(dataset, tmp_path / "a.zst", "--steps", "2")
    finish(start(tmp_path / "mac.py", [str(trainer), *args]))
    assert lines(tmp_path / "a.jsonl")[-1]["steps"] == 2
    assert (tmp_path / "a.png").is_file()
