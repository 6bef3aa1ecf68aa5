"""Write the text of docs/benchmarks/golf.md: train.jsonl, and val.jsonl with the contest's validation head.

The contest's shards hold its validation text as its tokenizer left it, Unicode-normalised, so the training documents
go through the same tokenizer. Those of --train all go in; documents of --also, if given, are spread evenly between
them until the whole has --bytes bytes.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import zstandard

from pgolf.data.dataset import open_dataset


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python scripts/contest_text.py --shards SHARDS --train HEAD.jsonl.zst --out data/text",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shards", type=Path, required=True, help="folder with the contest's shards and tokenizer")
    parser.add_argument("--train", type=Path, required=True, help="training documents, .jsonl.zst")
    parser.add_argument("--also", type=Path, help="more training documents, .jsonl.zst")
    parser.add_argument("--bytes", type=int, default=0, help="size of the training text with them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    args = parser.parse_args()
    data = open_dataset(args.shards)
    text = data.canonical_text()
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(data.tokenizer))
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


def documents(path: Path) -> Iterator[str]:
    with path.open("rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.TextIOWrapper(stream, encoding="utf-8"):
            yield json.loads(line)["text"]


def spread(few: list[str], many: list[str]) -> list[str]:
    """Both lists in one, each at an even pace."""
    places = [((i + 0.5) / len(texts), text) for texts in (few, many) for i, text in enumerate(texts)]
    return [text for _, text in sorted(places, key=lambda place: place[0])]


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    print(f"{path}: {len(texts):,} documents, {sum(len(t.encode()) for t in texts):,} bytes")


if __name__ == "__main__":
    main()
