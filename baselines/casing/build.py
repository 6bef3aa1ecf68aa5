"""Make the training data for the case transform from a dataset folder, and repack what was trained on it.

    python baselines/casing/build.py data DATASET --out DIR
    python baselines/naive/train.py --data DIR --out naive.zst
    python baselines/casing/build.py pack naive.zst --out casing.zst
    pgolf score casing.zst --data DATASET

The tokenizer and the shards of the new folder are made of transformed text, but its validation text is the original
one, byte for byte: bits per byte stay comparable. `data --plain` leaves the transform out, for comparison.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from tokenizer import lower_case

from pgolf import rules
from pgolf.artifact import MANIFEST, pack, read
from pgolf.data.build import Settings, build
from pgolf.data.dataset import INDEX, Dataset, load_tokenizer, open_dataset, text_digest
from pgolf.data.shards import read_shard, split_documents
from pgolf.data.sources import FileSource
from pgolf.errors import PgolfError, UsageError
from pgolf.files import write_atomically

MODULE = Path(__file__).with_name("tokenizer.py")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="command")
    command = commands.add_parser("data", help="make a dataset folder of transformed text")
    command.add_argument("dataset", type=Path)
    command.add_argument("--out", type=Path, required=True, metavar="DIR")
    command.add_argument("--vocab-size", type=int, default=1024)
    command.add_argument("--plain", action="store_true", help="without the transform")
    command.set_defaults(run=_data)
    command = commands.add_parser("pack", help="put the transform into an artifact that was trained on such a folder")
    command.add_argument("artifact", type=Path)
    command.add_argument("--out", type=Path, default=Path("casing.zst"), metavar="FILE")
    command.set_defaults(run=_pack)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except PgolfError as error:
        print(f"build.py: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _data(args: argparse.Namespace) -> None:
    make_dataset(args.dataset, args.out, args.vocab_size, (lambda text: text) if args.plain else lower_case)
    print(f"{args.out}: train on it with baselines/naive/train.py")


def _pack(args: argparse.Namespace) -> None:
    print(f"{args.out}: {repack(args.artifact, args.out):,} bytes")


def make_dataset(source: Path, out: Path, vocab_size: int, transform: Callable[[str], str]) -> None:
    """Build `out` from the transformed text of the dataset `source`, then give it the original validation text."""
    dataset = open_dataset(source)
    original = [document.decode() for document in dataset.canonical_text().documents]
    original = [text for text in original if text.strip()]  # a build leaves out empty documents
    with tempfile.TemporaryDirectory() as folder:
        train, val = Path(folder) / "train.jsonl", Path(folder) / "val.jsonl"
        with train.open("w", encoding="utf-8") as file:
            file.writelines(as_lines(map(transform, training_text(dataset))))
        val.write_text("".join(as_lines(map(transform, original))), encoding="utf-8")
        sources = FileSource(train, False), FileSource(val, False)
        settings = Settings(out.resolve().name, sources[:1], sources[1:], vocab_size=vocab_size)
        index = build(settings, out, len(os.sched_getaffinity(0)))
    encoded = [text.encode() for text in original]
    text = {"sha256": text_digest(encoded), "bytes": sum(map(len, encoded)), "documents": len(encoded)}
    write_atomically(out / index["text"]["file"], "".join(as_lines(original)).encode())
    index |= {"text": index["text"] | text}
    write_atomically(out / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def training_text(dataset: Dataset) -> Iterator[str]:
    """The training documents, decoded."""
    processor = load_tokenizer(dataset.tokenizer)
    for path in dataset.train_shards:
        for ids in split_documents(path, read_shard(path, dataset.vocab_size), dataset.bos):
            yield processor.decode(ids.tolist())


def as_lines(texts: Iterable[str]) -> Iterator[str]:
    """One document a line, as JSON."""
    return (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def repack(source: Path, out: Path) -> int:
    """Write the artifact at `source` as `out`, its tokenizer behind the transform; returns its size in bytes."""
    artifact = read(source, rules.ARTIFACT_BYTES)
    if artifact.manifest.tokenizer != "tokenizer.model":
        raise UsageError(f"{source}: not an artifact of baselines/naive/train.py")
    manifest = json.loads(artifact.members[MANIFEST]) | {"name": "casing baseline", "tokenizer": MODULE.name}
    manifest["packages"] = sorted({*artifact.manifest.packages, "sentencepiece"})
    members = {**artifact.members, MANIFEST: json.dumps(manifest, indent=1).encode(), MODULE.name: MODULE.read_bytes()}
    return pack(members, out, rules.track(artifact.manifest.track).artifact_bytes)


if __name__ == "__main__":
    sys.exit(main())
