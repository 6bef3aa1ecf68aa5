"""`pgolf data apart`: the contest's folders without the training documents that are validated."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import contest_folder
from pgolf.cli.main import main
from pgolf.data.build.apart import apart
from pgolf.data.dataset import open_dataset, overlap
from pgolf.data.shards import Shard, read_documents, token_count
from pgolf.errors import UsageError

DOCUMENT = st.lists(st.integers(300, 303), max_size=4)


def documents(root: Path) -> list[list[int]]:
    data = open_dataset(root)
    whole = [Shard(shard.path, token_count(shard.path)) for shard in data.train_shards]
    return [ids.tolist() for ids in read_documents(whole, data.vocab_size, data.bos)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(DOCUMENT, min_size=1, max_size=30),
    st.lists(DOCUMENT, min_size=1, max_size=4),
    st.lists(st.integers(0, 150), max_size=4),
)
def test_all_but_what_is_validated_stays(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_model: Path,
    training: list[list[int]],
    validation: list[list[int]],
    cuts: list[int],
) -> None:
    """In their order, wherever documents lie across shards; shards that lose nothing are the same files."""
    bos = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).bos_id()
    folder = tmp_path_factory.mktemp("apart")
    stream, val = ([t for ids in part for t in (bos, *ids)] for part in (training, validation))
    shards = [part.tolist() for part in np.split(np.array(stream), sorted(cuts)) if len(part)]
    root = contest_folder(folder / "data", tokenizer_model, shards, val)
    if all(ids in validation for ids in training):
        with pytest.raises(UsageError, match="every training document"):
            apart(open_dataset(root), folder / "out")
        assert [path.name for path in folder.iterdir()] == ["data"]
        return
    left_out = apart(open_dataset(root), folder / "out")
    assert documents(folder / "out") == [ids for ids in training if ids not in validation]
    assert sum(left_out.values()) == sum(ids in validation for ids in training)
    assert documents(root) == training
    for path in root.iterdir():
        new = folder / "out" / path.name
        if new.exists() and new.stat().st_size == path.stat().st_size:
            assert new.samefile(path)


def test_command(tmp_path: Path, tokenizer_model: Path, dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bos = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).bos_id()
    root = contest_folder(tmp_path / "data", tokenizer_model, [[bos, 300], [bos, 301, bos, 302]], [bos, 301])
    command = ["data", "apart", str(root), "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == {"fineweb_train_000001.bin": 1}
    assert (overlap(open_dataset(root)), overlap(open_dataset(tmp_path / "out"))) == (1, 0)
    assert main(command) == 2
    assert "out: exists; choose a new folder" in capsys.readouterr().err
    with pytest.raises(UsageError, match="was built by"):
        apart(open_dataset(dataset), tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out"]
