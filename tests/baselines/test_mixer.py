"""golf's context mixer: a distribution, causal, the same from run to run, and better for what it has learned."""

import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from conftest import ROOT
from trainers import load

Array = npt.NDArray[Any]
BOS, LANES = 1, 3


@pytest.fixture(scope="module")
def mixer() -> Iterator[Any]:
    for modules in load(("mixer",), ROOT / "baselines" / "golf"):
        modules.mixer.BUCKET_BITS = 12
        yield modules.mixer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model: Path) -> Path:
    return tokenizer_model


def made(mixer: Any, tokenizer: Path, off: tuple[str, ...] = ()) -> Any:
    return mixer.Mixer(tokenizer, BOS, LANES, off)


def text_of(seed: int, steps: int, vocab_size: int) -> Array:
    """Tokens (steps, LANES): a few sentences again and again, in each lane in another order."""
    generator = np.random.default_rng(seed)
    sentences = generator.integers(2, vocab_size, (4, 9))
    lanes = [sentences[generator.integers(4, size=steps // 9 + 1)].ravel()[:steps] for _ in range(LANES)]
    return np.stack(lanes, 1)


def stepped(mixer: Any, tokens: Array, threads: int = 1, threshold: float = 0.01) -> Array:
    """The mixture's probabilities (T, LANES, V) when tokens (T, LANES) are shown; the network knows nothing."""
    lanes, out = np.arange(LANES), []
    for ids in tokens:
        p = np.full((LANES, mixer.vocab_size), 1 / mixer.vocab_size, np.float32)
        mixer.learn(np.ascontiguousarray(ids), lanes)
        mixer.predict(lanes, p, threshold, threads)
        out.append(np.exp(p))
    return np.stack(out)


def losses(p: Array, tokens: Array) -> Array:
    """Bits (T - 1,) a token of each step after the first."""
    return -np.log2(np.take_along_axis(p[:-1], tokens[1:, :, None], 2)).mean((1, 2))


def test_every_prediction_is_a_distribution(mixer: Any, tokenizer: Path) -> None:
    one = made(mixer, tokenizer)
    p = stepped(one, text_of(1, 60, one.vocab_size))
    assert (p > 0).all()
    np.testing.assert_allclose(p.sum(2), 1, atol=1e-4)


def test_later_tokens_change_nothing(mixer: Any, tokenizer: Path) -> None:
    one, two = made(mixer, tokenizer), made(mixer, tokenizer)
    tokens = text_of(2, 60, one.vocab_size)
    changed = tokens.copy()
    changed[40:] = BOS
    before, after = stepped(one, tokens), stepped(two, changed)
    assert np.array_equal(before[:40], after[:40])
    assert not np.array_equal(before[40:], after[40:])


def test_neither_threads_nor_runs_change_a_bit(mixer: Any, tokenizer: Path) -> None:
    runs = [stepped(one := made(mixer, tokenizer), text_of(3, 60, one.vocab_size), threads) for threads in (1, 1, 2, 3)]
    assert all(np.array_equal(runs[0], run) for run in runs[1:])


def test_it_learns_from_what_all_lanes_have_shown(mixer: Any, tokenizer: Path) -> None:
    one = made(mixer, tokenizer)
    tokens = text_of(4, 200, one.vocab_size)
    bits = losses(stepped(one, tokens), tokens)
    assert bits[-50:].mean() < 0.3 * bits[:9].mean()
    # A sentence that only another lane has shown is known, too.
    fresh, alone = made(mixer, tokenizer), tokens.copy()
    alone[:100, 1:] = np.random.default_rng(5).integers(2, fresh.vocab_size, (100, LANES - 1))
    p = stepped(fresh, alone)[:, 1:]
    late = -np.log2(np.take_along_axis(p[100:-1], alone[101:, 1:, None], 2)).mean()
    assert late < 0.5 * bits[:9].mean()


def test_coded_text_is_decoded_and_known(mixer: Any, tokenizer: Path) -> None:
    coder, decoder, fresh = (made(mixer, tokenizer) for _ in range(3))
    tokens = text_of(6, 300, coder.vocab_size)
    text = tokens[:, 0]
    code = coder.encode(text, 10_000)
    assert len(code) < len(text)  # under 8 bits a token
    parts = [left for left, _ in decoder.decode(code)]
    assert len(text) > parts[0] > parts[1] == 0
    seen = tokens[:50]
    p = stepped(coder, seen)
    assert np.array_equal(p, stepped(decoder, seen))  # the same text has been learned
    assert losses(p, seen).mean() < 0.6 * losses(stepped(fresh, seen), seen).mean()


def test_code_does_not_depend_on_the_lanes(mixer: Any, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer has none. Tables so small that contexts collide would show what differs."""
    monkeypatch.setattr(mixer, "BUCKET_BITS", 6)
    one, none = made(mixer, tokenizer), mixer.Mixer(tokenizer, BOS, 0)
    text = text_of(11, 400, one.vocab_size)[:, 0]
    text[::50] = BOS
    assert one.encode(text, 10_000) == none.encode(text, 10_000)


def test_code_fits_its_limit(mixer: Any, tokenizer: Path) -> None:
    one = made(mixer, tokenizer)
    text = np.random.default_rng(7).integers(2, one.vocab_size, 3000)
    assert 450 < len(one.encode(text, 500)) <= 500


@pytest.mark.parametrize("wait", [0, 0.2])
def test_coding_can_be_stopped(mixer: Any, tokenizer: Path, wait: float) -> None:
    """When training is over, at any time. What was coded until then is what was learned."""
    coder, decoder = (made(mixer, tokenizer) for _ in range(2))
    text = np.random.default_rng(12).integers(2, coder.vocab_size, 1 << 20)
    with ThreadPoolExecutor(1) as beside:
        coding = beside.submit(coder.encode, text, 4 * len(text))
        time.sleep(wait)
        coder.stop()
        code = coding.result()
    assert mixer.HEADER.unpack_from(code)[0] < len(text)
    assert [*decoder.decode(code)][-1][0] == 0
    seen = text_of(13, 30, coder.vocab_size)
    assert np.array_equal(stepped(coder, seen), stepped(decoder, seen))


SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import mixer
mixer.compiled()
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    mixer.Mixer(Path(sys.argv[2]), 1, 1)
except MemoryError as error:
    print(error)
"""


def test_tables_that_do_not_fit_are_a_failure_of_python(tokenizer: Path) -> None:
    """An exception that leaves C++ would end the process."""
    arguments = str(ROOT / "baselines" / "golf"), str(tokenizer)
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "the mixer's tables do not fit\n"), done.stderr


def test_what_the_compiler_says_is_the_machines_fault(mixer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OSError ends the trainer with exit code 3."""
    monkeypatch.setattr(mixer, "FLAGS", ["--no-such-flag"])
    with pytest.raises(OSError, match=r"g\+\+ cannot compile mixer.cpp: .*no-such-flag"):
        mixer.compiled.__wrapped__()


def test_damaged_code_ends(mixer: Any, tokenizer: Path) -> None:
    damaged = np.random.default_rng(8).bytes(300)[:2] + b"\0\0" + bytes(range(256))
    assert len(list(made(mixer, tokenizer).decode(damaged))) == 2


def test_each_context_can_be_switched_off(mixer: Any, tokenizer: Path) -> None:
    whole = made(mixer, tokenizer)
    tokens = text_of(9, 40, whole.vocab_size)
    p = stepped(whole, tokens, threshold=0.1)
    for name in whole.names:
        assert not np.array_equal(p, stepped(made(mixer, tokenizer, (name,)), tokens, threshold=0.1)), name
    with pytest.raises(ValueError, match="no context is called 'order 77'"):
        made(mixer, tokenizer, ("order 77",))


def test_what_is_improbable_keeps_the_shares_of_network_and_text(mixer: Any, tokenizer: Path) -> None:
    one = made(mixer, tokenizer)
    p = np.random.default_rng(10).dirichlet(np.ones(one.vocab_size), LANES).astype(np.float32)
    mixed = p.copy()
    one.learn(np.full(LANES, BOS), np.arange(LANES))
    assert one.predict(np.arange(LANES), mixed, 2.0, 1) == 0  # no node is that probable
    # Of the text nothing is known: all its tokens have the same share.
    np.testing.assert_allclose(np.exp(mixed), 0.95 * p + 0.05 / one.vocab_size, rtol=1e-3, atol=1e-8)


def test_a_lower_threshold_visits_more_nodes(mixer: Any, tokenizer: Path) -> None:
    one = made(mixer, tokenizer)
    p = np.full((LANES, one.vocab_size), 1 / one.vocab_size, np.float32)
    one.learn(np.full(LANES, BOS), np.arange(LANES))
    nodes = [one.predict(np.arange(LANES), p.copy(), threshold, 1) for threshold in (0.9, 0.2, 0.01, 1e-6)]
    assert nodes[0] == LANES and nodes == sorted(nodes) and nodes[-1] >= LANES * (one.vocab_size - 1)


def test_where_the_network_knows_nothing_the_texts_shares_count(mixer: Any, tokenizer: Path) -> None:
    """Of the nodes that are not visited, too."""
    one = made(mixer, tokenizer)
    tokens = np.random.default_rng(13).integers(2, 12, (2000, LANES))  # ten tokens in no order
    p = stepped(one, tokens, threshold=2.0)
    assert losses(p, tokens)[-100:].mean() < 0.7 * np.log2(one.vocab_size)


def test_a_match_goes_on_behind_a_token_that_differs(mixer: Any, tokenizer: Path) -> None:
    generator = np.random.default_rng(14)
    text = generator.integers(2, made(mixer, tokenizer).vocab_size, (40, LANES))
    again = text.copy()
    again[::8] = generator.integers(2, 200, again[::8].shape)  # no 8 tokens in a row agree, seven do
    tokens = np.concatenate([text, again])
    names = tuple(made(mixer, tokenizer).names)
    p = stepped(made(mixer, tokenizer, names), tokens, threshold=0.001)  # matches alone
    bits = losses(p, tokens)[39:]
    behind = bits[9::8]  # the token after a different one, from the second on
    assert behind.mean() < 0.8 * bits[8::8].mean()


def test_a_threshold_changes_nothing_that_is_learned(mixer: Any, tokenizer: Path) -> None:
    fine, coarse = made(mixer, tokenizer), made(mixer, tokenizer)
    tokens = text_of(12, 60, fine.vocab_size)
    stepped(fine, tokens, threshold=0.001)
    stepped(coarse, tokens, threshold=2.0)
    assert np.array_equal(stepped(fine, tokens[:5]), stepped(coarse, tokens[:5]))


def test_tokens_of_the_document_are_raised_until_it_ends(mixer: Any, tokenizer: Path) -> None:
    one = made(mixer, tokenizer)
    lanes, often = np.arange(LANES), 7
    p = np.full((LANES, one.vocab_size), 1 / one.vocab_size, np.float32)
    shares = []
    for token in (BOS, often, often, BOS):
        one.learn(np.full(LANES, token), lanes)
        one.predict(lanes, mixed := p.copy(), 2.0, 1)  # the network's shares alone
        shares.append(mixed[0, often])
    fresh, once, twice, after = shares
    assert twice > once > fresh
    assert twice > after > fresh  # what stays is its share of all text
