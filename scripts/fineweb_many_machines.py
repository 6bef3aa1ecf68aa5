"""FineWeb's training shards made by many machines with datatrove: its executors for one machine and for Slurm.

Not run against datatrove, which is not installed where this was written: it keeps to what datatrove documents.

    pgolf data build HELDOUT.jsonl --val-documents 50000 --tokenizer FILE --out DIR     # validation text and tokenizer
    python scripts/fineweb_many_machines.py DIR --tasks 64 [--slurm PARTITION]         # train_TASK_*.bin beside them
    python scripts/fineweb_many_machines.py DIR --tasks 64 --finish                    # once all tasks have ended

DIR must be on a disk that all machines share. A training document that is held out in DIR is dropped; --finish counts
such documents over all shards again and writes dataset.json only if there is none. Needs `pip install 'datatrove[io]'`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pgolf.data.build.batch import Batch
from pgolf.data.build.shard_writer import ShardWriter
from pgolf.data.build.tokenize import Encoding, encode
from pgolf.data.dataset import INDEX, document_digests, open_dataset, overlap
from pgolf.files import write_atomically

DOCUMENTS = 256  # tokenised at a time


def step(root: Path) -> Any:
    """The last block of the pipeline: writes the shards of one task, and a list of them when all are whole."""
    from datatrove.pipeline.base import PipelineStep

    class WriteShards(PipelineStep):  # type: ignore[misc]
        name = "pgolf shards"

        def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
            dataset = open_dataset(root)
            known = frozenset(document_digests(dataset.val_shards, dataset.vocab_size, dataset.bos))
            encoding = Encoding("text", dataset.tokenizer, dataset.transform, skip_bad=True)
            with ShardWriter(root, f"train_{rank:05d}", 100_000_000, [], 0) as shards:
                texts: list[str] = []
                for document in data:
                    texts.append(document.text)
                    if len(texts) == DOCUMENTS:
                        add(shards, texts, encoding, known)
                        texts = []
                    yield document
                add(shards, texts, encoding, known)
                shards.close_shard()
            write_atomically(root / f"task_{rank:05d}.json", json.dumps(shards.done).encode())

    return WriteShards()


def add(shards: ShardWriter, texts: list[str], encoding: Encoding, known: frozenset[bytes]) -> None:
    """Tokenise documents and append those that are not held out."""
    if texts:
        encoded = encode(Batch("datatrove", "document", 1, texts, 0), encoding, canonical=False).without(known)
        shards.add(encoded.tokens, encoded.lengths)


def finish(root: Path, tasks: int) -> None:
    """Put the shards of all tasks into dataset.json, in place of those that were there."""
    index = json.loads((root / INDEX).read_text())
    made = [shard for task in range(tasks) for shard in json.loads((root / f"task_{task:05d}.json").read_text())]
    index["shards"] = made + [shard for shard in index["shards"] if shard["file"].startswith("val_")]
    index["overlap"], before = 0, (root / INDEX).read_bytes()
    write_atomically(root / INDEX, json.dumps(index, indent=1).encode())
    if count := overlap(open_dataset(root)):
        write_atomically(root / INDEX, before)
        sys.exit(f"{count} training documents are validation documents; {root / INDEX} is as it was")


def main() -> None:
    """Start the tasks that are not done, or finish the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="DIR")
    parser.add_argument("--source", default="hf://datasets/HuggingFaceFW/fineweb/sample/10BT")
    parser.add_argument("--tasks", type=int, default=64, help="pieces of work, each with files of its own")
    parser.add_argument("--workers", type=int, default=8, help="tasks beside each other on this machine")
    parser.add_argument("--slurm", metavar="PARTITION", help="submit the tasks to Slurm instead")
    parser.add_argument("--finish", action="store_true", help="all tasks have ended: write dataset.json")
    args = parser.parse_args()
    if args.finish:
        return finish(args.root, args.tasks)
    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader

    common = {"pipeline": [ParquetReader(args.source, text_key="text"), step(args.root)], "tasks": args.tasks}
    common["logging_dir"] = str(args.root / "logs")
    if args.slurm:
        SlurmPipelineExecutor(**common, partition=args.slurm, time="08:00:00", job_name="fineweb").run()
    else:
        LocalPipelineExecutor(**common, workers=args.workers).run()


if __name__ == "__main__":
    main()
