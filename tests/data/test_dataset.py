"""Dataset folders: both layouts open, and whatever is off is named with its file and offset."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from conftest import DOCUMENTS, SHARED, MakeArtifact, needs_fineweb, write_dataset
from pgolf.data.dataset import open_dataset, overlap
from pgolf.data.shards import HEADER_BYTES, Shard, count_tokens, first_tokens, read_shard, split_documents, write_shard
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.score.score import score

FINEWEB = SHARED / "fineweb10B_sp1024"


def test_text_is_what_was_written(dataset: Path) -> None:
    """The canonical text comes back with its boundaries; empty documents count."""
    text = open_dataset(dataset).canonical_text()
    assert [document.decode() for document in text.documents] == list(DOCUMENTS)
    assert text.bytes == sum(len(document.encode()) for document in DOCUMENTS)


def test_overlap_counts_training_documents_that_are_validated(dataset: Path) -> None:
    """The fixture's training shard is its validation shard, so every document is seen."""
    assert overlap(open_dataset(dataset)) == len(DOCUMENTS)


def test_overlap_with_a_dataset_in_other_tokens(dataset: Path, tmp_path: Path) -> None:
    """Its validation documents are compared in the tokens of the training text."""
    model = tmp_path / "other.model"
    with model.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS),
            model_writer=file,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            hard_vocab_limit=False,
            minloglevel=2,
        )
    other = write_dataset(tmp_path / "other", [*DOCUMENTS[2:6], "seen nowhere else"], model)
    assert overlap(open_dataset(dataset), open_dataset(other)) == 4
    unseen = write_dataset(tmp_path / "unseen", ["seen nowhere else"], model)
    assert overlap(open_dataset(dataset), open_dataset(unseen)) == 0


def shard(path: Path, tokens: list[int]) -> Path:
    write_shard(path, np.array(tokens, dtype=np.uint16))
    return path


def damage(path: Path, offset: int, value: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("offset", "value", "expected"),
    [
        (0, b"\0\0\0\0", "offset 0: magic number is 0"),
        (4, b"\7\0\0\0", "offset 4: version is 7"),
        (8, b"\xff\xff\0\0", "offset 8: the header promises 65535 tokens"),
        (8, b"\xff\xff\xff\xff", "offset 8: the header promises -1 tokens"),
        (HEADER_BYTES + 6, b"\x40\0", f"offset {HEADER_BYTES + 6}: token 64 is outside the vocabulary of 64"),
    ],
)
def test_damaged_shards_are_named(tmp_path: Path, offset: int, value: bytes, expected: str) -> None:
    """Each damage is one sentence with file and byte offset."""
    path = shard(tmp_path / "val_000000.bin", [1, 5, 6, 7, 1, 9])
    damage(path, offset, value)
    with pytest.raises(EnvironmentBroken) as caught:
        read_shard(path, 64)
    assert f"{path}: {expected}" in str(caught.value)


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, HEADER_BYTES + 11])
def test_truncated_shards_are_named(tmp_path: Path, size: int) -> None:
    """A shard cut anywhere is refused."""
    path = shard(tmp_path / "val_000000.bin", [1, 5, 6, 7, 1, 9])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(EnvironmentBroken, match=r"val_000000\.bin: offset"):
        read_shard(path, 64)


