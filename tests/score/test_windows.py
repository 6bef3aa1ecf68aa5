"""Window plans: every target once, enough context before it, and batches that change nothing."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pgolf.score import windows

lengths = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(lengths, st.sampled_from(["packed", "document"]), st.integers(1, 16), st.data())
def test_every_target_counts_exactly_once(sizes: list[int], mode: str, context: int, data: st.DataObject) -> None:
    """Each stream position is scored once, within `context`, and never across a document start."""
    stride = data.draw(st.integers(1, context))
    documents = [np.full(size, 5, dtype=np.int32) for size in sizes]
    stream, boundaries = windows.stream(documents, bos=1)
    plan = windows.plan(boundaries, mode, context, stride)
    count = np.zeros(len(stream) - 1, dtype=int)
    for batch in windows.batches(plan, most_inputs=data.draw(st.integers(1, 64))):
        positions = batch.positions()
        assert 1 <= batch.length <= context and positions.min() >= 0
        np.add.at(count, positions[:, batch.first :].reshape(-1), 1)
        for row in positions:
            if mode == "document":
                assert np.searchsorted(boundaries, row[0], "right") == np.searchsorted(boundaries, row[-1], "right")
            if row[0] not in boundaries:
                assert batch.first >= min(context - stride, row[0])
    assert (count == 1).all()


def test_stream_costs_each_document_its_ids_and_one_end() -> None:
    """BOS separates: an empty document still costs one token, and nothing is charged for the first BOS."""
    stream, boundaries = windows.stream([np.array([7, 8], dtype=np.int32), np.array([], dtype=np.int32)], bos=1)
    assert stream.tolist() == [1, 7, 8, 1, 1]
    assert boundaries.tolist() == [0, 3, 4]
