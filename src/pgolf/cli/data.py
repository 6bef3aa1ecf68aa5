"""`pgolf data`: make dataset folders."""

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import zstandard

from pgolf import artifact, rules
from pgolf.cli.command import Commands, add_command, add_text, note
from pgolf.cli.fetch import add_fetch
from pgolf.data.build import demo
from pgolf.data.build.apart import apart
from pgolf.data.build.build import SHARD_TOKENS, Settings, build, finished
from pgolf.data.build.sources import resolve
from pgolf.data.build.tokenize import NORMALIZATIONS
from pgolf.data.dataset import open_dataset
from pgolf.data.transforms import TRANSFORMS
from pgolf.errors import UsageError
from pgolf.files import open_regular, printable
from pgolf.machine import cores


def add_data(commands: Commands) -> None:
    """Add `data` and its commands."""
    parser = add_command(
        commands,
        "data",
        "make datasets",
        "Make a dataset folder: a tokenizer, training shards, validation shards and the text that is scored.",
        "pgolf data fetch\n  pgolf data demo\n"
        "  pgolf data build corpus.jsonl.zst --val-documents 1000 --out data/corpus",
    )
    data = parser.add_subparsers(metavar="command", required=True).add_parser
    add_fetch(data)
    _add_build(data)
    _add_apart(data)
    _add_demo(data)


def _add_build(commands: Commands) -> None:
    parser = add_command(
        commands,
        "build",
        "build a dataset from files or a hub dataset",
        "Tokenise documents into a dataset folder. A build that was interrupted goes on when the same command is "
        "run again. Training documents that are validation documents too are dropped, and so are empty ones.",
        "pgolf data build corpus/*.jsonl.zst --val heldout.jsonl --out data/corpus\n"
        "  pgolf data build owner/dataset --config en --val-documents 5000 --out data/hub",
        _build,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a .jsonl, .parquet or .txt file (.jsonl and .txt also as .gz or .zst), a folder or glob of them, or a "
        "hub dataset",
    )
    parser.add_argument("--out", type=_folder, required=True, metavar="DIR", help="the dataset folder")
    held_out = parser.add_mutually_exclusive_group(required=True)
    held_out.add_argument("--val", nargs="+", metavar="SOURCE", help="sources of the validation text")
    held_out.add_argument("--val-documents", type=int, metavar="N", help="hold out the first N documents instead")
    _add_development(parser)
    add_text(parser)
    parser.add_argument("--val-split", default="validation", help="split of --val datasets (default: %(default)s)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE|ARTIFACT",
        help="use this SentencePiece model, or tokenizer and transform of this artifact, to train it again",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="train a tokenizer of N pieces on the training text (default: 1024)"
    )
    parser.add_argument(
        "--normalization", choices=NORMALIZATIONS, help="what a trained tokenizer does to text (default: identity)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, default=SHARD_TOKENS, metavar="N", help="tokens in a shard (default: %(default)s)"
    )
    parser.add_argument(
        "--transform", choices=TRANSFORMS, help="a reversible transform that text goes through before the tokenizer"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out documents that have no text or are not sound, and count them"
    )
    parser.add_argument("--name", help="name of the dataset (default: that of the folder)")
    _add_common(parser)


def _add_apart(commands: Commands) -> None:
    parser = add_command(
        commands,
        "apart",
        "leave out training documents that are validated",
        "Make a new folder of one in the contest's layout, without the training documents that are validation "
        "documents, which `pgolf data fetch` counts and for which `pgolf rerun` refuses the data; those in the "
        "development text go, too. Shards without such a document are linked, not copied.",
        "pgolf data apart data/fineweb10B_sp1024 --out data/apart",
        _apart,
    )
    parser.add_argument("data", type=Path, metavar="DIR", help="a folder in the contest's layout")
    parser.add_argument("--out", type=_folder, required=True, metavar="DIR", help="the new folder")
    parser.add_argument("--json", action="store_true", help="print a summary for programs")


def _add_demo(commands: Commands) -> None:
    parser = add_command(
        commands,
        "demo",
        "build a small dataset from what is installed, without network",
        "Build a small dataset of English text from the docstrings and help topics of the installed Python packages.",
        "pgolf data demo",
        _demo,
    )
    parser.add_argument(
        "--out",
        type=_folder,
        default=Path("data/demo"),
        metavar="DIR",
        help="the dataset folder (default: %(default)s)",
    )
    _add_development(parser)
    _add_common(parser)


def _add_development(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dev-documents",
        type=int,
        metavar="N",
        help="hold out the next N documents as development text, for `pgolf try` (default: 1 %%, at most 500)",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help="processes (default: one per core)")
    parser.add_argument("--json", action="store_true", help="print a summary for programs")


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of the folder is empty")
    return Path(text)


