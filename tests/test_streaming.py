"""Streaming predictors: scores against an independent loop, the order of events, and rounds that go wrong."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DOCUMENTS, MakeArtifact
from pgolf import rules
from pgolf.artifact import read
from pgolf.sandbox.wire import Ids
from pgolf.score import score as scoring
from pgolf.score import windows
from pgolf.score.score import score
from pgolf.score.windows import Plan

BOS = 1

# Counts of the tokens of earlier rounds, and of those before in the document; what was seen of a document that goes
# on is kept. It checks what it is shown, and blocks end in the middle of documents.
COUNTING = """
import torch

class Counting:
    def __init__(self):
        self.seen, self.own = torch.zeros(VOCAB), torch.zeros(VOCAB)
        self.answered = None

    def predict(self, documents):
        assert sum(map(len, documents)) <= ROUND, "a round is too long"
        assert all(ids[0] == 1 for ids in documents[1:]), "a document goes on that is not the first"
        rows = []
        for ids in documents:
            own = torch.nn.functional.one_hot(ids, VOCAB).float().cumsum(0)
            rows.append(torch.log1p(self.seen + 5 * (own if ids[0] == 1 else self.own + own)))
        yield from torch.cat(rows).split(7)
        self.answered = [ids.tolist() for ids in documents]

    def update(self, documents):
        if STRICT:
            assert self.answered == [ids.tolist() for ids in documents], "update does not follow its rows"
        self.answered = None
        for ids in documents:
            count = torch.bincount(ids, minlength=VOCAB).float()
            self.seen += count
            self.own = count if ids[0] == 1 else self.own + count

def load(root, device):
    return Counting()
"""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about scores; a slow machine does not matter."""
    monkeypatch.setattr(rules, "AUDIT_SECONDS", 300.0)


def counting(tokens: int, strict: bool = False) -> str:
    return COUNTING.replace("ROUND", str(tokens)).replace("STRICT", str(strict))


def encoded(tokenizer: Path) -> list[list[int]]:
    processor = spm.SentencePieceProcessor(model_file=str(tokenizer))
    return [processor.encode(document) for document in DOCUMENTS]


def reference(documents: Sequence[Sequence[int]], vocab: int, tokens: int, adapts: bool) -> tuple[float, int]:
    """nats and tokens of the counting predictor, one token at a time in double precision."""
    seen: Counter[int] = Counter()
    waiting: list[int] = []  # tokens of the round that is not over
    total, count = 0.0, 0
    for document in documents:
        inputs, own = [BOS, *document], Counter[int]()
        for token, target in zip(inputs, [*document, BOS], strict=True):
            if count and count % tokens == 0:  # a round begins
                seen.update(waiting if adapts else [])
                waiting = []
                own = own if adapts else Counter()
            waiting.append(token)
            own[token] += 1
            weights = [1 + seen[w] + 5 * own[w] for w in range(vocab)]
            total -= math.log(weights[target] / sum(weights))
            count += 1
    return total, count


@pytest.mark.parametrize(("tokens", "adapts"), [(64, True), (100, True), (4096, True), (64, False)])
def test_agrees_with_reference(
    make_artifact: MakeArtifact, dataset: Path, tokenizer_model: Path, tokens: int, adapts: bool
) -> None:
    """Loss over empty documents and over one that is longer than several rounds; and the audit accepts it."""
    documents = encoded(tokenizer_model)
    assert [] in documents and max(map(len, documents)) > 5 * 100
    vocab = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).vocab_size()
    record = score(make_artifact(counting(tokens), **streaming(tokens, adapts)), dataset)
    assert record["status"] == "ok", record["reason"]
    total, count = reference(documents, vocab, tokens, adapts)
    assert record["tokens"] == count == sum(len(ids) + 1 for ids in documents)
    assert record["nats_per_token"] * count == pytest.approx(total, rel=1e-6)
    assert abs(record["audit"]["largest"]) < 1e-4


def test_update_follows_each_round_once(make_artifact: MakeArtifact, dataset: Path) -> None:
    """The predictor itself sees: one update after each round's rows, with the same documents."""
    record = score(make_artifact(counting(64, strict=True), **streaming(64)), dataset, audited=False)
    assert record["status"] == "ok", record["reason"]


