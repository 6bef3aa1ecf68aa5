"""The worked examples: a predictor that learns as it reads."""

import importlib.util
import inspect
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import ROOT, write_dataset
from pgolf import rules
from pgolf.artifact import read
from pgolf.score.score import score

BASELINES = ROOT / "baselines"
LIMIT = 16_000_000
TINY = ["context=64", "layers=2", "dim=32", "heads=2", "kv_heads=1", "batch_tokens=2048", "micro_tokens=2048"]
TINY += ["warmup_steps=2", "warmdown_steps=20", "compile=0"]


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about scores; a slow machine does not matter."""
    monkeypatch.setattr(rules, "AUDIT_SECONDS", 300.0)


def run(script: str, *args: object) -> None:
    command = [sys.executable, str(BASELINES / script), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def train(data: Path, out: Path, steps: int) -> Path:
    sets = [f"--set={item}" for item in TINY]
    run("naive/train.py", "--data", data, "--out", out, "--track", "laptop", "--steps", steps, *sets)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """English that repeats itself: the docstrings of a standard module, one document per class or function."""
    members = [getattr(tarfile.TarFile, name) for name in dir(tarfile.TarFile)] + [*vars(subprocess).values()]
    documents = [inspect.getdoc(member) or "" for member in members if callable(member)]
    documents = [text for text in documents if text.strip()] + [inspect.getsource(tarfile)[:20_000]]
    return write_dataset(tmp_path_factory.mktemp("examples") / "docs", documents, tokenizer_model)


@pytest.fixture(scope="module")
def naive(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A tiny naive artifact."""
    return train(data, tmp_path_factory.mktemp("naive") / "naive.zst", 30)


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory: pytest.TempPathFactory, naive: Path) -> Path:
    """The same weights behind the streaming predictor."""
    path = tmp_path_factory.mktemp("adaptive") / "adaptive.zst"
    run("adaptive/pack.py", naive, "--out", path, "--round", 1024)
    return path


def test_adaptive_beats_naive_on_the_same_weights(naive: Path, adaptive: Path, data: Path) -> None:
    """An honest gain: the audit finds no difference, and every member of the naive artifact is still there."""
    plain, learning = score(naive, data), score(adaptive, data)
    assert plain["status"] == learning["status"] == "ok", learning["reason"]
    assert learning["bpb"] < 0.9 * plain["bpb"]
    assert abs(learning["audit"]["largest"]) < 1e-3
    before, after = read(naive, LIMIT).members, dict(read(adaptive, LIMIT).members)
    assert after.pop("naive.py") == before["predict.py"]
    for name in ("submission.json", "predict.py"):
        after.pop(name)
    assert after == {name: content for name, content in before.items() if name in after}
    assert len(after) == len(before) - 2


@contextmanager
def loaded(artifact: Path, folder: Path) -> Iterator[Any]:
    """The artifact's own `predict` module, whose name and those of its helpers are given back afterwards."""
    for name, content in read(artifact, LIMIT).members.items():
        (folder / name).write_bytes(content)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("predict")
    finally:
        sys.path.remove(str(folder))
        for name in {"predict", "naive", "model", "quant"} - before:
            sys.modules.pop(name, None)


