"""Why the score cannot be faked: each sentence of the argument as a property of the code that keeps it.

What a sandbox receives before it has given its logits depends on scored tokens, the count and the manifest alone; so
the score is the length of a code, which a decoder that has only these reads back.
"""

import itertools
import json
import math
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stub import Stub

from conftest import UNIFORM, MakeArtifact, write_dataset
from pgolf.artifact import Artifact, Manifest, parse_manifest
from pgolf.sandbox import box, probe, wire
from pgolf.sandbox.wire import Channel, Kind, Ring
from pgolf.score import schedule, score
from pgolf.score.likelihood import log_losses
from pgolf.score.predictors import Predictor
from pgolf.score.schedule import Ids, Step, Targets

BOS = 2  # the vocabulary is 0, 1 and BOS
Documents = list[list[int]]

documents = st.lists(st.lists(st.integers(0, BOS - 1), max_size=12), min_size=1, max_size=8)
layouts = st.sampled_from(["documents", "parts"])
lanes = st.integers(1, 10)


def manifest(layout: str, lanes: int) -> Manifest:
    """Of a predictor over this vocabulary."""
    values = {"name": "n", "author": "a", "track": "laptop", "vocab_size": BOS + 1, "bos": BOS, "form": "step"}
    return parse_manifest(json.dumps(values | {"tokenizer": "t.py", "lanes": lanes, "layout": layout}).encode())


def arrays(texts: Documents) -> list[Ids]:
    """Documents as the scorer has them."""
    return [np.array(text, dtype=np.int32) for text in texts]


def count(layout: str, texts: Documents) -> int:
    """What a predictor is told."""
    return sum(map(len, texts)) + len(texts) if layout == "parts" else len(texts)


