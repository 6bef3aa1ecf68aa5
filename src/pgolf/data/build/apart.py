"""The contest's published folders without the training documents that are validation documents.

Such a folder cannot be built again from text, and `pgolf rerun` refuses one in which the two overlap.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pgolf.data.dataset import Dataset, document_digest, document_digests
from pgolf.data.shards import Shard, Tokens, read_documents, token_count, write_shard
from pgolf.errors import UsageError
from pgolf.files import check_free, create_folder


def apart(dataset: Dataset, out: Path) -> dict[str, int]:
    """Make the folder `out` of a folder in the contest's layout; returns, by shard, how many documents it now lacks.

    A document counts where it begins. Files that stay as they are become hard links, or copies on another disk.
    Raises UsageError where `out` exists or the dataset was built here, EnvironmentBroken for an unsound shard.
    """
    if dataset.index is not None:
        raise UsageError(f"{dataset.root}: was built by `pgolf data build`, which leaves such documents out")
    check_free(out)
    whole = [Shard(shard.path, token_count(shard.path)) for shard in dataset.train_shards]  # development text included
    starts = np.cumsum([0, *(shard.tokens for shard in whole)])
    spans = np.array(list(_validated(dataset, whole)), np.int64).reshape(-1, 2)
    begun = np.searchsorted(starts, spans[:, 0], "right") - 1
    if len(spans) and (spans[:, 1] - spans[:, 0]).sum() == starts[-1]:
        raise UsageError(f"{dataset.root}: every training document is a validation document")
    with create_folder(out) as folder:
        for path in (dataset.tokenizer, *(shard.path for shard in dataset.val_shards)):
            _link(path, folder / path.name)
        for number, shard in enumerate(whole):
            tokens = shard.read(dataset.vocab_size)
            kept = _without(tokens, spans - starts[number])
            if len(kept) == len(tokens):
                _link(shard.path, folder / shard.path.name)
            elif len(kept):  # an empty shard would be no shard
                write_shard(folder / shard.path.name, kept)
    return {whole[number].path.name: int((begun == number).sum()) for number in np.unique(begun)}


def _validated(dataset: Dataset, shards: list[Shard]) -> Iterator[tuple[int, int]]:
    """Where training documents that are validated begin and end, BOS included, in all shards' tokens taken together."""
    known = set(document_digests(dataset.val_shards, dataset.vocab_size, dataset.bos))
    documents, start = read_documents(shards, dataset.vocab_size, dataset.bos), 0
    for ids in tqdm(documents, desc="compare", unit="doc", unit_scale=True, disable=None):
        end = start + 1 + len(ids)
        if document_digest(ids) in known:
            yield start, end
        start = end


def _without(tokens: Tokens, spans: npt.NDArray[np.int64]) -> Tokens:
    """Tokens (N,) less those of the spans (S, 2), of which some may lie before them or behind."""
    kept = np.ones(len(tokens), dtype=bool)
    for start, end in np.clip(spans, 0, len(tokens)).tolist():
        kept[start:end] = False
    return tokens if kept.all() else tokens[kept]


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path.resolve(), to)
    except OSError:
        shutil.copyfile(path, to)
