"""Dataset folders: training shards, validation shards, tokenizer and the canonical text.

Two layouts are read. pgolf's own has a `dataset.json` beside `train_*.bin`, `val_*.bin`,
`val_documents.jsonl` and `tokenizer.model`. The contest's published export has `fineweb_train_*.bin` and
`fineweb_val_*.bin`, with the `.model` in the same folder or in a `tokenizers` folder beside or above it; its
canonical text is the decoded validation shards.

Beside the validation text stands the development text, on which ideas are compared: no training text, and never the
text that is scored in the end. pgolf's own layout has it in `dev.jsonl`; in the contest's it is the end of the last
training shard, which `Dataset.train_shards` therefore leaves out.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

from pgolf.data.shards import Shard, read_documents, read_shard, split_documents, token_count
from pgolf.data.transforms import TRANSFORMS
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import open_regular, read_regular

FORMAT = 1
INDEX = "dataset.json"
VOCAB_SIZE = 1 << 16  # tokens are uint16

# What is read into memory is bounded before it is.
TEXT_BYTES = 1 << 30  # of a canonical text
TEXT_DOCUMENTS = 1 << 24
INDEX_BYTES = 1 << 26
TOKENIZER_BYTES = 1 << 28

DEVELOPMENT_SHARE = 50  # 1 in 50 tokens of the last training shard of a contest folder is held out ...
DEVELOPMENT_TOKENS = 250_000  # ... and at most this many: some 600 kB of text

_SAMPLE = 1024  # documents that are encoded again to see that shards and tokenizer belong together
_SHARD_TOKENS = (1 << 31) - 1  # the header's count is an int32
_ESCAPED = 6  # bytes of JSON for a byte of text, at most


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

    def spread(self, count: int) -> "CanonicalText":
        """At most `count` of the documents, at equal distances over the text."""
        every, count = len(self.documents), min(count, len(self.documents))
        return CanonicalText(tuple(self.documents[number * every // count] for number in range(count)))


@dataclass(frozen=True)
class Dataset:
    """An opened dataset folder."""

    name: str
    root: Path
    tokenizer: Path
    vocab_size: int
    bos: int
    train_shards: tuple[Shard, ...]
    """All that may be trained on: the development text is not in it."""
    val_shards: tuple[Shard, ...]
    transform: str | None
    """Name of the transform in `pgolf.data.transforms` that text goes through before the tokenizer."""
    from_environment: bool
    """Whether the text can be rebuilt from what is installed on the machine."""
    index: dict[str, Any] | None
    """Contents of dataset.json; None for a folder in the contest's layout."""

    def canonical_text(self) -> CanonicalText:
        """The validation text, the original one where there is a transform, read once and kept.

        Takes memory of a few times its size. Raises EnvironmentBroken when it is not what the folder promises, or has
        over `TEXT_BYTES` bytes.
        """
        return self._text

    @cached_property
    def _text(self) -> CanonicalText:
        return _decoded_text(self) if self.index is None else _stored_text(self, self.index["text"])

    def development_text(self) -> CanonicalText:
        """The text to compare ideas on, held out of the training text and disjoint from the validation text.

        Raises UsageError when the folder has none, EnvironmentBroken as `canonical_text` does.
        """
        if self.index is None:
            return _end_of_training(self)
        if "development" not in self.index:
            raise UsageError(
                f"{self.root}: has no development text; build it again with a newer pgolf, or with --dev-documents N"
            )
        return _stored_text(self, self.index["development"])


def text_digest(documents: Iterable[bytes]) -> str:
    """SHA-256 over each document's length (8 bytes, little-endian) and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(len(document).to_bytes(8, "little"))
        digest.update(document)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a regular file, in hexadecimal. Raises OSError."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """The dataset's SentencePiece model. Raises EnvironmentBroken when it cannot be read."""
    processor = spm.SentencePieceProcessor()
    try:
        model = read_regular(path, TOKENIZER_BYTES)
        processor.LoadFromSerializedProto(model)
        if not model or processor.vocab_size() < 1:
            raise ValueError
    except OSError as error:
        raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror})") from None
    except (RuntimeError, ValueError):  # ValueError: the library's message is not always UTF-8
        raise EnvironmentBroken(f"{path}: not a SentencePiece model") from None
    return processor


