"""What is checked of a fetched dataset: tokenizer, validation split, and that no training document is validated."""

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pgolf.data.dataset import INDEX_BYTES, Dataset, document_digests, load_tokenizer
from pgolf.data.shards import count_tokens
from pgolf.errors import EnvironmentBroken
from pgolf.files import read_regular

CONTEST_DOCUMENTS, CONTEST_BYTES = 50_000, 151_080_891
CONTEST_TOKENS = {1024: 62_021_846}  # with a BOS for each document, by the size of the vocabulary


def check_tokenizer(path: Path, name: str, vocab_size: int) -> None:
    """Raises EnvironmentBroken when it is not one of the vocabulary that the manifest states."""
    size = _byte_vocabulary(path) if name.endswith(".json") else load_tokenizer(path).vocab_size()
    if size != vocab_size:
        raise EnvironmentBroken(f"it has {size:,} pieces where the manifest says {vocab_size:,}")


def _byte_vocabulary(path: Path) -> int:
    """Pieces of the contest's tokenizer of bytes, which is described in JSON."""
    expected = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_offset": 4, "byte_count": 256}
    try:
        found = json.loads(read_regular(path, INDEX_BYTES))["config"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if found != expected:
        raise EnvironmentBroken("pgolf reads SentencePiece models and the contest's tokenizer of 256 bytes")
    return 260


def validation(dataset: Dataset) -> dict[str, Any]:
    """Counts and digest of the validation text, and whether it is the contest's. Raises EnvironmentBroken."""
    text = dataset.canonical_text()
    documents, size, tokens = len(text.documents), text.bytes, count_tokens(dataset.val_shards)
    difference = contest_difference(dataset.vocab_size, documents, size, tokens)
    counts = {"documents": documents, "bytes": size, "tokens": tokens, "sha256": text.sha256}
    return {**counts, "is_contest": difference is None, "difference": difference}


def contest_difference(vocab_size: int, documents: int, size: int, tokens: int) -> str | None:
    """None when a validation split has the counts of the contest's, otherwise by how much not.

    Any lossless tokenizer must give the contest's documents and bytes; its 1,024 pieces also the number of tokens.
    """
    expected = [(documents, CONTEST_DOCUMENTS, "documents"), (size, CONTEST_BYTES, "bytes")]
    if vocab_size in CONTEST_TOKENS:
        expected.append((tokens, CONTEST_TOKENS[vocab_size], "tokens"))
    if all(found == right for found, right, _ in expected):
        return None
    return ", ".join(f"{found:,} of {right:,} {what} ({found - right:+,})" for found, right, what in expected)


def training(dataset: Dataset) -> tuple[dict[str, int], int]:
    """Counts of the training shards, and how many of their documents are validation documents."""
    known = set(document_digests(dataset.val_shards, dataset.vocab_size, dataset.bos))
    digests = document_digests(dataset.train_shards, dataset.vocab_size, dataset.bos)
    documents = overlap = 0
    for digest in tqdm(digests, desc="compare", unit="doc", unit_scale=True, disable=None):
        documents += 1
        overlap += digest in known
    counts = {"shards": len(dataset.train_shards), "documents": documents, "tokens": count_tokens(dataset.train_shards)}
    return counts, overlap
