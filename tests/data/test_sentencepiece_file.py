"""What a tokenizer's file may hold: real models pass; what could carry weights past the clock is refused or counts."""

import base64
import hashlib
import io
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece as spm
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import DOCUMENTS, ROOT, SHARED, damaged, needs_fineweb
from pgolf import artifact, rules
from pgolf.data import sentencepiece_file
from pgolf.data.build import tokenize
from pgolf.data.build.byte_model import byte_model
from pgolf.data.sentencepiece_file import CHARSMAPS, PIECES, read
from pgolf.errors import UsageError
from pgolf.noise import noisy

OWN_BYTES = 2200  # the settings of a model trained here: most of it are the rules that keep U+2581
WEIGHTS = random.Random(3).randbytes(20_000)


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: bytes, score: float = 0.0, kind: int = 1) -> bytes:
    """As SentencePiece writes it."""
    written = field(1, text) + b"\x15" + struct.pack("<f", score)
    return field(1, written if kind == 1 else written + b"\x18" + varint(kind))


def honest(model: bytes, most: int = OWN_BYTES) -> None:
    found = read(model)
    processor = spm.SentencePieceProcessor(model_proto=model)
    texts = [processor.id_to_piece(at) for at in range(processor.vocab_size())]
    assert [text.decode() for text in found.texts] == texts
    assert found.scores == b"" and found.source_bytes == len(found.other) <= most
    assert not list(noisy({"tokenizer.model": found.text}))


@needs_fineweb
@pytest.mark.parametrize("name", ["fineweb_1024_bpe", "fineweb_4096_bpe", "fineweb_8192_bpe", "lossy_1024_bpe"])
def test_the_contests_models_hold_a_vocabulary(name: str) -> None:
    honest((SHARED / "tokenizers" / f"{name}.model").read_bytes(), most=150)


def test_entered_models_hold_a_vocabulary() -> None:
    entered = [*ROOT.glob("submissions/*/artifact.zst")]
    assert entered
    for path in entered:
        found = artifact.read(path, rules.ARTIFACT_BYTES)
        honest(found.members[found.manifest.tokenizer])


@pytest.mark.parametrize("normalization", tokenize.NORMALIZATIONS)
def test_models_that_are_trained_here_hold_a_vocabulary(normalization: str) -> None:
    honest(tokenize.train(DOCUMENTS, 420, normalization))


def test_other_models_hold_a_vocabulary(tokenizer_model: Path) -> None:
    honest(tokenizer_model.read_bytes())
    honest(byte_model())


@pytest.mark.parametrize("rule", ["nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"])
def test_standard_rules_of_the_installed_library_are_known(rule: str) -> None:
    """If not, the library is newer than the list: take its digests into CHARSMAPS."""
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True,
        normalization_rule_name=rule, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    honest(file.getvalue(), most=100)


def test_unigram_scores_count(tokenizer_model: Path) -> None:
    """They are numbers that were learned."""
    file = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=file, vocab_size=420, model_type="unigram",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    found = read(file.getvalue())
    processor = spm.SentencePieceProcessor(model_proto=file.getvalue())
    learned = sum(not (processor.is_byte(at) or processor.is_control(at)) for at in range(processor.vocab_size())) - 1
    assert len(found.scores) == 4 * learned > 100
    assert found.source_bytes == len(found.scores) + len(found.other)


def hidden(model: bytes) -> Iterator[tuple[str, bytes, str]]:
    """Name, a model that tokenizes as `model` does and holds `WEIGHTS`, and a part of the refusal."""
    first = read(model).texts[0]
    old = piece(first, 0.0, 2)
    assert model.startswith(old)
    rest = model[len(old) :]
    inner = old[2:]
    yield "unknown field", model + field(1000, WEIGHTS), "holds field 1000, which"
    yield "self-test", model + field(4, field(1, field(1, WEIGHTS))), "holds field 4, which"
    yield "in a piece", field(1, inner + field(1000, WEIGHTS)) + rest, "in piece 0 than text, score and type"
    yield "text twice", field(1, field(1, WEIGHTS) + inner) + rest, "in another order"
    yield "in the settings", model + field(5, field(200, WEIGHTS)), "field 200 in its field 5"
    yield "file names", model + field(5, field(1, WEIGHTS)), "bytes besides pieces"
    yield "rules of its author", model + field(5, field(2, struct.pack("<I", 1024) + WEIGHTS)), "bytes besides pieces"
    yield "settings of megabytes", model + field(5, field(1, WEIGHTS * 50)), "more than any normalisation rule"
    trainer = model.rindex(field(1, b"identity"))
    yield "settings twice", model + model[trainer - 2 :], "holds field 3 twice"
    yield "a long varint", b"\x8a\x00" + model[1:], "not a sound"
    yield "cut off", model[:-1], "not a sound"
    yield "a group", model + b"\x0b\x0c", "not a sound"


