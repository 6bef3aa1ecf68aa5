"""The schedule: every token once, nothing before its time, and a decoder that knows only the count can walk it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgolf.artifact import Manifest
from pgolf.sandbox.wire import Ids
from pgolf.score import schedule
from pgolf.score.schedule import Targets

BOS = 1
TEXTS = st.lists(st.lists(st.integers(2, 9), max_size=12), min_size=1, max_size=9)
LAYOUTS = st.sampled_from(["documents", "parts"])
LANES = st.integers(1, 12)


def manifest(layout: str, lanes: int) -> Manifest:
    return Manifest("t", "t", "laptop", 10, BOS, "bytes", "step", layout=layout, lanes=lanes)


def arrays(texts: list[list[int]]) -> list[Ids]:
    return [np.array(text, dtype=np.int32) for text in texts]


@given(TEXTS, LAYOUTS, LANES)
def test_every_token_is_scored_once_and_shown_later(texts: list[list[int]], layout: str, lanes: int) -> None:
    """Each lane shows BOS first and then just the token that it was asked for before."""
    asked = manifest(layout, lanes)
    targets = Targets.of(asked, arrays(texts))
    count = schedule.count(asked, len(texts), len(targets.tokens))
    times = np.zeros(len(targets.tokens), dtype=int)
    due: dict[int, int] = {}
    steps = 0
    walk = schedule.steps(asked, count)
    step = schedule.begin(walk)
    while step is not None:
        assert len(step.lane) == len(set(step.lane.tolist())) <= lanes
        assert (np.diff(step.lane) > 0).all()
        for lane, shown in zip(step.lane.tolist(), step.shown.tolist(), strict=True):
            assert shown == due.get(lane, BOS)
        at = targets.at(step)
        times[at] += 1
        steps += 1
        due |= dict(zip(step.lane.tolist(), targets.tokens[at].tolist(), strict=True))
        step = schedule.advance(walk, targets.tokens[at])
    assert (times == 1).all()
    assert steps == schedule.length(asked, [len(text) + 1 for text in texts])


@given(TEXTS, LAYOUTS, LANES)
def test_a_decoder_rebuilds_the_text(texts: list[list[int]], layout: str, lanes: int) -> None:
    """With empty, duplicate and long documents, and more lanes than documents: from the count and the tokens alone."""
    asked = manifest(layout, lanes)
    targets = Targets.of(asked, arrays(texts))
    count = schedule.count(asked, len(texts), len(targets.tokens))
    sent: list[Ids] = []
    walk = schedule.steps(asked, count)
    step = schedule.begin(walk)
    while step is not None:
        sent.append(targets.tokens[targets.at(step)])
        step = schedule.advance(walk, sent[-1])

    found: dict[int, list[int]] = {}
    walk = schedule.steps(asked, count)
    step = schedule.begin(walk)
    while step is not None:
        following = sent.pop(0)
        for segment, offset, token in zip(step.segment.tolist(), step.offset.tolist(), following.tolist(), strict=True):
            assert offset == len(found.setdefault(segment, []))
            found[segment].append(token)
        step = schedule.advance(walk, following)
    assert not sent
    stream = [token for segment in sorted(found) for token in found[segment]]
    assert stream == [token for text in texts for token in (*text, BOS)]


@given(st.integers(1, 500), st.integers(1, 40))
def test_parts_are_equal_but_for_one_token(tokens: int, lanes: int) -> None:
    """No lane works much longer than another."""
    sizes = schedule.part_sizes(tokens, lanes)
    assert sizes.sum() == tokens and sizes.max() - sizes.min() <= 1
