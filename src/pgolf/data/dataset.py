"""Dataset folders: training shards, validation shards, tokenizer and the canonical text.

Two layouts are read. pgolf's own has a `dataset.json` beside `train_*.bin`, `val_*.bin`,
`val_documents.jsonl` and `tokenizer.model`. The contest's published export has `fineweb_train_*.bin` and
`fineweb_val_*.bin`, with the `.model` in the same folder or in a `tokenizers` folder beside or above it; its
canonical text is the decoded validation shards.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

from pgolf.data.shards import read_shard, split_documents
from pgolf.errors import EnvironmentBroken, UsageError

FORMAT = 1
INDEX = "dataset.json"
_SAMPLE = 1024  # documents that are encoded again to see that shards and tokenizer belong together


@dataclass(frozen=True)
class CanonicalText:
    """The exact bytes that are scored."""

    documents: tuple[bytes, ...]

    @cached_property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents; boundaries count nothing."""
        return sum(map(len, self.documents))

    @cached_property
    def sha256(self) -> str:
        """Digest of the documents with their boundaries (see `text_digest`)."""
        return text_digest(self.documents)


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    name: str
    root: Path
    tokenizer: Path
    vocab_size: int
    bos: int
    train_shards: tuple[Path, ...]
    val_shards: tuple[Path, ...]
    index: dict[str, Any] | None
    """Contents of dataset.json; None for a folder in the contest's layout."""
    from_environment: bool = False

    def canonical_text(self) -> CanonicalText:
        """The validation text. Raises EnvironmentBroken when it is not what the folder promises."""
        return _decoded_text(self) if self.index is None else _stored_text(self, self.index)


def text_digest(documents: Iterable[bytes]) -> str:
    """SHA-256 over each document's length (8 bytes, little-endian) and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """A dataset's own SentencePiece model. Raises EnvironmentBroken when it cannot be read."""
    try:
        return spm.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise EnvironmentBroken(f"{path}: not a SentencePiece model") from None


def default_dataset() -> Path:
    """The only dataset folder below ./data. Raises UsageError when there is none or a choice to make."""
    found = sorted(path for path in Path("data").glob("*/") if _is_dataset(path))
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"--data is missing; choose one of {', '.join(map(str, found))}")
    raise UsageError("--data is missing and ./data holds no dataset; make one with `pgolf data demo`")


def open_dataset(root: Path) -> Dataset:
    """Open a dataset folder of either layout.

    Raises UsageError when `root` is no dataset, EnvironmentBroken when it is an incomplete one.
    """
    if not root.is_dir():
        raise UsageError(f"{root}: no such dataset folder; make one with `pgolf data demo`")
    if (root / INDEX).is_file():
        return _open_own(root)
    if any(root.glob("fineweb_val_*.bin")):
        return _open_contest(root)
    raise UsageError(f"{root}: holds neither {INDEX} nor fineweb_val_*.bin, so it is no dataset")


def _is_dataset(root: Path) -> bool:
    return (root / INDEX).is_file() or any(root.glob("fineweb_val_*.bin"))