@pytest.mark.parametrize("at", range(12))
def test_what_is_no_vocabulary_is_refused(at: int, tokenizer_model: Path, tmp_path: Path) -> None:
    """Though SentencePiece reads it, and with the same tokens; `pgolf data build` refuses it as well."""
    name, model, reason = [*hidden(tokenizer_model.read_bytes())][at]
    with pytest.raises(ValueError, match=reason):
        read(model)
    (tmp_path / "a.model").write_bytes(model)
    with pytest.raises(UsageError, match=r"a\.model: "):
        tokenize.check(tmp_path / "a.model")
    if name in ("unknown field", "self-test", "in a piece", "text twice", "file names", "settings twice"):
        plain = spm.SentencePieceProcessor(model_file=str(tokenizer_model))
        same = spm.SentencePieceProcessor(model_proto=model)
        assert all(plain.encode(text) == same.encode(text) for text in DOCUMENTS), name


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_bytes_are_read_or_refused(data: st.DataObject) -> None:
    try:
        found = read(damaged(data, byte_model()))
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 200
    else:
        assert len(found.other) <= rules.TOKENIZER_OTHER_BYTES


def test_too_many_pieces() -> None:
    """Refused before all are read."""
    with pytest.raises(ValueError, match="over 65,536 pieces"):
        read(b"".join(piece(b"%d" % at) for at in range(PIECES + 1)) + b"\xff")


def test_long_pieces_count(tokenizer_model: Path) -> None:
    model = tokenizer_model.read_bytes()
    found = read(model)
    free = rules.TOKENIZER_PIECE_BYTES * (len(found.texts) + 1) - sum(map(len, found.texts))
    longer = piece(b"x" * (free + 1000), 0.0, 4) + model
    assert read(longer).source_bytes == found.source_bytes + 1000


def test_a_very_large_vocabulary_counts() -> None:
    model = b"".join(piece(b"%09d" % at, -at) for at in range(50_000))
    assert read(model).source_bytes == 50_000 * 9 - rules.TOKENIZER_TEXT_BYTES


def test_scores_that_are_no_ranks_count(tokenizer_model: Path) -> None:
    model = tokenizer_model.read_bytes()
    assert read(piece(b"usual", 0.0) + piece(b"no.", -1.5) + piece(b"rank", -2.0)).scores == struct.pack("<f", -1.5)
    assert read(model + piece(b"control", float("nan"), 3)).scores == struct.pack("<f", float("nan"))
    numbers = [struct.unpack("<f", b"\0" + WEIGHTS[3 * at : 3 * at + 3])[0] for at in range(4000)]
    found = read(b"".join(piece(b"word%d" % at, score) for at, score in enumerate(numbers)))
    assert found.source_bytes > 15_900 and list(noisy({"tokenizer.model": found.text}))


@pytest.mark.parametrize("letters", [6, 8, 10])
def test_pieces_of_noise_are_pointed_out(letters: int) -> None:
    """Those that count nothing, since they are no longer than words."""
    coded = base64.b64encode(WEIGHTS)
    texts = [coded[at : at + letters] for at in range(0, len(coded), letters)]
    found = read(b"".join(piece(text, -at) for at, text in enumerate(texts)))
    assert found.source_bytes == 0
    assert list(noisy({"tokenizer.model": found.text}))


def test_standard_rules_are_matched_as_a_whole() -> None:
    """And only as normalisation rules."""
    assert len(CHARSMAPS) == 12 and all(len(digest) == 64 for digest in CHARSMAPS)
    known = b"rules"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_file, "CHARSMAPS", {hashlib.sha256(known).hexdigest()})
        assert read(field(3, field(2, known))).other == field(3, field(2, known))[2:4]
        assert read(field(3, field(2, known + b"!"))).source_bytes == 8
        assert read(field(3, field(1, known))).source_bytes == 7
        assert read(field(2, field(2, known))).source_bytes == 7
        assert read(field(3, field(2, known) * 2)).source_bytes == 9
