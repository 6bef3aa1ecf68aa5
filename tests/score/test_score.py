"""The scorer against an independent reference: slow, plain, in one process."""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as spm
import torch

import pgolf.__main__
from conftest import ALL, CAUSAL, COUNTS, DOCUMENTS, UNIFORM, WINDOW, MakeArtifact
from pgolf import rules
from pgolf.score import record
from pgolf.score.score import Options, score
from trainers import LINUX_ONLY

SMALL = f"the text has {sum(len(d.encode()) for d in DOCUMENTS):,} bytes, 2,000,000 are needed"
OWN_LOCK = "the lock is not the machine's"
CPU = Options(device="cpu")


def windows_reference(documents: Sequence[Sequence[int]], vocab: int, context: int, stride: int, mode: str) -> float:
    """Nats of all tokens by WINDOW: one window at a time, token by token, in double precision at the end."""
    namespace: dict[str, Any] = {}
    exec(WINDOW.replace("VOCAB", str(vocab)), namespace)
    model = namespace["load"](None, torch.device("cpu"))
    bos = 1
    if mode == "packed":
        flat = [t for d in documents for t in (bos, *d)]
        segments = [(flat, [*flat[1:], bos])]
    else:
        segments = [([bos, *d], [*d, bos]) for d in documents]
    total = 0.0
    for inputs, targets in segments:
        done = start = 0
        while done < len(inputs):
            window = inputs[start : start + context]
            logits = model(torch.tensor([window]))[0].double()
            for position in range(max(start, done), start + len(window)):
                total -= float(torch.log_softmax(logits[position - start], 0)[targets[position]])
            done = start + len(window)
            start += stride
    return total


def steps_reference(documents: Sequence[Sequence[int]], vocab: int) -> float:
    """Nats of all tokens by CAUSAL: one document after the other in a single lane."""
    namespace: dict[str, Any] = {}
    exec(CAUSAL.replace("VOCAB", str(vocab)), namespace)
    model = namespace["load"](None, None, 1, 0)
    total = 0.0
    for document in documents:
        for shown, target in zip([1, *document], [*document, 1], strict=True):
            logits = model.step(torch.tensor([shown]), torch.tensor([0])).double()
            total -= float(torch.log_softmax(logits[0], 0)[target])
    return total


@pytest.fixture(scope="module")
def encoded(tokenizer_model: Path) -> tuple[list[list[int]], int]:
    """The documents as ids, and the vocabulary's size."""
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer_model))
    return [processor.encode(document) for document in DOCUMENTS], processor.vocab_size()


@pytest.mark.parametrize("lanes", [1, 3, 50])
def test_steps_agree_with_reference(
    make_artifact: MakeArtifact, dataset: Path, encoded: tuple[list[list[int]], int], lanes: int
) -> None:
    """However many lanes, empty, tiny, long and non-Latin documents cost what they cost one after the other."""
    documents, vocab = encoded
    result = score(make_artifact(CAUSAL, lanes=lanes), dataset, Options(device="cpu", isolated=lanes == 3))
    assert result.status == "ok", result.reason
    nats, size = steps_reference(documents, vocab), sum(len(document.encode()) for document in DOCUMENTS)
    assert result.tokens == sum(len(d) + 1 for d in documents)
    assert result.bytes == size and result.documents == len(DOCUMENTS)
    assert result.nats_per_token * result.tokens == pytest.approx(nats, rel=1e-6)
    assert result.bpb == pytest.approx(nats / math.log(2) / size, rel=1e-6)


@pytest.mark.parametrize(
    ("mode", "context", "stride"), [("packed", 64, 16), ("document", 48, 7), ("packed", 4096, 4096)]
)
def test_windows_agree_with_reference(
    make_artifact: MakeArtifact,
    dataset: Path,
    encoded: tuple[list[list[int]], int],
    mode: str,
    context: int,
    stride: int,
) -> None:
    """The window form too, and the spot check finds nothing."""
    documents, vocab = encoded
    path = make_artifact(WINDOW, form="window", window=mode, context=context, stride=stride)
    result = score(path, dataset, Options(device="cpu", isolated=False))
    assert result.status == "ok", result.reason
    nats = windows_reference(documents, vocab, context, stride, mode)
    assert result.nats_per_token * result.tokens == pytest.approx(nats, rel=1e-6)
    assert result.spot_check.tokens == min(rules.SPOT_CHECK_TOKENS, result.tokens)
    assert result.spot_check.changed == 0


