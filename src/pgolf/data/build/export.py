"""What a published export in the contest's layout holds, as its manifest.json says.

FOLDER/manifest.json
FOLDER/datasets/fineweb10B_VARIANT/fineweb_{train,val}_000000.bin, ...
FOLDER/tokenizers/fineweb_1024_bpe.model
FOLDER/docs_selected.jsonl        all documents, first those of the validation split
"""

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pgolf.data.build.hub import RemoteFile, Repository, download
from pgolf.data.dataset import INDEX_BYTES, VOCAB_SIZE
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import printable, read_regular

MANIFEST = "manifest.json"
DOCUMENTS = "docs_selected.jsonl"
VALIDATION_DOCUMENTS = 50_000  # unless the manifest says otherwise
MOST_SHARDS = 1_000_000

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Variant:
    """The shards of one tokenizer in an export."""

    name: str
    """Of its folder, such as fineweb10B_sp1024."""
    vocab_size: int
    tokenizer: RemoteFile
    """A SentencePiece model, or the description of a tokenizer of bytes in JSON."""
    train: tuple[RemoteFile, ...]
    """All that are published, in order."""
    val: tuple[RemoteFile, ...]
    documents: RemoteFile | None
    """The text of all documents, if it is published."""
    val_documents: int
    """How many of them, the first ones, are the validation split."""


def dataset_name(variant: str) -> str:
    """The name of a variant's folder. Raises UsageError when it cannot be one."""
    name = variant if variant.startswith("fineweb") else f"fineweb10B_{variant}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"--variant {printable(variant)}: is no name such as sp1024, sp8192 or byte260")
    return name


def read_variant(repository: Repository, folder: str, variant: str) -> Variant:
    """Find a variant in the export below `folder` of a repository.

    Raises UsageError when there is no such export or variant, EnvironmentBroken for a manifest that is not sound.
    """
    name, root = dataset_name(variant), PurePosixPath(folder)
    path = str(root / MANIFEST)
    if path not in repository.files:
        raise UsageError(f"{repository.name}: holds no {printable(path)}; --folder says where in it the export is")
    manifest = _manifest(repository, repository.files[path])
    place = f"{repository.name}: {printable(path)}"
    try:
        datasets = {str(each["name"]): each for each in manifest["datasets"]}
        tokenizers = {str(each["name"]): each for each in manifest["tokenizers"]}
        if name not in datasets:
            known = ", ".join(sorted(each.removeprefix("fineweb10B_") for each in datasets)[:20])
            raise UsageError(f"{repository.name}: has no variant {printable(variant)}; known are {printable(known)}")
        dataset = datasets[name]
        tokenizer = tokenizers[str(dataset["tokenizer_name"])]
        stats = dataset["stats"]
        vocab_size = _count(tokenizer["vocab_size"], VOCAB_SIZE)
        shards = {
            split: tuple(
                repository.file(str(root / "datasets" / name / f"fineweb_{split}_{number:06d}.bin"))
                for number in range(_count(stats[f"files_{split}"], MOST_SHARDS))
            )
            for split in ("train", "val")
        }
        val_documents = _count(manifest.get("num_val_docs") or VALIDATION_DOCUMENTS, 1 << 24)
        own = PurePosixPath(str(tokenizer.get("model_path") or tokenizer["path"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvironmentBroken(f"{place}: is not a manifest that pgolf can read ({printable(error)[:80]})") from None
    if not shards["val"]:
        raise EnvironmentBroken(f"{place}: {printable(name)} has no validation shard")
    inside = str(root / own)
    return Variant(
        name=name,
        vocab_size=vocab_size,
        tokenizer=repository.file(inside if inside in repository.files else str(root / "tokenizers" / own.name)),
        train=shards["train"],
        val=shards["val"],
        documents=repository.files.get(str(root / DOCUMENTS)),
        val_documents=val_documents,
    )


def _manifest(repository: Repository, file: RemoteFile) -> dict[str, Any]:
    if file.size > INDEX_BYTES:
        raise EnvironmentBroken(f"{repository.name}: {printable(file.path)}: {file.size:,} bytes are no manifest")
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / MANIFEST
        download(repository, file, part, lambda _: None)
        try:
            manifest = json.loads(read_regular(part, INDEX_BYTES))
        except (ValueError, RecursionError):
            manifest = None
    if not isinstance(manifest, dict):
        raise EnvironmentBroken(f"{repository.name}: {printable(file.path)}: is not a JSON object")
    return manifest


def _count(value: object, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise ValueError(f"{value!r:.40} is no count")
    return value