def test_shard_that_begins_inside_a_document(tmp_path: Path) -> None:
    """Documents are told apart by BOS, so a shard without one at its start belongs to something else."""
    path = shard(tmp_path / "val_000000.bin", [5, 1, 6])
    with pytest.raises(EnvironmentBroken, match="the first token is not BOS"):
        list(split_documents([(path, read_shard(path, 64))], 1))


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the small dataset that a test may spoil."""
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', "[" * 200_000, '{"a":' * 200_000, "9" * 5000])
def test_broken_index(copy: Path, content: str) -> None:
    """A dataset.json that is none is one sentence."""
    (copy / "dataset.json").write_text(content)
    with pytest.raises(EnvironmentBroken, match=r"dataset\.json"):
        open_dataset(copy)


FIELDS = [
    ("name",), ("environment",), ("shards",), ("shards", 0), ("shards", 0, "file"), ("shards", 1, "sha256"),
    ("shards", 1, "tokens"),
    ("tokenizer",), ("tokenizer", "file"), ("tokenizer", "sha256"), ("tokenizer", "vocab_size"), ("tokenizer", "bos"),
    ("tokenizer", "transform"), ("text",), ("text", "file"), ("text", "sha256"), ("text", "bytes"),
    ("text", "documents"),
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: "-".join(map(str, field)))
@pytest.mark.parametrize("value", [3.5, -1, 1 << 40, [], ["file", "sha256"], {}, "a\0b", "text"])
def test_every_field_of_the_index_is_checked(copy: Path, field: tuple[str | int, ...], value: object) -> None:
    """A wrong type or size is one sentence that names the field, when the dataset is opened or its text is read."""
    index = json.loads((copy / "dataset.json").read_text())
    entry = index
    for key in field[:-1]:
        entry = entry[key]
    if isinstance(value, str) and field[-1] in ("name", "file", "sha256"):
        value = [value]  # these are strings
    entry[field[-1]] = value
    (copy / "dataset.json").write_text(json.dumps(index))
    if (field, value) == (("shards",), []):
        return  # no shards: allowed
    with pytest.raises(EnvironmentBroken) as caught:
        open_dataset(copy)
    assert f"dataset.json: {field[0]}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("field", [("shards", 0), ("shards", 1), ("tokenizer",), ("text",)], ids=str)
@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "sub/../../outside", "link", "folder/x", "circle"])
def test_the_files_of_a_dataset_lie_in_its_folder(copy: Path, field: tuple[str | int, ...], name: str) -> None:
    """A name or a link that leads elsewhere is one sentence."""
    index = json.loads((copy / "dataset.json").read_text())
    entry = index
    for key in field:
        entry = entry[key]
    outside = copy.parent / "outside"
    outside.mkdir()
    shutil.copy(copy / entry["file"], outside / "x")
    (copy / "link").symlink_to(outside / "x")
    (copy / "folder").symlink_to(outside)
    (copy / "circle").symlink_to("circle")
    (copy / "sub").mkdir()
    entry["file"] = name
    (copy / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(EnvironmentBroken, match="lies outside the dataset's folder; copy the file itself into it"):
        open_dataset(copy).canonical_text()


def test_a_dataset_folder_may_be_a_link(copy: Path) -> None:
    """And links that stay inside it are followed."""
    (copy.parent / "link").symlink_to(copy)
    (copy / "val_documents.jsonl").rename(copy / "text")
    (copy / "val_documents.jsonl").symlink_to("text")
    assert open_dataset(copy.parent / "link").canonical_text().sha256 == open_dataset(copy).canonical_text().sha256


@pytest.mark.parametrize("name", ["dataset.json", "val_documents.jsonl", "tokenizer.model", "val_000000.bin"])
def test_what_is_no_regular_file_is_not_waited_for(copy: Path, name: str) -> None:
    """A FIFO blocks whoever opens it."""
    (copy / name).unlink()
    os.mkfifo(copy / name)
    with pytest.raises((EnvironmentBroken, UsageError), match=name if name != "dataset.json" else "is no dataset"):
        dataset = open_dataset(copy)
        dataset.canonical_text()
        overlap(dataset)


@pytest.mark.parametrize(
    "line", ["[" * 200_000, "[]", '{"text": 7}', '{"text": "\\ud800"}', "", '{"text": "' + "a" * 9]
)
def test_a_broken_text_is_one_sentence(copy: Path, line: str) -> None:
    """With the line's number."""
    path = copy / "val_documents.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(EnvironmentBroken, match="line 4: not a document"):
        open_dataset(copy).canonical_text()


@pytest.mark.parametrize("line", ['{"text": "' + "a" * 9_000_000 + '"}', "\n".join(['{"text": ""}'] * 9000)])
def test_no_more_text_is_held_than_the_index_promises(copy: Path, line: str) -> None:
    """Neither bytes nor documents; what follows is not read."""
    path = copy / "val_documents.jsonl"
    path.write_text(line + "\n" + path.read_text())
    tracemalloc.start()
    try:
        with pytest.raises(EnvironmentBroken, match=r"val_documents\.jsonl"):
            open_dataset(copy).canonical_text()
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_marks_of_a_dataset(copy: Path) -> None:
    """Whether its text can be rebuilt from the environment, and what stands before its tokenizer."""
    dataset = open_dataset(copy)
    assert (dataset.from_environment, dataset.transform) == (False, None)
    index = json.loads((copy / "dataset.json").read_text())
    index["environment"] = True
    index["tokenizer"]["transform"] = "case-1"
    (copy / "dataset.json").write_text(json.dumps(index))
    dataset = open_dataset(copy)
    assert (dataset.from_environment, dataset.transform) == (True, "case-1")