def test_spot_check_names_a_leak(
    make_artifact: MakeArtifact, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window form that uses the next token is scored, not proven, and told which token changed."""
    leak = "return 9.0 * torch.nn.functional.one_hot(ids.roll(-1, 1), VOCAB).float()"
    path = make_artifact(WINDOW.replace("return x @ self.head", leak), form="window")
    result = score(path, dataset, Options(device="cpu", isolated=False))
    assert result.status == "ok" and not result.eligible
    assert any("not proven: window form" in reason for reason in result.reasons)
    assert result.spot_check.changed > 10
    assert f"token {result.spot_check.token:,}" in record.table(result)


def test_bytes_tokenizer(make_artifact: MakeArtifact, dataset: Path) -> None:
    """Plain bytes: a uniform model over 257 symbols costs log2(257) bits per byte and per document end."""
    result = score(make_artifact(UNIFORM, tokenizer="bytes", vocab_size=257, bos=256, lanes=4), dataset, CPU)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert result.status == "ok", result.reason
    assert result.tokens == size + len(DOCUMENTS)
    assert result.bpb == pytest.approx((size + len(DOCUMENTS)) * math.log2(257) / size, rel=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"] if ALL else ["bfloat16"])
def test_half_precision_logits(make_artifact: MakeArtifact, dataset: Path, dtype: str) -> None:
    """Logits in half precision score like the same logits widened by the predictor."""
    half = CAUSAL.replace("return x @ self.head", f"return (x @ self.head).to(torch.{dtype})")
    widened = CAUSAL.replace("return x @ self.head", f"return (x @ self.head).to(torch.{dtype}).float()")
    options = Options(device="cpu", isolated=False)
    a = score(make_artifact(half), dataset, options)
    b = score(make_artifact(widened, name="b.zst"), dataset, options)
    assert a.status == b.status == "ok"
    assert a.bpb == pytest.approx(b.bpb, rel=1e-9)


def test_what_does_not_count_says_why(
    make_artifact: MakeArtifact, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full, sandboxed run of the step form counts; anything less has its reasons, and only those."""
    artifact = make_artifact(UNIFORM)
    small = score(artifact, dataset, CPU)
    assert (small.status, small.reasons, small.eligible) == ("ok", (SMALL, OWN_LOCK), False)
    monkeypatch.setattr(rules, "ELIGIBLE_TEXT_BYTES", 1)
    full = score(artifact, dataset, Options(device="cpu", fresh_machine=True))
    assert full.status == "ok" and full.reasons == () and full.eligible
    assert full.rules == rules.VERSION
    sample = score(artifact, dataset, Options(device="cpu", documents=3, isolated=False))
    assert sample.reasons == ("only a sample of the documents", "no sandbox") and not sample.eligible
    assert sample.documents == 3 and sample.isolation == "none" != full.isolation
    index = json.loads((dataset / "dataset.json").read_text())
    copy = make_artifact(UNIFORM, name="b.zst").parent / "demo"
    copy.mkdir()
    for file in dataset.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "dataset.json").write_text(json.dumps(index | {"environment": True}))
    demo = score(artifact, copy, Options(device="cpu", isolated=False))
    assert demo.reasons == ("the text can be rebuilt from what is installed on the machine (demo)", "no sandbox")


def test_clock_is_split(make_artifact: MakeArtifact, dataset: Path) -> None:
    """The record says where the evaluation's time went, and what is left of it."""
    result = score(make_artifact(COUNTS, layout="parts"), dataset, CPU)
    assert set(result.seconds) == {"encode", "decode", "load", "predictor", "wire", "scorer", "total"}
    charged = sum(value for name, value in result.seconds.items() if name != "total")
    assert result.margin == pytest.approx(120 - charged) and charged < result.seconds["total"]


def test_code_length_grows_to_the_score(make_artifact: MakeArtifact, dataset: Path) -> None:
    """The cumulative bits of every 64 steps rise to the score's own."""
    result = score(make_artifact(CAUSAL), dataset, Options(device="cpu", isolated=False))
    bits = list(result.code.bits)
    assert len(bits) == result.steps // rules.CODE_EVERY > 2
    assert bits == sorted(bits) and bits[0] > 0 and bits[-1] <= result.bpb * result.bytes


PLANNED = UNIFORM.replace(
    "class Uniform:", "class Uniform:\n    plan = 7\n    def __init__(self):\n        assert self.plan == 7"
)


def test_plan_is_recorded(make_artifact: MakeArtifact, dataset: Path) -> None:
    """What `load` plans stands in the record; more than 32 bits are refused."""
    options = Options(device="cpu", isolated=False)
    assert score(make_artifact(PLANNED), dataset, options).plan == 7
    large = score(make_artifact(PLANNED.replace("plan = 7", "plan = 1 << 32").replace("== 7", "")), dataset, options)
    assert large.status == "refused" and "a number of at most 32 bits" in large.reason


def test_scoring_without_sandbox_needs_nothing_that_only_linux_has(
    make_artifact: MakeArtifact, dataset: Path, tmp_path: Path
) -> None:
    """A Mac can score its own code: a practice score."""
    (tmp_path / "mac.py").write_text(LINUX_ONLY)
    command = [sys.executable, tmp_path / "mac.py", pgolf.__main__.__file__, "score", make_artifact(CAUSAL)]
    options = ["--data", dataset, "--device", "cpu", "--no-sandbox", "--json"]
    done = subprocess.run([*map(str, command), *map(str, options)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reasons"] == [SMALL, "no sandbox"]
