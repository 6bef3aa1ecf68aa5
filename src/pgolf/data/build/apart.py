"""The contest's published folders without the training documents that are validation documents.

Such a folder cannot be built again from text, and `pgolf rerun` refuses one in which the two overlap.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pgolf.data.dataset import Dataset, document_digest, document_digests
from pgolf.data.shards import Shard, Tokens, read_documents, token_count, write_shard
from pgolf.errors import UsageError


def apart(dataset: Dataset, out: Path) -> dict[str, int]:
    """Make the folder `out` of a folder in the contest's layout; returns, by shard, how many documents it now lacks.

    A document counts where it begins. Files that stay as they are become hard links, or copies on another disk.
    Raises UsageError where `out` exists or the dataset was built here, EnvironmentBroken for an unsound shard.
    """
    if dataset.index is not None:
        raise UsageError(f"{dataset.root}: was built by `pgolf data build`, which leaves such documents out")
    if out.exists():
        raise UsageError(f"{out}: exists; choose a new folder")
    whole = [Shard(shard.path, token_count(shard.path)) for shard in dataset.train_shards]  # development text included
    starts = np.cumsum([0, *(shard.tokens for shard in whole)])
    spans = np.array(list(_validated(dataset, whole)), np.int64).reshape(-1, 2)
    begun = np.searchsorted(starts, spans[:, 0], "right") - 1
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".pgolf-"))
    try:
        for path in (dataset.tokenizer, *(shard.path for shard in dataset.val_shards)):
            _link(path, temporary / path.name)
        for number, shard in enumerate(whole):
            tokens = shard.read(dataset.vocab_size)
            kept = _without(tokens, spans - starts[number])
            if len(kept) == len(tokens):
                _link(shard.path, temporary / shard.path.name)
            elif len(kept):  # an empty shard would be no shard
                write_shard(temporary / shard.path.name, kept)
        temporary.chmod(0o755)
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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