class Learner:
    """Counts of what followed the last token, in all lanes together, learned from everything that was shown."""

    def __init__(self, lanes: int) -> None:
        self.seen = torch.ones(BOS + 1, BOS + 1)
        self.last = [BOS] * lanes

    def step(self, ids: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
        """Logits (B, V); they depend on the order of all that came before."""
        for number, token in zip(lane.tolist(), ids.tolist(), strict=True):
            self.seen[self.last[number], token] += 1.3
            self.last[number] = token
        return (self.seen[ids] * (1 + 0.1 * lane[:, None])).log()


def plays(lanes: int, plan: int = 0, delay: float = 0.0) -> "Stub":
    """A worker that runs the learner."""

    def play(channel: Channel, ring: Ring) -> None:
        channel.send(Kind.READY, plan.to_bytes(wire.PLAN_BYTES, "little"))
        channel.receive(Kind.PLAN, wire.PLAN_BYTES)
        model = Learner(lanes)
        while True:
            step = wire.Step.decode(channel.receive(Kind.STEP, 1 << 20))
            logits = model.step(*(torch.from_numpy(part.astype(np.int64)) for part in (step.ids, step.lane)))
            memory = ring.slot(step.number % wire.SLOTS, 4 * logits.numel())
            torch.frombuffer(memory, dtype=torch.float32).view(logits.shape).copy_(logits)
            time.sleep(delay)
            channel.send(Kind.LOGITS, wire.Logits(step.number, *logits.shape, wire.Dtype.FLOAT32).encode())

    return Stub(play)


def transcript(layout: str, lanes: int, texts: Documents, delay: float = 0.0) -> tuple[Stub, np.ndarray]:
    """All that the scorer sends to a worker, and the log-loss of each token."""
    declared = manifest(layout, lanes)
    told = count(layout, texts)
    with plays(lanes) as stub, Predictor(Artifact("", 0, declared, {"predict.py": b"x"}), told, "cpu", True) as worker:
        worker.set_deadline(time.monotonic() + 60)
        worker.load()
        nll, _, _ = score.step_through(declared, arrays(texts), told, worker, lambda done: time.sleep(delay))
    return stub, nll


def code_length(layout: str, lanes: int, texts: Documents) -> float:
    """Bits that the learner needs, by the scorer's own functions, without a wire."""
    declared, model = manifest(layout, lanes), Learner(lanes)
    targets = Targets.of(declared, arrays(texts))
    walk = schedule.steps(declared, count(layout, texts))
    step, nats = schedule.begin(walk), 0.0
    while step is not None:
        logits = model.step(torch.from_numpy(step.shown).long(), torch.from_numpy(step.lane).long())
        at = targets.at(step)
        nats += float(log_losses(logits, targets.tokens, at).sum())
        step = schedule.advance(walk, targets.tokens[at])
    return nats / math.log(2)


def walked(layout: str, lanes: int, texts: Documents) -> Iterator[tuple[Step, np.ndarray]]:
    """Each step, and where in the text its targets stand."""
    declared = manifest(layout, lanes)
    targets = Targets.of(declared, arrays(texts))
    walk = schedule.steps(declared, count(layout, texts))
    step = schedule.begin(walk)
    while step is not None:
        yield step, targets.at(step)
        step = schedule.advance(walk, targets.tokens[targets.at(step)])


def scored_by(layout: str, lanes: int, texts: Documents) -> list[bytes]:
    """What has been scored after each step."""
    tokens = Targets.of(manifest(layout, lanes), arrays(texts)).tokens
    return [tokens[at].tobytes() for _, at in walked(layout, lanes, texts)]


@settings(deadline=None, max_examples=150)
@given(layouts, lanes, documents, documents, st.data())
def test_same_past_same_bytes(layout: str, lanes: int, one: Documents, two: Documents, data: st.DataObject) -> None:
    """Texts that agree on what is scored up to a step have sent the sandbox the same bytes by then.

    The bytes of step k are sent when k steps have been scored; how a worker is started knows the count alone.
    """
    if data.draw(st.booleans()):  # texts that agree for long are rare
        two = [list(text) for text in one]
        place = data.draw(st.integers(0, len(two) - 1))
        if two[place]:
            two[place][data.draw(st.integers(0, len(two[place]) - 1))] ^= 1
    first, _ = transcript(layout, lanes, one)
    second, _ = transcript(layout, lanes, two)
    if count(layout, one) != count(layout, two):
        return
    assert first.setup == second.setup
    scored = scored_by(layout, lanes, one), scored_by(layout, lanes, two)
    agree = next((k for k, (a, b) in enumerate(zip(*scored, strict=False)) if a != b), min(map(len, scored)))
    opening = 1 + agree + 1  # the plan, a step for each that is scored alike, and one that shows the last of them
    assert first.sent[:opening] == second.sent[:opening]


def test_bytes_do_tell_what_was_scored() -> None:
    """The property above is no accident of a recorder that records nothing."""
    first, _ = transcript("documents", 1, [[0, 0, 0]])
    second, _ = transcript("documents", 1, [[0, 1, 0]])
    assert [kind for kind, _ in first.sent] == [Kind.PLAN] + [Kind.STEP] * 4
    assert first.sent[:3] == second.sent[:3] and first.sent[3] != second.sent[3]
    assert first.setup[0][3]["config"] == {"form": "step", "lanes": 1, "count": 1}


def test_sandbox_starts_alike(
    make_artifact: MakeArtifact, tokenizer_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line, environment, descriptors and what lies behind them tell the count of documents, and no more."""
    started: list[Any] = []

    def start(command: list[str], **options: Any) -> None:
        line = [re.sub(r"pgolf-copy-\S+?-[0-9a-f]{16}|pgolf-\d+-predict-\d+", "FRESH", word) for word in command]
        behind = [(stat.S_IFMT(os.fstat(fd).st_mode), os.fstat(fd).st_size) for fd in options["pass_fds"]]
        started.append((line, behind, {key: value for key, value in options.items() if key != "stdin"}))
        raise FileNotFoundError(2, "recorded")

    monkeypatch.setenv("PGOLF_LOCK", str(tmp_path / "lock"))
    probe.isolation()  # which would start programs of its own
    monkeypatch.setattr(box, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": start}))
    fields = {"tokenizer": "bytes", "vocab_size": 257, "bos": 256, "form": "step", "lanes": 2, "context": None}
    path = make_artifact(UNIFORM, **fields)
    for number, texts in enumerate((["a", "b" * 9000, ""], ["The first one.", "", "ü"], ["one", "two"])):
        data = write_dataset(tmp_path / str(number), texts, tokenizer_model)
        assert "recorded" in score.score(path, data, score.Options(device="cpu"))["reason"]
    assert started[0] == started[1] != started[2]


@settings(deadline=None, max_examples=60)
@given(layouts, lanes, documents)
def test_byte_enters_only_after_its_logits_left(layout: str, lanes: int, texts: Documents) -> None:
    """When the scorer sends a step, it has received the logits of every step before it."""
    declared, told = manifest(layout, lanes), count(layout, texts)
    with plays(lanes) as stub, Predictor(Artifact("", 0, declared, {}), told, "cpu", True) as worker:
        worker.set_deadline(time.monotonic() + 60)
        worker.load()
        seen: list[tuple[int, int]] = []
        real = worker.submit

        def submit(step: Step) -> None:
            seen.append((worker.submitted, worker.received))
            real(step)

        worker.submit = submit  # type: ignore[method-assign]
        score.step_through(declared, arrays(texts), told, worker, lambda done: None)
    assert seen == [(number, number) for number in range(len(seen))] and len(stub.sent) == len(seen) + 1


@settings(deadline=None)
@given(layouts, lanes, documents)
def test_every_token_is_scored_once(layout: str, lanes: int, texts: Documents) -> None:
    """All tokens, the end of each document among them."""
    at = np.concatenate([at for _, at in walked(layout, lanes, texts)])
    assert sorted(at.tolist()) == list(range(sum(map(len, texts)) + len(texts)))


LONG = [[0, 1] * 700, [], [1], [], [0, 1] * 700, [1] * 3]


@settings(deadline=None)
@given(layouts, st.integers(1, 40), documents | st.just(LONG))
def test_decoder_rebuilds_the_text(layout: str, lanes: int, texts: Documents) -> None:
    """Who has the schedule, the count and a code knows each token's place by what came before: the text comes back."""
    declared, told = manifest(layout, lanes), count(layout, texts)
    targets = Targets.of(declared, arrays(texts))
    code = iter([token for _, at in walked(layout, lanes, texts) for token in targets.tokens[at].tolist()])
    segments: dict[int, list[int]] = {}
    walk = schedule.steps(declared, told)
    step = schedule.begin(walk)
    while step is not None:
        following = np.array([next(code) for _ in step.lane], dtype=np.int32)
        for segment, offset, token in zip(step.segment.tolist(), step.offset.tolist(), following.tolist(), strict=True):
            assert len(segments.setdefault(segment, [])) == offset
            segments[segment].append(token)
        step = schedule.advance(walk, following)
    stream = [token for segment in sorted(segments) for token in segments[segment]]
    assert next(code, None) is None
    assert stream == [token for text in texts for token in [*text, BOS]]


def universe(most: int, of: Sequence[int]) -> Iterator[Documents]:
    """All texts of so many documents (each of `of`) with at most `most` tokens, their ends included."""
    for number in of:
        for lengths in itertools.product(range(most), repeat=number):
            if sum(lengths) + number <= most:
                for tokens in itertools.product(range(BOS), repeat=sum(lengths)):
                    cuts = np.cumsum([0, *lengths])
                    yield [list(tokens[a:b]) for a, b in itertools.pairwise(cuts)]


@pytest.mark.parametrize("lanes", [1, 2, 3])
@pytest.mark.parametrize("layout", ["documents", "parts"])
def test_code_lengths_of_all_texts_belong_to_one_code(layout: str, lanes: int) -> None:
    """Kraft's inequality for each count that a predictor can be told: no text is cheaper than a code could make it."""
    sums: dict[int, float] = {}
    for texts in universe(6, (1, 2)):
        told = count(layout, texts)
        sums[told] = sums.get(told, 0.0) + 2.0 ** -code_length(layout, lanes, texts)
    assert max(sums.values()) <= 1 + 1e-9
    assert max(sums.values()) > 0.3, "most texts of that count are in the universe"


def test_wire_and_schedule_agree() -> None:
    """What the scorer gets over the wire is what its functions say without."""
    texts = [[0, 1, 1], [], [1, 0]]
    for layout, lanes in itertools.product(["documents", "parts"], [1, 2, 5]):
        _, nll = transcript(layout, lanes, texts)
        assert nll.sum() / math.log(2) == pytest.approx(code_length(layout, lanes, texts), rel=1e-12)


@pytest.mark.parametrize("layout", ["documents", "parts"])
def test_delayed_scorer_gives_the_same_transcript(layout: str) -> None:
    """How long the scorer takes over a step changes nothing that it sends."""
    texts = [[0, 1, 1, 0], [], [1, 0], [1]]
    quick, slow = transcript(layout, 2, texts), transcript(layout, 2, texts, delay=0.01)
    assert quick[0].sent == slow[0].sent
    assert np.array_equal(quick[1], slow[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-42, 1e-3, 1.0, 80.0, 6e4])
def test_probabilities_add_up_to_one(dtype: torch.dtype, scale: float) -> None:
    """Denormal, huge and rounded logits, and many terms that a sum in their precision loses."""
    generator = torch.Generator().manual_seed(1)
    for row in (torch.randn(300, generator=generator), torch.tensor([0.0] + [-6.2] * 299), torch.zeros(300)):
        logits = (row.double() * scale).clamp(-6e4, 6e4).to(dtype).expand(300, 300)
        nll = log_losses(logits, np.arange(300, dtype=np.int32), np.arange(300))
        assert np.exp(-nll).sum() == pytest.approx(1.0, abs=1e-6)
        assert np.exp(-nll).sum() <= 1 + 1e-6