def default_dataset() -> Path:
    """The only dataset folder below ./data. Raises UsageError when there is none or a choice to make."""
    found = sorted(p for p in Path("data").glob("*/") if not p.name.startswith(".") and _is_dataset(p))
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
    index = read_index(path)
    shards = [Shard(_inside(root, shard["file"]), shard["tokens"]) for shard in index["shards"]]
    tokenizer = index["tokenizer"]
    dataset = Dataset(
        name=index["name"],
        root=root,
        tokenizer=_inside(root, tokenizer["file"]),
        vocab_size=tokenizer["vocab_size"],
        bos=tokenizer["bos"],
        train_shards=tuple(s for s in shards if s.path.name.startswith("train_")),
        val_shards=tuple(s for s in shards if s.path.name.startswith("val_")),
        transform=tokenizer.get("transform"),
        from_environment=index.get("environment", False),
        index=index,
    )
    try:
        digest = file_digest(dataset.tokenizer)
    except OSError as error:
        raise EnvironmentBroken(f"{dataset.tokenizer}: cannot be read ({error.strerror})") from None
    if digest != tokenizer["sha256"]:
        raise EnvironmentBroken(f"{dataset.tokenizer}: not the file that {path} describes; build the dataset again")
    return dataset


def read_index(path: Path) -> dict[str, Any]:
    """The contents of a dataset.json, the type of every field checked that is read anywhere.

    Raises EnvironmentBroken, naming the field.
    """
    try:
        index = json.loads(read_regular(path, INDEX_BYTES))
    except OSError as error:
        raise EnvironmentBroken(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise EnvironmentBroken(f"{path}: not JSON; build the dataset again") from None

    def require(holds: bool, field: str) -> None:
        if not holds:
            raise EnvironmentBroken(
                f"{path}: {field} is missing or not what the format allows; build the dataset again"
            )

    require(isinstance(index, dict), "the object")
    if index.get("format") != FORMAT:
        raise EnvironmentBroken(f"{path}: format {index.get('format')!r:.40} is not {FORMAT}; build the dataset again")
    require(isinstance(index.get("name"), str), "name")
    require(isinstance(index.get("environment", False), bool), "environment")
    texts = [key for key in ("text", "development") if key == "text" or key in index]  # older folders have only one
    for key in ("tokenizer", *texts):
        require(isinstance(index.get(key), dict), key)
        require(_is_file_entry(index[key]), f"{key}.file or {key}.sha256")
    tokenizer, shards = index["tokenizer"], index.get("shards")
    require(_is_count(tokenizer.get("vocab_size"), 1, VOCAB_SIZE), "tokenizer.vocab_size")
    require(_is_count(tokenizer.get("bos"), 0, tokenizer["vocab_size"] - 1), "tokenizer.bos")
    require(tokenizer.get("transform") in (None, *TRANSFORMS), "tokenizer.transform")
    for key in texts:
        require(_is_count(index[key].get("bytes"), 0, TEXT_BYTES), f"{key}.bytes")
        require(_is_count(index[key].get("documents"), 0, TEXT_DOCUMENTS), f"{key}.documents")
    require(isinstance(shards, list) and all(_is_file_entry(shard) for shard in shards), "shards")
    require(all(_is_count(shard.get("tokens"), 1, _SHARD_TOKENS) for shard in shards), "shards: tokens")
    return dict(index)


def _is_file_entry(entry: Any) -> bool:
    """Whether it names a file and its digest."""
    if not isinstance(entry, dict):
        return False
    name, digest = entry.get("file"), entry.get("sha256")
    return isinstance(name, str) and name.isprintable() and name != "" and isinstance(digest, str)


def _is_count(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _inside(root: Path, name: str) -> Path:
    """The file `name` of the dataset in `root`. Raises EnvironmentBroken when it lies elsewhere, such as by a link."""
    path = root / name
    try:
        lies_inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # RuntimeError: links in a circle
        lies_inside = False
    if not lies_inside or Path(name).is_absolute() or ".." in Path(name).parts:
        raise EnvironmentBroken(f"{path}: lies outside the dataset's folder; copy the file itself into it")
    return path


def _open_contest(root: Path) -> Dataset:
    tokenizer = _contest_tokenizer(root)
    processor = load_tokenizer(tokenizer)
    return Dataset(
        name=root.resolve().name,
        root=root,
        tokenizer=tokenizer,
        vocab_size=processor.vocab_size(),
        bos=processor.bos_id(),
        train_shards=_without_development(_shards(root, "fineweb_train_*.bin")),
        val_shards=_shards(root, "fineweb_val_*.bin"),
        transform=None,
        from_environment=False,
        index=None,
    )


def _shards(root: Path, names: str) -> tuple[Shard, ...]:
    return tuple(Shard(path, token_count(path)) for path in sorted(root.glob(names)))


def _without_development(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
    """Training shards less the end of the last one. Counted by size: to open a dataset reads no training token."""
    if not shards:
        return ()
    *before, last = shards
    return *before, replace(last, tokens=last.tokens - min(last.tokens // DEVELOPMENT_SHARE, DEVELOPMENT_TOKENS))


def _contest_tokenizer(root: Path) -> Path:
    inside = sorted(root.glob("*.model"))
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise EnvironmentBroken(f"{root}: holds {len(inside)} .model files; leave only the dataset's")
    vocab = re.search(r"_sp(\d+)$", root.resolve().name)
    name = f"fineweb_{vocab[1]}_bpe.model" if vocab else "fineweb_*_bpe.model"
    for folder in (root.resolve().parent, root.resolve().parent.parent):
        beside = sorted((folder / "tokenizers").glob(name))
        if len(beside) == 1:
            return beside[0]
    raise EnvironmentBroken(f"{root}: no tokenizer; put {name} into the folder or into ../tokenizers")


def _stored_text(dataset: Dataset, expected: dict[str, Any]) -> CanonicalText:
    """The text whose entry in the index is `expected`."""
    path = _inside(dataset.root, expected["file"])
    documents: list[bytes] = []
    left = expected["bytes"]
    try:
        with open_regular(path) as file:
            while line := file.readline(_ESCAPED * left + 1024):
                document = _document(line, f"{path}: line {len(documents) + 1}")
                documents.append(document)
                left -= len(document)
                if left < 0 or len(documents) > expected["documents"]:
                    raise EnvironmentBroken(
                        f"{path}: holds more text than {INDEX} says; it was changed, so no score would mean anything"
                    )
    except OSError as error:
        raise EnvironmentBroken(
            f"{path}: the text cannot be read ({error.strerror}); build the dataset again"
        ) from None
    text = CanonicalText(tuple(documents))
    if text.sha256 != expected["sha256"]:
        raise EnvironmentBroken(
            f"{path}: the text's digest is {text.sha256[:16]}..., {INDEX} says "
            f"{expected['sha256'][:16]}...; the text was changed, so no score would mean anything"
        )
    return text


def _document(line: bytes, place: str) -> bytes:
    try:
        document: bytes = json.loads(line)["text"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EnvironmentBroken(f"{place}: not a document") from None
    return document


def _decoded_text(dataset: Dataset) -> CanonicalText:
    """Decode the contest's validation shards, and check that tokenizer and shards belong together.

    A wrong tokenizer decodes to nonsense without any error; encoding that again gives other tokens.
    """
    processor = load_tokenizer(dataset.tokenizer)
    shards = [(shard.path, shard.read(dataset.vocab_size)) for shard in dataset.val_shards]
    piece_bytes = np.array([len(processor.id_to_piece(i).encode()) for i in range(dataset.vocab_size)])
    if sum(int(np.bincount(shard, minlength=len(piece_bytes)) @ piece_bytes) for _, shard in shards) > TEXT_BYTES:
        raise EnvironmentBroken(f"{dataset.root}: the validation shards hold over {TEXT_BYTES:,} bytes of text")
    tokens = list(split_documents(shards, dataset.bos))
    documents: list[bytes] = []
    step = max(1, len(tokens) // _SAMPLE)
    for number, ids in enumerate(tokens):
        text = processor.decode(ids.tolist())
        if number % step == 0 and not np.array_equal(processor.encode(text), ids):
            raise EnvironmentBroken(
                f"{dataset.tokenizer}: is not the tokenizer that made {dataset.val_shards[0].path.name}: document "
                f"{number} decodes to text that encodes to other tokens; put the right .model there"
            )
        documents.append(text.encode())
    return CanonicalText(tuple(documents))


def _end_of_training(dataset: Dataset) -> CanonicalText:
    """The documents that begin after the training tokens of a contest folder, but for those that are validated too.

    The last one is left out, since it may go on in a shard that is not here.
    """
    if not dataset.train_shards:
        raise UsageError(f"{dataset.root}: holds no training shard, at whose end the development text would be")
    last = dataset.train_shards[-1]
    tail = read_shard(last.path, dataset.vocab_size)[last.tokens :]
    validation = set(document_digests(dataset.val_shards, dataset.vocab_size, dataset.bos))
    processor = load_tokenizer(dataset.tokenizer)
    texts: list[bytes] = []
    for ids in np.split(tail, np.flatnonzero(tail == dataset.bos))[1:-1]:
        text = processor.decode(ids[1:].tolist())
        if document_digest(ids[1:]) not in validation and np.array_equal(processor.encode(text), ids[1:]):
            texts.append(text.encode())
    if not texts:
        raise UsageError(
            f"{last.path}: is too small to hold out a development text (the last {len(tail):,} tokens have no whole "
            "document); fetch a larger shard"
        )
    return CanonicalText(tuple(texts))


def document_digests(shards: Iterable[Shard], vocab_size: int, bos: int) -> Iterator[bytes]:
    """Digest (16 bytes) of each document's tokens. Raises EnvironmentBroken for an unsound shard."""
    return map(document_digest, read_documents(shards, vocab_size, bos))


def document_digest(ids: Any) -> bytes:
    """BLAKE2b-128 of a document's token ids (N,), as little-endian uint16."""
    return hashlib.blake2b(np.asarray(ids, dtype="<u2").tobytes(), digest_size=16).digest()


def overlap(dataset: Dataset, other: Dataset | None = None) -> int:
    """How many training documents are validation documents too (0 in a sound dataset): of `other` where it is given.

    Documents are compared by their tokens under the tokenizer of `dataset`. Raises EnvironmentBroken.
    """
    validation = set(_validation_digests(dataset, other or dataset))
    return sum(d in validation for d in document_digests(dataset.train_shards, dataset.vocab_size, dataset.bos))


def _validation_digests(dataset: Dataset, other: Dataset) -> Iterator[bytes]:
    """Digests of the validation documents of `other` in the tokens of `dataset`."""
    same = other.transform == dataset.transform and file_digest(other.tokenizer) == file_digest(dataset.tokenizer)
    if same:
        yield from document_digests(other.val_shards, dataset.vocab_size, dataset.bos)
        return
    processor = load_tokenizer(dataset.tokenizer)
    for document in other.canonical_text().documents:
        text = document.decode()
        yield document_digest(
            processor.encode(TRANSFORMS[dataset.transform].apply(text) if dataset.transform else text)
        )


def training_files(dataset: Dataset) -> tuple[dict[str, bytes], dict[str, Path]]:
    """A dataset folder for a trainer: files by name, and the shards of its folder `shards`, no validation text.

    Raises UsageError when the dataset has no training shards, EnvironmentBroken when a file cannot be read.
    """
    if not dataset.train_shards:
        raise UsageError(f"{dataset.root}: holds no training shards")
    try:
        tokenizer = read_regular(dataset.tokenizer, TOKENIZER_BYTES)
    except OSError as error:
        raise EnvironmentBroken(f"{dataset.tokenizer}: cannot be read ({error.strerror})") from None
    shards = {f"train_{number:06d}.bin": shard for number, shard in enumerate(dataset.train_shards)}
    entry = {"file": "tokenizer.model", "sha256": hashlib.sha256(tokenizer).hexdigest(), "transform": dataset.transform}
    index = {
        "format": FORMAT,
        "name": dataset.name,
        "tokenizer": {**entry, "vocab_size": dataset.vocab_size, "bos": dataset.bos},
        "text": {"file": "withheld", "sha256": "", "bytes": 0, "documents": 0},
        "shards": [{"file": f"shards/{name}", "sha256": "", "tokens": shard.tokens} for name, shard in shards.items()],
    }
    files = {INDEX: json.dumps(index, allow_nan=False).encode(), "tokenizer.model": tokenizer}
    return files, {name: shard.path for name, shard in shards.items()}