class Recorder:
    """Stands in for a worker: answers with even rows and notes the order of events."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.events: list[tuple[str, int]] = []
        self.shown: list[list[Ids]] = []

    def show(self, number: int, documents: list[Ids]) -> Iterator[torch.Tensor]:
        self.events.append(("shown", number))
        self.shown.append(documents)
        yield from torch.zeros(sum(map(len, documents)), self.vocab).split(5)
        self.events.append(("rows in", number))

    def update(self, documents: list[Ids]) -> None:
        assert all(map(np.array_equal, documents, self.shown[-1]))
        self.events.append(("update", len(self.shown) - 1))


def test_next_round_waits_for_all_rows(make_artifact: MakeArtifact, tokenizer_model: Path) -> None:
    """Round r + 1 leaves the scorer when every row of round r is in and the update is done."""
    artifact = read(make_artifact(counting(64), **streaming(64)), 16_000_000)
    plan = Plan.make(artifact.manifest, [np.array(ids, dtype=np.int32) for ids in encoded(tokenizer_model)])
    recorder = Recorder(artifact.manifest.vocab_size)
    nll = scoring.predict(artifact, plan, [recorder])  # type: ignore[list-item]
    expected = [(what, number) for number in range(len(plan.rounds)) for what in ("shown", "rows in", "update")]
    assert recorder.events == expected
    assert (
        np.concatenate([ids for documents in recorder.shown for ids in documents]).tolist() == plan.stream[:-1].tolist()
    )
    assert nll == pytest.approx(math.log(artifact.manifest.vocab_size))


@settings(deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=30), st.integers(64, 200))
def test_rounds_are_full_and_complete(lengths: list[int], most: int) -> None:
    """Rounds end at places that no text can choose, and hold the stream in order; only a first piece goes on."""
    documents = [np.full(length, 5, dtype=np.int32) for length in lengths]
    stream, boundaries = windows.stream(documents, BOS)
    plan = Plan(stream, tuple(windows.rounds(boundaries, most)))
    shown = [plan.show(number) for number in range(len(plan.rounds))]
    assert np.array_equal(np.concatenate([ids for documents in shown for ids in documents]), stream[:-1])
    assert {sum(map(len, documents)) for documents in shown[:-1]} <= {most}
    assert 0 < sum(map(len, shown[-1])) <= most
    for documents in shown:
        assert all(len(ids) and ids[0] == BOS for ids in documents[1:])


FAULTS = {
    "a row too few": ("rows[-1] = rows[-1][:-1]", "round 0: predict: ValueError: predict gave"),
    "a row too many": ("rows.append(rows[-1][:1])", "round 0: predict: ValueError: predict gave"),
    "no rows": ("rows = [torch.zeros(0, VOCAB)]", "round 0: "),
    "too wide": ("rows = [torch.zeros(len(torch.cat(documents)), VOCAB + 1)]", "round 0: rows of"),
    "three dimensions": ("rows = [torch.cat(rows)[None]]", "round 0: "),
    "integers": ("rows = [torch.cat(rows).long()]", "logits are torch.int64"),
    "nan": ("rows[-1][-1, 3] = float('nan')", "NaN or infinity"),
    "raises": ("raise KeyError('no such thing')", "round 0: predict: KeyError: 'no such thing' (predict.py, line"),
    "no update": ("del Counting.update", "no attribute 'update'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_round(make_artifact: MakeArtifact, dataset: Path, name: str) -> None:
    """What a streaming predictor can get wrong is refused in one sentence, at once."""
    body, expected = FAULTS[name]
    vocab = str(read(make_artifact(counting(256), **streaming(256)), 16_000_000).manifest.vocab_size)
    source = counting(256).replace("        yield from", f"        {body}\n        yield from").replace("VOCAB", vocab)
    record = score(make_artifact(source, **streaming(256)), dataset)
    assert record["status"] == "refused"
    assert expected in record["reason"]
    assert record["reason"].isprintable()
    assert record["seconds"]["total"] < 60


def test_peeking_within_a_round_is_refused(make_artifact: MakeArtifact, dataset: Path) -> None:
    """A predictor that counts the whole round before it answers gains bits, and not in the audit."""
    cheat = counting(4096).replace("        rows = []\n", "        self.update(documents)\n        rows = []\n")
    bare = score(make_artifact(cheat, **streaming(4096)), dataset, audited=False)
    honest = score(make_artifact(counting(4096), **streaming(4096)), dataset, audited=False)
    assert bare["nats_per_token"] < honest["nats_per_token"] - 0.02
    record = score(make_artifact(cheat, **streaming(4096)), dataset)
    assert record["status"] == "refused"
    assert "the blind audit refuses it" in record["reason"]


def streaming(tokens: int, adapts: bool = True) -> dict[str, object]:
    """Manifest fields of a streaming predictor."""
    return {"form": "streaming", "context": None, "round": tokens, "adapts": adapts}
