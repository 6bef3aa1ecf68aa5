"""A trainer and a scorer for tests of the re-run: quick, and one artifact for each seed."""

import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm

from conftest import DOCUMENTS, write_dataset
from pgolf import artifact, rules
from pgolf.contest import rerun
from pgolf.contest.rerun_record import Calibration
from pgolf.data.dataset import INDEX, Dataset, open_dataset
from pgolf.data.shards import write_shard
from pgolf.sandbox.training import Job, Limits, Trained
from pgolf.score import score as scorer
from pgolf.score.losses import Losses
from pgolf.score.record import CodeLength, Packed, Record, Text, new

CALIBRATION = Calibration(0.1, 0.2, 10.0, 100.0, 1.0)
PREDICT = b"""
import torch

class Biased:
    def __init__(self, vocab, bias):
        self.row = torch.zeros(vocab)
        self.row[1] = bias

    def step(self, ids, lane):
        return self.row.expand(len(ids), -1)

def load(root, device, lanes, count):
    return Biased(VOCAB, (root / "weights.bin").read_bytes()[0] / 64)
"""


def disjoint_dataset(root: Path, tokenizer: Path, documents: tuple[str, ...] = DOCUMENTS) -> Path:
    """A dataset whose training text is not its validation text."""
    write_dataset(root, documents, tokenizer)
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    text = [f"training document {number}, and nothing else" for number in range(50)]
    tokens = [token for document in text for token in (processor.bos_id(), *processor.encode(document))]
    write_shard(root / "train_000000.bin", np.array(tokens, dtype=np.uint16))
    index = json.loads((root / INDEX).read_text())
    index["shards"][0]["tokens"] = len(tokens)
    (root / INDEX).write_text(json.dumps(index))
    return root


def packed(members: dict[str, bytes]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.zst"
        artifact.pack(members, path, 1_000_000)
        return path.read_bytes()


def submission(dataset: Path, steps: int = 100, weights: bytes = b"\0", **manifest: Any) -> dict[str, bytes]:
    """Members of an artifact that `Trainer` can train again."""
    data = open_dataset(dataset)
    declared = {"arguments": ["--lr=1"], "settings": {"lr": 1}, "steps": steps, "tokens": 1000, "parameters": 10}
    fields = {
        "name": "test",
        "author": "tests",
        "track": "laptop",
        "vocab_size": data.vocab_size,
        "bos": data.bos,
        "tokenizer": "tokenizer.model",
        "form": "step",
        "lanes": 3,
        "packages": ["torch"],
        "training": declared,
    }
    return {
        "submission.json": json.dumps(fields | manifest).encode(),
        "predict.py": PREDICT.replace(b"VOCAB", str(data.vocab_size).encode()),
        "train.py": b"# nothing to train\n",
        "tokenizer.model": data.tokenizer.read_bytes(),
        "weights.bin": weights,
    }


@dataclass
class Trainer:
    """In place of `sandbox.training.train`: weights from the seed, the rest from `members`."""

    members: dict[str, bytes]
    weights: Callable[[int], bytes] = lambda seed: (seed % 65536).to_bytes(2, "big")
    change: Callable[[dict[str, bytes]], dict[str, bytes]] = lambda members: members
    error: Exception | None = None
    """Raised once, by the next training."""
    jobs: list[Job] = field(default_factory=list)
    limits: Limits | None = None
    seconds: float = 0.0

    def __call__(self, job: Job, limits: Limits, *, isolated: bool = True) -> Trained:
        self.jobs.append(job)
        self.limits = limits
        time.sleep(self.seconds)
        if self.error:
            error, self.error = self.error, None
            raise error
        seed = int(job.arguments[job.arguments.index("--seed") + 1])
        content = packed(self.change(self.members | {"weights.bin": self.weights(seed)}))
        return Trained(content, {"sandbox": 1.0, "prepare": 2.0, "train": 3.0}, "hello\n", b'{"step": 1}\n')


@dataclass
class Scorer:
    """In place of `score.score`: bits per byte from the weights, on every text the same."""

    noise: float = 0.0001
    status: str = "ok"
    reason: str | None = None
    reasons: tuple[str, ...] = ()
    error: Exception | None = None
    shift: dict[str, float] = field(default_factory=dict)
    """Added for the text in a folder of this name."""
    calls: list[tuple[str, Path]] = field(default_factory=list)
    seconds: float = 0.0

    def __call__(self, path: Path, data: Dataset, options: scorer.Options, keep: Callable[[Losses], object]) -> Record:
        time.sleep(self.seconds)
        if self.error:
            raise self.error
        found = artifact.read(path, rules.ARTIFACT_BYTES)
        self.calls.append((found.sha256, data.root))
        text = data.canonical_text()
        bpb = 2.0 + self.noise * found.members["weights.bin"][-1] / 255 + self.shift.get(data.root.name, 0.0)
        sizes = np.array([len(document) for document in text.documents], dtype=np.int64)
        started = new(path, None, "cpu")
        values = vars(started) | {
            "status": self.status,
            "reason": self.reason,
            "artifact": Packed(found.sha256, found.size),
            "data": Text(data.name, text.sha256),
            "seconds": {"predict": 1.0, "total": 2.0},
        }
        if self.status == "ok":
            keep(Losses(found.sha256, text.sha256, bpb * math.log(2) * sizes, sizes))
            values |= {
                "bpb": bpb,
                "eligible": not self.reasons,
                "reasons": self.reasons,
                "bytes": text.bytes,
                "code": CodeLength(64, ()),
            }
        return Record(**values)


def install(patch: pytest.MonkeyPatch, trainer: Trainer, scorer_: Scorer) -> None:
    """Let the re-run use the fakes."""
    patch.setattr(rerun.training, "train", trainer)
    patch.setattr(rerun, "calibrate", lambda *args: CALIBRATION)
    patch.setattr(rerun.scorer, "score", scorer_)