def _apart(args: argparse.Namespace) -> int:
    left_out = apart(open_dataset(args.data), args.out)
    if args.json:
        print(json.dumps({"data": str(args.out), "left_out": left_out}, allow_nan=False))
    else:
        for name, count in left_out.items():
            print(f"{printable(name)}: {count:,} documents left out")
        print(f"{printable(args.out)}: {sum(left_out.values()):,} training documents left out that are validated")
    return 0


def _build(args: argparse.Namespace) -> int:
    start = monotonic()
    if args.tokenizer and (args.vocab_size or args.normalization):
        raise UsageError("--tokenizer takes a finished model; leave out --vocab-size and --normalization")
    validation: Any = args.val_documents
    sources = resolve(args.sources, config=args.config, split=args.split, lines=args.lines, note=note)
    if args.val:
        validation = resolve(args.val, config=args.config, split=args.val_split, lines=args.lines, note=note)
    there = finished(args.out) is not None
    with _tokenizer(args.tokenizer, args.transform) as (tokenizer, transform):
        settings = Settings(
            name=args.name or args.out.resolve().name,
            sources=sources,
            validation=validation,
            development=args.dev_documents,
            field=args.field,
            tokenizer=tokenizer,
            vocab_size=1024 if args.vocab_size is None else args.vocab_size,
            normalization=args.normalization or "identity",
            shard_tokens=args.shard_tokens,
            transform=transform,
            skip_bad=args.skip_bad,
        )
        index = build(settings, args.out, _workers(args.workers))
    _report(args, index, there, monotonic() - start)
    return 0


@contextlib.contextmanager
def _tokenizer(given: Path | None, transform: str | None) -> Iterator[tuple[Path | None, str | None]]:
    """The SentencePiece model and the transform before it: as given, or those of the artifact `given`.

    Raises UsageError for an artifact with another kind of tokenizer or another transform, Refused for a broken one.
    """
    if given is None or not _is_compressed(given):
        yield given, transform
        return
    found = artifact.read(given, rules.ARTIFACT_BYTES)
    name, own = found.manifest.tokenizer, found.manifest.transform
    if not name.endswith(".model"):
        raise UsageError(f"{given}: its tokenizer is {printable(name)}; only a SentencePiece model makes shards")
    if transform not in (None, own):
        raise UsageError(f"--transform {transform}: the artifact has {own or 'none'}; leave --transform out")
    with tempfile.TemporaryDirectory(prefix="pgolf-") as folder:
        model = Path(folder) / "tokenizer.model"
        model.write_bytes(found.members[name])
        yield model, own


def _is_compressed(path: Path) -> bool:
    with contextlib.suppress(OSError), open_regular(path) as file:
        return file.read(len(zstandard.FRAME_HEADER)) == zstandard.FRAME_HEADER
    return False


def _demo(args: argparse.Namespace) -> int:
    start = monotonic()
    there = finished(args.out) is not None
    index = demo.build_demo(args.out, _workers(args.workers), args.dev_documents)
    _report(args, index, there, monotonic() - start)
    return 0


def _workers(count: int) -> int:
    if not 1 <= count <= 1024:
        raise UsageError(f"--workers {count} is not between 1 and 1024")
    return count


def _report(args: argparse.Namespace, index: dict[str, Any], there: bool, seconds: float) -> None:
    train, text = index["train"], index["text"]
    summary = {
        "data": str(args.out),
        "built": not there,
        "train": train,
        "validation": _counts(text),
        "development": _counts(index["development"]) if "development" in index else None,
        "vocab_size": index["tokenizer"]["vocab_size"],
        "bytes_per_token": round(text["bytes"] / text["tokens"], 4),
        "overlap": index["overlap"],
        "seconds": round(seconds, 1),
    }
    if args.json:
        print(json.dumps(summary, allow_nan=False))
        return
    print(f"{printable(args.out)}: {'already built, nothing to do' if there else f'built in {seconds:.1f} s'}")
    print(f"{'':12}{'documents':>12}{'tokens':>16}{'bytes':>16}{'bytes/token':>13}")
    rows = [("train", train), ("validation", text)]
    if "development" in index:
        rows.append(("development", index["development"]))
    for name, counts in rows:
        ratio = counts["bytes"] / counts["tokens"]
        print(f"{name:12}{counts['documents']:12,}{counts['tokens']:16,}{counts['bytes']:16,}{ratio:13.3f}")
    print(
        f"overlap {index['overlap']} ({train['dropped_overlap']} training documents dropped that are held "
        f"out); {train['dropped_empty'] + text['dropped_empty']} empty documents dropped; "
        f"{text['changed_by_tokenizer']} validation documents changed by the tokenizer"
    )
    if skipped := train.get("skipped_bad", 0) + text.get("skipped_bad", 0):
        print(f"{skipped} documents skipped that have no text or are not sound")


def _counts(text: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in text.items() if key not in ("file", "sha256")}
