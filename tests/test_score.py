"""The scorer against an independent reference: slow, plain, in one process."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece as spm
import torch

from conftest import CAUSAL, DOCUMENTS, UNIFORM, MakeArtifact
from pgolf import rules
from pgolf.score.predictors import negative_log_likelihood
from pgolf.score.score import score


def reference(
    predict: str,
    documents: Sequence[Sequence[int]],
    text_bytes: int,
    vocab: int,
    context: int,
    stride: int,
    mode: str,
) -> tuple[float, float, int]:
    """nats per token, bpb, tokens: one window at a time, token by token, in double precision at the end."""
    namespace: dict[str, object] = {}
    exec(predict.replace("VOCAB", str(vocab)), namespace)
    model = namespace["load"](None, torch.device("cpu"))  # type: ignore[operator]
    bos = 1
    if mode == "packed":
        flat = [t for d in documents for t in (bos, *d)]
        segments = [(flat, [*flat[1:], bos])]
    else:
        segments = [([bos, *d], [*d, bos]) for d in documents]
    total, count = 0.0, 0
    for inputs, targets in segments:
        done = 0
        start = 0
        while done < len(inputs):
            window = inputs[start : start + context]
            logits = model(torch.tensor([window]))[0].double()
            for position in range(start, start + len(window)):
                if position >= done:
                    row = logits[position - start]
                    total -= float(torch.log_softmax(row, 0)[targets[position]])
                    count += 1
            done = start + len(window)
            start += stride
    return total / count, total / math.log(2) / text_bytes, count


@pytest.mark.parametrize(
    ("mode", "context", "stride"),
    [
        ("packed", 64, 64),
        ("packed", 64, 16),
        ("document", 32, 32),
        ("document", 48, 7),
        ("packed", 4096, 4096),
    ],
)
def test_agrees_with_reference(
    make_artifact: MakeArtifact, dataset: Path, tokenizer_model: Path, mode: str, context: int, stride: int
) -> None:
    """Loss and bpb agree to 1e-6 relative over empty, tiny, long and non-Latin documents and window edges."""
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer_model))
    documents = [processor.encode(document) for document in DOCUMENTS]
    assert max(map(len, documents)) > 10 * 64
    size = sum(len(document.encode()) for document in DOCUMENTS)
    artifact = make_artifact(CAUSAL, window=mode, context=context, stride=stride)
    record = score(artifact, dataset)
    assert record["status"] == "ok", record["reason"]
    nats, bpb, tokens = reference(CAUSAL, documents, size, processor.vocab_size(), context, stride, mode)
    assert record["tokens"] == tokens == sum(len(d) + 1 for d in documents)
    assert record["bytes"] == size
    assert record["nats_per_token"] == pytest.approx(nats, rel=1e-6)
    assert record["bpb"] == pytest.approx(bpb, rel=1e-6)


def test_bytes_tokenizer(make_artifact: MakeArtifact, dataset: Path) -> None:
    """Plain bytes: a uniform model over 257 symbols costs log2(257) bits per byte and per document end."""
    record = score(make_artifact(UNIFORM, tokenizer="bytes", vocab_size=257, bos=256), dataset)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert record["status"] == "ok", record["reason"]
    assert record["tokens"] == size + len(DOCUMENTS)
    assert record["bpb"] == pytest.approx((size + len(DOCUMENTS)) * math.log2(257) / size, rel=1e-9)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_rows(make_artifact: MakeArtifact, dataset: Path, dtype: str) -> None:
    """Rows in half precision score like the same rows widened by the reference."""
    half = CAUSAL.replace("return x @ self.head", f"return (x @ self.head).to(torch.{dtype})")
    widened = CAUSAL.replace("return x @ self.head", f"return (x @ self.head).to(torch.{dtype}).float()")
    a = score(make_artifact(half), dataset)
    b = score(make_artifact(widened, name="b.zst"), dataset)
    assert a["status"] == b["status"] == "ok"
    assert a["bpb"] == pytest.approx(b["bpb"], rel=1e-9)


def test_sample_and_unboxed_runs_are_not_eligible(
    make_artifact: MakeArtifact, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a full, boxed run with enough audited tokens may enter a leaderboard; the record says which it was."""
    artifact = make_artifact(UNIFORM)
    few = score(artifact, dataset)
    assert few["status"] == "ok" and few["audit"]["positions"] < rules.AUDIT_LEAST and not few["eligible"]
    monkeypatch.setattr(rules, "AUDIT_LEAST", 1)
    full = score(artifact, dataset)
    sample = score(artifact, dataset, documents=3)
    unboxed = score(artifact, dataset, isolated=False)
    foreseen = score(artifact, dataset, audit_seed=1)
    assert [r["status"] for r in (full, sample, unboxed, foreseen)] == ["ok"] * 4
    assert [r["eligible"] for r in (full, sample, unboxed, foreseen)] == [True, False, False, False]
    assert sample["documents"] == 3
    assert unboxed["isolation"] == "none" != full["isolation"]
    assert unboxed["bpb"] == full["bpb"]


def test_probabilities_cannot_add_up_to_more_than_one() -> None:
    """A row built to lose its small terms in an fp32 sum gains nothing: the sum is taken in fp64."""
    vocab = 1 << 18
    logits = torch.full((1, vocab), math.log(5.9e-8))
    logits[0, 0] = 0.0
    nll = negative_log_likelihood(logits, torch.tensor([0]))
    exact = math.log(1 + (vocab - 1) * math.exp(float(logits[0, 1])))
    assert float(nll) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-42, 1.0, 1e38])
def test_extreme_logits_stay_a_distribution(scale: float) -> None:
    """Denormal and huge logits give a proper code length for every symbol (Kraft's inequality)."""
    row = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0]) * scale
    logits = row.repeat(5, 1)
    nll = negative_log_likelihood(logits, torch.arange(5))
    assert float(torch.exp(-nll).sum()) == pytest.approx(1.0, abs=1e-6)


def test_rows_that_are_not_finite_are_marked() -> None:
    """NaN and both infinities in any place of a row make its code length NaN, and only that row's."""
    logits = torch.zeros(4, 8)
    logits[0, 3], logits[1, 0], logits[2, 7] = math.nan, math.inf, -math.inf
    nll = negative_log_likelihood(logits, torch.zeros(4, dtype=torch.int64))
    assert torch.isnan(nll).tolist() == [True, True, True, False]
