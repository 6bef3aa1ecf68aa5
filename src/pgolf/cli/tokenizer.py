"""`pgolf tokenizer`: train tokenizers and compare them before a dataset is built with one."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pgolf import plots
from pgolf.cli.command import Commands, add_command, add_text, note, positive
from pgolf.data.build import workbench
from pgolf.data.build.build import SAMPLE_CHARACTERS
from pgolf.data.build.sources import resolve
from pgolf.data.build.tokenize import NORMALIZATIONS
from pgolf.data.build.workbench import Measured
from pgolf.data.dataset import VOCAB_SIZE
from pgolf.data.transforms import TRANSFORMS
from pgolf.errors import UsageError
from pgolf.files import printable


def add_tokenizer(commands: Commands) -> None:
    """Add `tokenizer` and its commands."""
    parser = add_command(
        commands,
        "tokenizer",
        "train and compare tokenizers",
        "Train a tokenizer on a sample of text, and compare tokenizers: bytes per token, losslessness, size.",
        "pgolf tokenizer compare bytes own.model --text corpus.jsonl.zst",
    )
    own = parser.add_subparsers(metavar="command", required=True).add_parser
    _add_train(own)
    _add_compare(own)


def _add_train(commands: Commands) -> None:
    parser = add_command(
        commands,
        "train",
        "train a SentencePiece model",
        "Train a SentencePiece BPE model with byte fallback on the first documents of a text, never on what you will "
        "score. Without normalisation it is lossless on any text. `pgolf data build --tokenizer` takes it.",
        "pgolf tokenizer train corpus.jsonl.zst --vocab-size 4096 --out own_4096.model",
        _train,
    )
    parser.add_argument("text", nargs="+", metavar="SOURCE", help="files, folders, globs or a hub dataset")
    parser.add_argument("--vocab-size", type=positive, required=True, metavar="N", help="pieces, up to 65,536")
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default="identity", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the model, which ends in .model")
    _add_sample(parser, SAMPLE_CHARACTERS)


def _add_compare(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        "bytes per token, losslessness and size of tokenizers",
        "Measure tokenizers on the same text. Lossless: every document comes back byte for byte, without which no "
        "score counts. Compressed: what the model takes of an artifact. Runs the files in this process: only those "
        "that you trust.",
        "pgolf tokenizer compare bytes a.model b/tokenizer.json --text corpus.jsonl.zst --plot sizes.png",
        _compare,
    )
    parser.add_argument("tokenizers", nargs="+", metavar="TOKENIZER", help="a .model, a tokenizer.json, or bytes")
    parser.add_argument("--text", nargs="+", required=True, metavar="SOURCE", help="files, folders or a hub dataset")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bytes per token over vocabulary as a PNG")
    _add_sample(parser, 4_000_000)


def _add_sample(parser: argparse.ArgumentParser, characters: int) -> None:
    add_text(parser)
    parser.add_argument("--transform", choices=TRANSFORMS, help="a reversible transform before the tokenizer")
    parser.add_argument(
        "--sample", type=positive, default=characters, metavar="N", help="characters of text (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the result for programs")


def _sample(args: argparse.Namespace) -> list[str]:
    sources = resolve(args.text, config=args.config, split=args.split, lines=args.lines, note=note)
    return workbench.sample(sources, args.field, args.sample)


def _train(args: argparse.Namespace) -> int:
    if args.vocab_size > VOCAB_SIZE:
        raise UsageError(f"--vocab-size {args.vocab_size} is over {VOCAB_SIZE:,}: tokens are uint16")
    if args.out.suffix != ".model":
        raise UsageError(f"{args.out}: SentencePiece models end in .model")
    texts = _sample(args)
    workbench.train(texts, args.vocab_size, args.normalization, args.transform, args.out)
    result = {"tokenizer": str(args.out), "vocab_size": args.vocab_size, "bytes": args.out.stat().st_size}
    result |= {"documents": len(texts), "characters": sum(map(len, texts))}
    if args.json:
        print(json.dumps(result, allow_nan=False))
    else:
        print(
            f"{printable(args.out)}: {args.vocab_size:,} pieces, {result['bytes']:,} bytes, trained on "
            f"{result['characters']:,} characters of {len(texts):,} documents"
        )
    return 0


def _compare(args: argparse.Namespace) -> int:
    texts = _sample(args)
    rows = workbench.compare(args.tokenizers, texts, args.transform)
    print(json.dumps([asdict(row) for row in rows], allow_nan=False) if args.json else _table(rows, texts))
    if args.plot and (problem := plots.draw_vocabularies([asdict(row) for row in rows], args.plot)):
        note(problem)
    return 0


def _table(rows: Sequence[Measured], texts: Sequence[str]) -> str:
    width = max(len("tokenizer"), *(len(printable(row.name)) for row in rows))
    size = sum(len(text.encode()) for text in texts)
    lines = [
        f"{len(texts):,} documents, {size:,} bytes",
        f"{'tokenizer':{width}}  vocabulary  bytes/token       tokens  model bytes  compressed  lossless",
    ]
    for row in rows:
        lossless = f"no, {row.changed:,} documents change" if row.changed else "yes"
        lines.append(
            f"{printable(row.name):{width}}  {row.vocab_size:10,}  {row.bytes_per_token:11.4f}  {row.tokens:11,}  "
            f"{row.model_bytes:11,}  {row.compressed_bytes:10,}  {lossless}"
        )
    for row in rows:
        if at := row.first_change:
            lines.append(
                f"{printable(row.name)}: document {at.document}, byte {at.byte}: {at.text!r} comes back as {at.back!r}"
            )
    return "\n".join(lines)