def _open_own(root: Path) -> Dataset:
    path = root / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise EnvironmentBroken(f"{path}: format {index['format']} is not {FORMAT}; build it again")
        if not {"file", "sha256"} <= set(index["text"]):
            raise KeyError("text")
        shards = [root / shard["file"] for shard in index["shards"]]
        dataset = Dataset(
            name=index["name"],
            root=root,
            tokenizer=root / index["tokenizer"]["file"],
            vocab_size=index["tokenizer"]["vocab_size"],
            bos=index["tokenizer"]["bos"],
            train_shards=tuple(p for p in shards if p.name.startswith("train_")),
            val_shards=tuple(p for p in shards if p.name.startswith("val_")),
            index=index,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise EnvironmentBroken(f"{path}: not a dataset index ({error!r}); build it again") from None
    if not dataset.tokenizer.is_file() or file_digest(dataset.tokenizer) != index["tokenizer"]["sha256"]:
        raise EnvironmentBroken(f"{dataset.tokenizer}: missing or not the file that {path} describes")
    return dataset


def _open_contest(root: Path) -> Dataset:
    tokenizer = _contest_tokenizer(root)
    processor = load_tokenizer(tokenizer)
    return Dataset(
        name=root.resolve().name,
        root=root,
        tokenizer=tokenizer,
        vocab_size=processor.vocab_size(),
        bos=processor.bos_id(),
        train_shards=tuple(sorted(root.glob("fineweb_train_*.bin"))),
        val_shards=tuple(sorted(root.glob("fineweb_val_*.bin"))),
        index=None,
    )


def _contest_tokenizer(root: Path) -> Path:
    inside = sorted(root.glob("*.model"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise EnvironmentBroken(f"{root}: holds {len(inside)} .model files; leave only its own")
    vocab = re.search(r"_sp(\d+)$", root.resolve().name)
    name = f"fineweb_{vocab[1]}_bpe.model" if vocab else "fineweb_*_bpe.model"
    for folder in (root.resolve().parent, root.resolve().parent.parent):
        beside = sorted((folder / "tokenizers").glob(name))
        if len(beside) == 1:
            return beside[0]
    raise EnvironmentBroken(f"{root}: no tokenizer; put {name} into the folder or into ../tokenizers")


def _stored_text(dataset: Dataset, index: dict[str, Any]) -> CanonicalText:
    expected = index["text"]
    path = dataset.root / expected["file"]
    if not path.is_file():
        raise EnvironmentBroken(f"{path}: the canonical text is missing; build the dataset again")
    documents: list[bytes] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                documents.append(json.loads(line)["text"].encode())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise EnvironmentBroken(f"{path}: line {number}: not a document") from None
    text = CanonicalText(tuple(documents))
    if text.sha256 != expected["sha256"]:
        raise EnvironmentBroken(
            f"{path}: the canonical text's digest is {text.sha256[:16]}..., {INDEX} says "
            f"{expected['sha256'][:16]}...; the text was changed, so no score would mean anything"
        )
    return text


def _decoded_text(dataset: Dataset) -> CanonicalText:
    """Decode the contest's validation shards, and check that tokenizer and shards belong together.

    A wrong tokenizer decodes to nonsense without any error; encoding that again gives other tokens.
    """
    processor = load_tokenizer(dataset.tokenizer)
    documents: list[bytes] = []
    tokens: list[Any] = []
    for path in dataset.val_shards:
        shard = read_shard(path, dataset.vocab_size)
        tokens.extend(split_documents(path, shard, dataset.bos))
    step = max(1, len(tokens) // _SAMPLE)
    for number, ids in enumerate(tokens):
        text = processor.decode(ids.tolist())
        if number % step == 0 and not np.array_equal(processor.encode(text), ids):
            raise EnvironmentBroken(
                f"{dataset.tokenizer}: is not the tokenizer that made {dataset.val_shards[0].name}: document "
                f"{number} decodes to text that encodes to other tokens; put the right .model there"
            )
        documents.append(text.encode())
    return CanonicalText(tuple(documents))


def training_documents(dataset: Dataset) -> Iterator[bytes]:
    """Digest (16 bytes) of each training document's tokens, for the overlap check."""
    for path in dataset.train_shards:
        for ids in split_documents(path, read_shard(path, dataset.vocab_size), dataset.bos):
            yield document_digest(ids)


def document_digest(ids: Any) -> bytes:
    """BLAKE2b-128 of a document's token ids (N,), as little-endian uint16."""
    return hashlib.blake2b(np.asarray(ids, dtype="<u2").tobytes(), digest_size=16).digest()


def overlap(dataset: Dataset) -> int:
    """How many training documents are validation documents too (0 in a sound dataset)."""
    validation = {
        document_digest(ids)
        for path in dataset.val_shards
        for ids in split_documents(path, read_shard(path, dataset.vocab_size), dataset.bos)
    }
    return sum(digest in validation for digest in training_documents(dataset))