def test_adaptive_rows_depend_on_their_prefix_alone(adaptive: Path, tmp_path: Path) -> None:
    """Cut behind a row, alone, shuffled or asked twice: the row is the same; and documents may go on."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(2, 300, (n,), generator=generator) % 40 + 2 for n in (150, 1, 64, 300)]
    for ids in documents:
        ids[0] = 1
    with loaded(adaptive, tmp_path) as predict:
        predictor = predict.load(tmp_path, torch.device("cpu"))
        for _ in range(2):
            rows = torch.cat(list(predictor.predict(documents)))
            parts = list(rows.split([len(ids) for ids in documents]))
            torch.testing.assert_close(torch.cat(list(predictor.predict(documents))), rows, rtol=0, atol=0)
            for number, cut in ((0, 97), (2, 64), (3, 299), (3, 65), (1, 1)):
                alone = torch.cat(list(predictor.predict([documents[number][:cut]])))
                torch.testing.assert_close(alone, parts[number][:cut], rtol=1e-4, atol=1e-4)
            shuffled = torch.cat(list(predictor.predict(documents[::-1])))
            torch.testing.assert_close(shuffled, torch.cat(parts[::-1]), rtol=1e-4, atol=1e-4)
            predictor.update(documents)
        more = torch.randint(2, 40, (30,), generator=generator)
        first, second = (torch.cat(list(predictor.predict([more[:n], documents[0]]))) for n in (30, 20))
        torch.testing.assert_close(first[:20], second[:20], rtol=1e-4, atol=1e-4)
        predictor.update([more, documents[0]])


def test_adaptive_counts_are_kneser_ney(adaptive: Path, tmp_path: Path) -> None:
    """Probabilities of its counts against the textbook's formula over plain dictionaries."""
    text = torch.tensor([1, 5, 6, 5, 6, 7, 5, 6, 5, 7, 8, 5, 6, 7, 9])
    with loaded(adaptive, tmp_path) as predict:
        predictor = predict.load(tmp_path, torch.device("cpu"))
        predictor.count([(text[:9], 0)])
        predictor.count([(text[8:], 0)])
        history = predictor.contexts([text])
        with torch.inference_mode():
            p = predictor.ngram(history)
        vocab, order, discount = predictor.vocab, predict.ORDER, predict.DISCOUNT
    grams: list[dict[tuple[int, ...], int]] = [{} for _ in range(order + 1)]
    for piece in (text[:9].tolist(), text[8:].tolist()):
        for at in range(len(piece) - 1):
            padded = [1] * order + piece[: at + 2]
            key = tuple(padded[-order - 1 :])
            grams[order][key] = grams[order].get(key, 0) + 1
    for n in range(order - 1, -1, -1):
        for key in grams[n + 1]:
            grams[n][key[1:]] = grams[n].get(key[1:], 0) + 1

    def probability(context: tuple[int, ...], word: int) -> float:
        n = len(context)
        lower = probability(context[1:], word) if n else 1 / vocab
        follows = {key[-1]: times for key, times in grams[n].items() if key[:-1] == context}
        if not follows:
            return lower
        total = sum(follows.values())
        return max(follows.get(word, 0) - discount, 0) / total + discount * len(follows) / total * lower

    torch.testing.assert_close(p.sum(1), torch.ones(len(text)))
    for row in (0, 2, 5, 9, 14):
        context = tuple(([1] * order + text[: row + 1].tolist())[-order:])
        for word in (1, 5, 6, 7, 9, 100):
            assert float(p[row, word]) == pytest.approx(probability(context, word), rel=1e-5)


def test_adaptive_counts_stay_bounded(adaptive: Path, tmp_path: Path) -> None:
    """When there are too many keys, the rare ones are forgotten."""
    with loaded(adaptive, tmp_path) as predict:
        predict.MOST_KEYS = 10
        counts = predict.Counts(torch.device("cpu"))
        counts.add(torch.tensor([3, 3, 3, 3, 4, 4, 5]))
        counts.add(torch.arange(100, 108))
        assert counts.keys.tolist() == [3, 4]
        assert counts.times.tolist() == [2, 1]
        assert counts.sums.tolist() == [0, 2, 3]


def test_adaptive_refuses_other_artifacts(adaptive: Path, tmp_path: Path) -> None:
    """One sentence for what cannot be repacked."""
    command = [sys.executable, str(BASELINES / "adaptive" / "pack.py"), str(adaptive), "--out", str(tmp_path / "x.zst")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not an artifact of baselines/naive/train.py" in done.stderr
    assert list(tmp_path.iterdir()) == []
