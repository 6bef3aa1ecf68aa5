"""The worked examples: a predictor that learns as it reads."""

import inspect
import math
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
from pgolf.artifact import read
from pgolf.data.shards import read_shard
from pgolf.submission.modules import loaded

BASELINES = ROOT / "baselines"
LIMIT = 16_000_000
TINY = ["context=64", "layers=2", "dim=32", "heads=2", "kv_heads=1", "batch_tokens=2048", "micro_tokens=2048"]
TINY += ["warmup_steps=2", "warmdown_steps=20", "compile=0"]


def run(script: str, *args: object) -> None:
    command = [sys.executable, str(BASELINES / script), *map(str, args)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def train(data: Path, out: Path, steps: int) -> Path:
    sets = [f"--{item}" for item in TINY]
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
    """The same weights behind the predictor that learns."""
    path = tmp_path_factory.mktemp("adaptive") / "adaptive.zst"
    run("adaptive/pack.py", naive, "--out", path)
    return path


def test_adaptive_keeps_every_member(naive: Path, adaptive: Path) -> None:
    before, after = dict(read(naive, LIMIT).members), dict(read(adaptive, LIMIT).members)
    assert after.pop("naive.py") == before.pop("predict.py")
    for members in (before, after):
        members.pop("submission.json")
    after.pop("predict.py")
    assert after == before


@contextmanager
def predictor_of(artifact: Path, folder: Path) -> Iterator[Any]:
    """The artifact's own `predict` module, its members being unpacked into `folder`."""
    for name, content in read(artifact, LIMIT).members.items():
        (folder / name).write_bytes(content)
    with loaded(folder) as modules:
        yield modules.predict


def test_adaptive_beats_naive_on_the_same_weights(adaptive: Path, data: Path, tmp_path: Path) -> None:
    """Over a small text on 32 lanes, whose logits each come before the token that they are about."""
    tokens = torch.from_numpy(read_shard(next(data.glob("val_*.bin")), 2**16).astype("int64"))
    stream = tokens[: len(tokens) // 32 * 32].view(32, -1)
    lanes, nats = torch.arange(32), {"predict": 0.0, "naive": 0.0}
    with predictor_of(adaptive, tmp_path) as predict:
        for module in (predict, predict.naive):
            predictor = module.load(tmp_path, torch.device("cpu"), 32, stream.numel())
            for ids, targets in zip(stream.T, stream.T[1:], strict=False):
                loss = torch.nn.functional.cross_entropy(predictor.step(ids, lanes), targets)
                nats[module.__name__] += float(loss)
    assert nats["predict"] < 0.9 * nats["naive"]


def test_adaptive_cache_counts_this_document(adaptive: Path, tmp_path: Path) -> None:
    """What followed the last tokens earlier in the lane's document, against counting by hand."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(2, 6, (2, 120), generator=generator)
    text[0, 50] = text[1, 0] = 1  # a new document begins
    with predictor_of(adaptive, tmp_path) as predict:
        predictor, lanes = predict.load(tmp_path, torch.device("cpu"), 3, 240), torch.tensor([0, 2])
        for ids in text.T:
            predictor.step(ids, lanes)
        with torch.inference_mode():
            ngram = torch.full((2, predictor.vocab), 0.25)
            caches = predictor.caches(lanes, ngram)
    documents = [text[0, 50:].tolist(), text[1].tolist()]
    for n, ((cell, value), k) in enumerate(zip(caches, predict.CACHE, strict=True), 1):
        found = {
            (int(c) // predictor.vocab, int(c) % predictor.vocab): float(v) for c, v in zip(cell, value, strict=True)
        }
        expected: dict[tuple[int, int], float] = {}
        for row, document in enumerate(documents):
            for at in range(n, len(document)):
                if document[at - n : at] == document[-n:]:
                    expected[row, document[at]] = expected.get((row, document[at]), 0) + 1
        assert found == pytest.approx(
            {key: math.log1p(times / (k * 0.25)) for key, times in expected.items()}, rel=1e-5
        )


def test_adaptive_counts_what_all_lanes_show(adaptive: Path, tmp_path: Path) -> None:
    """Each token once, after the tokens of its lane and document; none for a lane's first token."""
    text = torch.tensor([[1, 5, 6, 1, 7], [1, 8, 1, 9, 5]])
    with predictor_of(adaptive, tmp_path) as predict:
        predictor = predict.load(tmp_path, torch.device("cpu"), 2, 10)
        for ids in text.T:
            predictor.step(ids, torch.arange(2))
        keys = torch.cat(predictor.shown)
        grams = [[int(key) // predictor.vocab**n % predictor.vocab for n in (3, 2, 1, 0)] for key in keys]
    ones = [[1, 1, 1, 5], [1, 1, 5, 6], [1, 5, 6, 1], [1, 1, 1, 7]]
    assert sorted(grams) == sorted([*ones, [1, 1, 1, 8], [1, 1, 8, 1], [1, 1, 1, 9], [1, 1, 9, 5]])


def test_adaptive_counts_are_kneser_ney(adaptive: Path, tmp_path: Path) -> None:
    """Probabilities of its counts against the textbook's formula over plain dictionaries."""
    text = torch.tensor([1, 5, 6, 5, 6, 7, 5, 6, 5, 7, 8, 5, 6, 7, 9])
    with predictor_of(adaptive, tmp_path) as predict:
        predictor = predict.load(tmp_path, torch.device("cpu"), 1, 15)
        vocab, order, discount = predictor.vocab, predict.ORDER, predict.DISCOUNT
        digits = vocab ** torch.arange(order).flip(0)
        with torch.inference_mode():
            for piece in (text[:9], text[8:]):
                contexts = torch.cat([piece.new_full((order - 1,), 1), piece]).unfold(0, order, 1) @ digits
                predictor.count((contexts[:-1] * vocab) + piece[1:])
            history = torch.cat([text.new_full((order - 1,), 1), text]).unfold(0, order, 1) @ digits
            p = predictor.ngram(history)
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
    with predictor_of(adaptive, tmp_path) as predict:
        predict.MOST_KEYS = 10
        counts = predict.Counts(torch.device("cpu"))
        counts.add(torch.tensor([3, 3, 3, 3, 4, 4, 5]), 4)
        counts.add(torch.arange(100, 108), 4)
        assert counts.keys.tolist() == [3, 4]
        assert counts.times.tolist() == [2, 1]
        assert counts.contexts.tolist() == [0, 1]
        assert counts.starts.tolist() == [0, 1]


def test_adaptive_refuses_other_artifacts(adaptive: Path, tmp_path: Path) -> None:
    """One sentence for what cannot be repacked."""
    command = [sys.executable, str(BASELINES / "adaptive" / "pack.py"), str(adaptive), "--out", str(tmp_path / "x.zst")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not an artifact of baselines/naive/train.py" in done.stderr
    assert list(tmp_path.iterdir()) == []