def test_exchanged_tokenizer(dataset: Path, tmp_path: Path) -> None:
    """The tokenizer is part of the dataset: another file under its name is noticed."""
    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    damage(root / "tokenizer.model", 100, b"?")
    with pytest.raises(EnvironmentBroken, match=r"tokenizer.model: not the file that"):
        open_dataset(root)


def test_folder_without_data(tmp_path: Path) -> None:
    """Neither layout: wrong usage."""
    with pytest.raises(UsageError, match="is no dataset"):
        open_dataset(tmp_path)


def contest_folder(root: Path, model: str) -> Path:
    """The contest's layout, with a tokenizer of our choice under the contest's name."""
    root.mkdir()
    for path in FINEWEB.glob("*.bin"):
        (root / path.name).symlink_to(path)
    shutil.copy(SHARED / "tokenizers" / model, root / "fineweb_1024_bpe.model")
    return root


@needs_fineweb
def test_contest_folder_counts() -> None:
    """Documents, tokens and bytes of the contest's text; its own byte table counts the same bytes."""
    data = open_dataset(FINEWEB)
    text = data.canonical_text()
    tokens = data.val_shards[0].read(1024)
    assert (len(text.documents), len(tokens), text.bytes) == (901, 1_040_060, 2_504_310)
    processor = spm.SentencePieceProcessor(model_file=str(data.tokenizer))
    assert int(table_bytes(processor, tokens[:-1], tokens[1:]).sum()) == text.bytes
    assert overlap(data) == 0


def table_bytes(processor: spm.SentencePieceProcessor, before: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Bytes per token by the contest's rule: the piece's, and one for a leading space unless a control is before."""
    vocab = range(processor.vocab_size())
    special = [processor.is_control(i) or processor.is_unknown(i) or processor.is_unused(i) for i in vocab]
    pieces = [processor.id_to_piece(i) for i in vocab]
    space = [not s and p.startswith("▁") for p, s in zip(pieces, special, strict=True)]
    size = [
        0 if s else 1 if processor.is_byte(i) else len(p.removeprefix("▁").encode())
        for i, (p, s) in enumerate(zip(pieces, special, strict=True))
    ]
    return np.array(size)[tokens] + (np.array(space)[tokens] & ~np.array(special)[before])


@needs_fineweb
@pytest.mark.parametrize("model", ["lossy_1024_bpe.model", "fineweb_4096_bpe.model"])
def test_contest_shards_beside_a_wrong_tokenizer(tmp_path: Path, make_artifact: MakeArtifact, model: str) -> None:
    """It decodes to nonsense without any error; the folder is refused, the submission is not blamed."""
    root = contest_folder(tmp_path / "fineweb10B_sp1024", model)
    with pytest.raises(EnvironmentBroken, match="is not the tokenizer that made"):
        open_dataset(root).canonical_text()
    artifact = make_artifact("def load(root, device): ...\n")
    record = score(artifact, root)
    assert record.status == "failed" and "is not the tokenizer that made" in record.reason


@needs_fineweb
def test_contest_folder_without_tokenizer(tmp_path: Path) -> None:
    """The sentence says which file is missing and where to put it."""
    root = contest_folder(tmp_path / "fineweb10B_sp1024", "fineweb_1024_bpe.model")
    (root / "fineweb_1024_bpe.model").unlink()
    with pytest.raises(EnvironmentBroken, match=r"put fineweb_1024_bpe.model into the folder"):
        open_dataset(root)


def test_changed_text(dataset: Path, tmp_path: Path) -> None:
    """A text that does not match its digest gives no score."""
    root = tmp_path / "copy"
    shutil.copytree(dataset, root)
    lines = (root / "val_documents.jsonl").read_text().splitlines()
    lines[6] = json.dumps({"text": "long"})
    (root / "val_documents.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(EnvironmentBroken, match="digest"):
        open_dataset(root).canonical_text()


def test_first_tokens_open_no_shard_behind_them(tmp_path: Path) -> None:
    shards = [Shard(tmp_path / name, 3) for name in ("a.bin", "b.bin", "damaged.bin")]
    for shard, start in zip(shards, (0, 3, 6), strict=True):
        write_shard(shard.path, np.arange(start, start + 3, dtype=np.uint16))
    assert count_tokens(shards) == 9
    assert first_tokens(shards, 10, 99).tolist() == list(range(9))
    shards[2].path.write_bytes(b"no shard")
    for most in range(7):
        assert first_tokens(shards, 10, most).tolist() == list(range(most))
    with pytest.raises(EnvironmentBroken, match="damaged"):
        first_tokens(shards, 10, 7)
