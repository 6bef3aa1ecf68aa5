"""Small datasets and artifacts for all tests."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece as spm
from hypothesis import strategies as st

from pgolf.artifact import pack
from pgolf.data.dataset import FORMAT, INDEX, file_digest, text_digest
from pgolf.data.shards import write_shard

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are taken by the other workers

ALL = os.environ.get("PGOLF_TEST_ALL") == "1"
"""Whether to run every attack, kill point and repetition in place of a fixed sample."""
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"

needs_fineweb = pytest.mark.skipif(not SHARED.is_dir(), reason="real FineWeb pieces are not beside the checkout")

DOCUMENTS = (
    "The quick brown fox jumps over the lazy dog.\nAnd then it rests.\n",
    "",
    "x",
    "Ünïcödé, naïve café; 漢字とかな交じり文, русский текст, العربية, हिन्दी.",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 and \t tabs,  double  spaces \r\n and <s> that is no token",
    " ".join(f"sentence {i} of a long document about numbers like {i * i}." for i in range(60)),
    "short",
    "last one, with a trailing space ",
)


def damaged(data: st.DataObject, whole: bytes) -> bytes:
    """`whole` with one byte changed, its end cut off, or up to eight bytes put in."""
    changed = bytearray(whole)
    at = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "grow"])):
        case "flip":
            changed[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del changed[at:]
        case _:
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    return bytes(changed)


UNIFORM = """
import torch

class Uniform:
    def step(self, ids, lane):
        return torch.zeros(len(ids), VOCAB)

def load(root, device, lanes, count):
    return Uniform()
"""

# A recurrent model of fixed random weights: looks at the token, how many came before, and their mean.
CAUSAL = """
import torch

class Model:
    def __init__(self, lanes):
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(VOCAB, 32, generator=generator)
        self.head = torch.randn(32, VOCAB, generator=generator) / 4
        self.sum, self.seen = torch.zeros(lanes, 32), torch.zeros(lanes, 1)

    def step(self, ids, lane):
        x = self.table[ids]
        begins = (ids == 1)[:, None]
        self.sum[lane] = torch.where(begins, 0.0, self.sum[lane]) + x
        self.seen[lane] = torch.where(begins, 0.0, self.seen[lane]) + 1
        x = x + self.sum[lane] / self.seen[lane] + torch.sin(self.seen[lane] / 7.0)
        return x @ self.head

def load(root, device, lanes, count):
    return Model(lanes)
"""

# Learns from every token that it is shown, in all lanes together.
COUNTS = """
import torch

class Counts:
    def __init__(self, lanes):
        self.counts = torch.ones(VOCAB, VOCAB)
        self.before = torch.full((lanes,), -1)

    def step(self, ids, lane):
        before = self.before[lane]
        known = before >= 0
        self.counts.index_put_((before[known], ids[known]), torch.tensor(1.0), accumulate=True)
        self.before[lane] = ids
        return self.counts[ids].log()

def load(root, device, lanes, count):
    return Counts(lanes)
"""

# The window form of a causal model: looks at the token, its position in the window, and the mean before it.
WINDOW = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randn(VOCAB, 32, generator=generator)
        self.head = torch.randn(32, VOCAB, generator=generator) / 4

    def forward(self, ids):
        x = self.table[ids]
        steps = torch.arange(1, ids.shape[1] + 1)[None, :, None]
        x = x + x.cumsum(1) / steps + torch.sin(steps / 7.0)
        return x @ self.head

def load(root, device):
    return Model()
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers the tests of a file run in one of them: they share what its fixtures make."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


@pytest.fixture(scope="session", autouse=True)
def own_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A lock for the tests alone: they neither wait for a scorer on this machine nor delay one. And a key for
    re-runs.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGOLF_LOCK", str(tmp_path_factory.mktemp("lock") / "lock"))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lossless SentencePiece model with byte fallback, small enough to train in a moment."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with path.open("wb") as file:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(DOCUMENTS[5].split(".")),
            model_writer=file,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return path


def contest_folder(root: Path, model: Path, shards: Sequence[Sequence[int]], validation: Sequence[int]) -> Path:
    """A dataset in the contest's layout, with the tokens of each training shard, in `root`."""
    root.mkdir()
    (root / "tokenizer.model").write_bytes(model.read_bytes())
    for number, tokens in enumerate(shards):
        write_shard(root / f"fineweb_train_{number:06d}.bin", np.array(tokens, dtype=np.uint16))
    write_shard(root / "fineweb_val_000000.bin", np.array(validation, dtype=np.uint16))
    return root


def write_dataset(root: Path, documents: Sequence[str], tokenizer: Path) -> Path:
    """A dataset folder in pgolf's layout whose validation text is `documents`."""
    root.mkdir(parents=True)
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    bos = processor.bos_id()
    tokens = [t for d in documents for t in (bos, *processor.encode(d))]
    (root / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    for name in ("train_000000.bin", "val_000000.bin"):
        write_shard(root / name, np.array(tokens, dtype=np.uint16))
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (root / "val_documents.jsonl").write_text(lines, encoding="utf-8")
    encoded = [document.encode() for document in documents]
    index = {
        "format": FORMAT,
        "name": root.name,
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": file_digest(tokenizer),
            "vocab_size": processor.vocab_size(),
            "bos": bos,
        },
        "shards": [
            {"file": name, "sha256": file_digest(root / name), "tokens": len(tokens)}
            for name in ("train_000000.bin", "val_000000.bin")
        ],
        "text": {
            "file": "val_documents.jsonl",
            "sha256": text_digest(encoded),
            "bytes": sum(map(len, encoded)),
            "documents": len(encoded),
        },
    }
    (root / INDEX).write_text(json.dumps(index))
    return root


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_model: Path) -> Path:
    """The folder of a small dataset with difficult text."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny", DOCUMENTS, tokenizer_model)


Members = Mapping[str, bytes | None]
MakeArtifact = Callable[..., Path]


@pytest.fixture
def make_artifact(tmp_path: Path, tokenizer_model: Path) -> MakeArtifact:
    """A function that packs an artifact around the source of a `predict.py`."""
    vocab = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).vocab_size()

    def make(predict: str, members: Members | None = None, name: str = "a.zst", **manifest: Any) -> Path:
        path = tmp_path / name
        path.write_bytes(artifact_bytes(tmp_path, predict, vocab, tokenizer_model, members or {}, manifest))
        return path

    return make


def artifact_bytes(
    folder: Path, predict: str, vocab: int, tokenizer: Path, members: Members, manifest: dict[str, Any]
) -> bytes:
    """The bytes of an artifact; VOCAB in `predict` becomes the vocabulary size, a None member is left out."""
    fields: dict[str, Any] = {
        "name": "test",
        "author": "tests",
        "track": "laptop",
        "vocab_size": vocab,
        "bos": 1,
        "tokenizer": "tokenizer.model",
        "packages": ["torch"],
        **({"context": 64} if manifest.get("form") == "window" else {"form": "step", "lanes": 3}),
    } | manifest
    predict = predict.replace("VOCAB", str(fields["vocab_size"]))
    content: dict[str, bytes | None] = {
        "submission.json": json.dumps(fields).encode(),
        "predict.py": predict.encode(),
        "train.py": b"# nothing to train\n",
        "tokenizer.model": tokenizer.read_bytes(),
        **members,
    }
    path = folder / "packed.part"
    pack({k: v for k, v in content.items() if v is not None}, path, 16_000_000)
    data = path.read_bytes()
    path.unlink()
    return data
