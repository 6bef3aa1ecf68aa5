"""The development text: in both layouts it is neither trained on nor part of the validation text."""

import json
import random
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SHARED, contest_folder, needs_fineweb
from pgolf.cli.main import main
from pgolf.data.dataset import CanonicalText, Dataset, load_tokenizer, open_dataset
from pgolf.data.shards import count_tokens, first_tokens, split_documents, write_shard
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.train.loader import batches

VOCAB = 2**16


def training_texts(data: Dataset) -> set[bytes]:
    processor = load_tokenizer(data.tokenizer)
    documents = (
        ids for shard in data.train_shards for ids in split_documents([(shard.path, shard.read(VOCAB))], data.bos)
    )
    return {processor.decode(ids.tolist()).encode() for ids in documents}


def build(folder: Path, texts: Sequence[str], *more: str) -> Path:
    source, out = folder / "texts.jsonl", folder / "data"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert main(["data", "build", str(source), *more, "--workers", "1", "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("more", [("--val-documents", "20"), ("--val", "texts")])
def test_built_splits_are_disjoint(tmp_path: Path, tokenizer_model: Path, seed: int, more: tuple[str, ...]) -> None:
    """Whatever repeats: each text is in one of the three splits, and none is lost."""
    generator = random.Random(seed)
    texts = [f"document {generator.randrange(60)} of sixty" for _ in range(150)]
    if "--val" in more:
        (tmp_path / "held.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[100:110]))
        more = ("--val", str(tmp_path / "held.jsonl"))
    data = open_dataset(build(tmp_path, texts, *more, "--dev-documents", "15", "--tokenizer", str(tokenizer_model)))
    train, development = training_texts(data), set(data.development_text().documents)
    validation = set(data.canonical_text().documents)
    assert train and development and validation
    assert train.isdisjoint(development) and train.isdisjoint(validation) and development.isdisjoint(validation)
    assert train | development | validation == {text.encode() for text in texts}


def test_a_hundredth_is_held_out_by_default(tmp_path: Path, tokenizer_model: Path) -> None:
    texts = [f"document {number}" for number in range(320)]
    data = open_dataset(build(tmp_path, texts, "--val-documents", "20", "--tokenizer", str(tokenizer_model)))
    assert data.development_text().documents == (b"document 20", b"document 21", b"document 22")
    assert len(training_texts(data)) == 297


def test_a_folder_without_one_says_what_to_do(dataset: Path) -> None:
    """Such as one that was built before there was a development text."""
    with pytest.raises(UsageError, match="--dev-documents"):
        open_dataset(dataset).development_text()


def test_a_changed_one_is_named(tmp_path: Path, tokenizer_model: Path) -> None:
    texts = [f"document {number}" for number in range(9)]
    more = "--val-documents", "2", "--dev-documents", "2", "--tokenizer", str(tokenizer_model)
    out = build(tmp_path, texts, *more)
    path = out / "dev.jsonl"
    path.write_text(path.read_text().replace("document 3", "document 8"))
    with pytest.raises(EnvironmentBroken, match=r"dev\.jsonl: the text's digest"):
        open_dataset(out).development_text()
    index = json.loads((out / "dataset.json").read_text())
    for field, value in (("file", "../texts.jsonl"), ("bytes", -1), ("documents", "2"), ("sha256", None)):
        changed = {**index, "development": {**index["development"], field: value}}
        (out / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(EnvironmentBroken, match=r"development|\.\./texts"):
            open_dataset(out).development_text()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 8), min_size=200, max_size=400), st.integers(1, 3), st.randoms(use_true_random=False))
def test_the_loader_yields_no_development_token(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_model: Path,
    lengths: list[int],
    count: int,
    generator: random.Random,
) -> None:
    """Contest's layout: every token but those of the last shard's end, and the development text lies in that end."""
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer_model))
    bos = processor.bos_id()
    names = [f"{number} " + "".join(generator.choices("xyz", k=length)) for number, length in enumerate(lengths)]
    documents = [[bos, *processor.encode(name)] for name in names]
    shards = [[t for d in documents for t in d] for _ in range(count)]
    repeated = generator.randrange(len(documents) - 4, len(documents))  # is validated too
    root = contest_folder(tmp_path_factory.mktemp("contest") / "data", tokenizer_model, shards, documents[repeated])
    data = open_dataset(root)
    total = sum(map(len, shards))
    end = len(shards[-1]) // 50
    assert count_tokens(data.train_shards) == total - end > 0
    expected = np.concatenate([np.array(shard) for shard in shards])[: total - end]
    assert first_tokens(data.train_shards, VOCAB, total).tolist() == expected.tolist()
    feed = batches(data.train_shards, VOCAB, 16, 8)
    epochs = np.concatenate([ids.numpy().ravel() for ids, _ in islice(feed, 2 * total // 16 + 1)])
    assert epochs.tolist() == np.resize(expected, len(epochs)).tolist()
    try:
        development = data.development_text().documents
    except UsageError as error:
        assert "too small" in str(error)
        return
    starts = dict(zip(names, np.cumsum([0, *map(len, documents)]).tolist(), strict=False))
    assert names[repeated].encode() not in development
    assert all(starts[document.decode()] >= len(shards[-1]) - end for document in development)


def test_opening_reads_no_training_token(tmp_path: Path, tokenizer_model: Path) -> None:
    """Trainers open the folder before the clock starts."""
    root = contest_folder(tmp_path / "data", tokenizer_model, [[1, 5] * 500], [1, 5])
    path = root / "fineweb_train_000000.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    data = open_dataset(root)
    assert count_tokens(data.train_shards) == 980
    with pytest.raises(EnvironmentBroken, match="magic"):
        data.train_shards[0].read(VOCAB)


def test_a_shard_with_fewer_tokens_than_the_index_is_named(tmp_path: Path, dataset: Path) -> None:
    (shard,) = open_dataset(shutil.copytree(dataset, tmp_path / "copy")).train_shards
    write_shard(shard.path, np.array([1], dtype=np.uint16))
    with pytest.raises(EnvironmentBroken, match="holds 1 tokens where the dataset has"):
        shard.read(VOCAB)


@needs_fineweb
def test_the_contests_own_folder_has_one() -> None:
    data = open_dataset(SHARED / "fineweb10B_sp1024")
    development = data.development_text()
    assert len(development.documents) >= 10 and development.bytes > 30_000
    assert set(development.documents).isdisjoint(data.canonical_text().documents)
    assert set(development.documents).isdisjoint(training_texts(data))


@given(st.integers(1, 40), st.integers(1, 50))
def test_spread_covers_the_text(documents: int, count: int) -> None:
    """At equal distances, in order, each document at most once."""
    text = CanonicalText(tuple(str(number).encode() for number in range(documents)))
    numbers = [int(document) for document in text.spread(count).documents]
    assert len(numbers) == min(documents, count) and numbers[0] == 0
    gaps = np.diff([*numbers, documents])
    assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
