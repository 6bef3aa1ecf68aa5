"""Write the text of docs/benchmarks/golf.md: train.jsonl, and val.jsonl with the contest's validation head.

The contest's shards hold its validation text as its tokenizer left it, Unicode-normalised, so the training documents
go through the same tokenizer. Those of --train all go in; documents of --also, if given, are spread evenly between
them until the whole has --bytes bytes.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from pgolf.data.build.sources import read, resolve
from pgolf.data.dataset import load_tokenizer, open_dataset
from pgolf.errors import PgolfError
from pgolf.files import write_atomically


def main() -> int:
    """Write the two files; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python scripts/benchmarks/contest_text.py "
        "--shards SHARDS --train HEAD.jsonl.zst --out data/text",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", type=Path, required=True, help="folder with the contest's shards and tokenizer")
    parser.add_argument("--train", required=True, help="training documents")
    parser.add_argument("--also", help="more training documents")
    parser.add_argument("--bytes", type=int, default=0, help="size of the training text with them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    args = parser.parse_args()
    try:
        make(args)
    except PgolfError as error:
        print(f"contest_text: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make(args: argparse.Namespace) -> None:
    data = open_dataset(args.shards)
    text, tokenizer = data.canonical_text(), load_tokenizer(data.tokenizer)
    head = [tokenizer.decode(tokenizer.encode(t)) for t in documents(args.train)]
    more, missing = [], args.bytes - sum(len(t.encode()) for t in head)
    for document in documents(args.also) if args.also else ():
        if missing <= 0:
            break
        more.append(tokenizer.decode(tokenizer.encode(document)))
        missing -= len(more[-1].encode())
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl", spread(head, more))
    write(args.out / "val.jsonl", [d.decode() for d in text.documents])


def documents(source: str) -> Iterator[str]:
    for batch in read(resolve([source], config=None, split="train", lines=False), "text"):
        for _, text in batch.texts("text"):
            yield text or ""


def spread(few: list[str], many: list[str]) -> list[str]:
    """Both lists in one, each at an even pace."""
    places = [((i + 0.5) / len(texts), text) for texts in (few, many) for i, text in enumerate(texts)]
    return [text for _, text in sorted(places, key=lambda place: place[0])]


def write(path: Path, texts: list[str]) -> None:
    write_atomically(path, "".join(json.dumps({"text": t}) + "\n" for t in texts).encode())
    print(f"{path}: {len(texts):,} documents, {sum(len(t.encode()) for t in texts):,} bytes")


if __name__ == "__main__":
    sys.exit(main())
