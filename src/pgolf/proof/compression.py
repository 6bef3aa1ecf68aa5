"""Compression with a submission's predictor: the score is a code length, and this is the code.

The predictor says how probable each next token is, a range coder (constriction) spends -log2 p bits on the one that
comes. A row of logits is computed from exactly the tokens before it, with the windows or rounds of `Plan.separate`,
and both directions go through one function, `follow`: it asks for the rows of the next tokens and is told the tokens.
The encoder knows them, the decoder reads them from the code. So both ask the same questions in the same order, and
where the predictor is deterministic they get the same rows, bit for bit. docs/proof.md has the file format.
"""

import binascii
import importlib.metadata
import json
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import constriction
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from pgolf import rules
from pgolf.artifact import Artifact
from pgolf.data.dataset import text_digest
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import write_atomically
from pgolf.sandbox.wire import Ids, Kind, WireError
from pgolf.score import tokenization as tokenizer
from pgolf.score import windows
from pgolf.score.predictors import SLOT_BYTES, Floats, Lane, Question, open_lanes
from pgolf.score.score import predict
from pgolf.score.windows import Index, Plan

MAGIC = b"PGZ\x01"  # the last byte is the version of the format

Choose = Callable[[Index, Floats], Ids]
"""From documents (B,) and the probabilities (B, V) of the next token of each: those tokens (B,)."""

# Rounds probabilities to multiples of 2^-24, none to zero, so that V tokens take at most V / 2^24 from the others.
_MODEL = constriction.stream.model.Categorical(perfect=False)
_HEADER = struct.Struct("<4s32s32sIIIIB")
MOST_BYTES = 1 << 28  # of the text in one file
_ASTRAY = (
    "the text did not come back: the rows of logits are not the ones, bit for bit, that it was compressed with, "
    "so the predictor is not deterministic"
)


@dataclass(frozen=True)
class Packet:
    """What a .pgz file holds."""

    artifact: str
    """SHA-256 of the artifact, in hexadecimal."""
    text: str
    """Digest of the documents (`text_digest`), in hexadecimal."""
    documents: int
    tokens: int
    """All ids, and one BOS that ends each document."""
    text_bytes: int
    """Of all documents."""
    environment: str
    """What else the rows of logits depend on (see `environment`)."""
    code: bytes
    """Words of 32 bits, little-endian."""

    def encode(self) -> bytes:
        """The file."""
        facts = self.environment.encode("ascii")
        digests = bytes.fromhex(self.artifact), bytes.fromhex(self.text)
        rest = facts + self.code
        head = [MAGIC, *digests, self.documents, self.tokens, self.text_bytes]
        checksum = binascii.crc32(_HEADER.pack(*head, 0, len(facts)) + rest)
        return _HEADER.pack(*head, checksum, len(facts)) + rest

    @staticmethod
    def decode(data: bytes, name: str) -> "Packet":
        """Read the file `name`. Raises UsageError when it is damaged, or claims more than the rules allow."""
        if len(data) < _HEADER.size or not data.startswith(MAGIC):
            raise UsageError(f"{name}: is not a file that `pgolf compress` wrote (version {MAGIC[-1]})")
        _, artifact, text, documents, tokens, size, checksum, length = _HEADER.unpack_from(data)
        rest = data[_HEADER.size :]
        head = _HEADER.pack(MAGIC, artifact, text, documents, tokens, size, 0, length)
        if binascii.crc32(head + rest) != checksum:
            raise UsageError(f"{name}: is damaged, its checksum does not match")
        facts, code = rest[:length], rest[length:]
        if not facts.isascii() or not facts.decode("ascii").isprintable() or len(code) % 4:
            raise UsageError(f"{name}: is not laid out as docs/proof.md says")
        if not 0 < documents <= tokens <= rules.CODED_TOKENS or size > MOST_BYTES or len(facts) < length:
            raise UsageError(f"{name}: claims {documents:,} documents of {tokens:,} tokens, which cannot be")
        return Packet(artifact.hex(), text.hex(), documents, tokens, size, facts.decode("ascii"), code)


@dataclass(frozen=True)
class Compressed:
    """A finished compression, and what it is compared with."""

    packet: Packet
    scored_bits: float
    """Code length that the scorer finds for the same documents, shown in whole windows or rounds."""
    seconds: dict[str, float]
    """Per phase: score, compress."""


def compress(artifact: Artifact, texts: Sequence[bytes], device: str, isolated: bool) -> Compressed:
    """Compress documents of UTF-8.

    Raises UsageError for text that cannot be compressed with any artifact, Refused where the submission is at fault.
    """
    _check_utf8(texts, "the text")
    with _judged():
        deadline = _deadline()
        encoded = tokenizer.encode(artifact, texts, deadline, isolated)
        tokens = len(encoded) + sum(map(len, encoded))
        size = sum(map(len, texts))
        if tokens > rules.CODED_TOKENS or size > MOST_BYTES:
            raise UsageError(f"the text has {tokens:,} tokens; one file takes {rules.CODED_TOKENS:,}")
        tokenizer.check_decoding(artifact, texts, encoded, deadline, isolated)
        started = time.monotonic()
        plan = Plan.separate(artifact.manifest, encoded)
        with open_lanes(artifact, plan, [device], _deadline(), isolated) as lanes:
            bits = float(np.sum(predict(artifact, plan, lanes)) / np.log(2))
        scored = time.monotonic()
        with _lane(artifact, device, isolated) as lane:
            code = encode(artifact, lane, encoded)
        seconds = {"score": round(scored - started, 3), "compress": round(time.monotonic() - scored, 3)}
    digest = text_digest(texts)
    packet = Packet(artifact.sha256, digest, len(texts), tokens, size, environment(device), code)
    return Compressed(packet, bits, seconds)


def decompress(artifact: Artifact, packet: Packet, device: str, isolated: bool) -> list[bytes]:
    """The documents. Raises UsageError for a file of another artifact, EnvironmentBroken for one of another machine,
    Refused when the text does not come back."""
    if packet.artifact != artifact.sha256:
        raise UsageError(
            f"the file was compressed with the artifact {packet.artifact[:16]}, not {artifact.sha256[:16]}"
        )
    if packet.environment != (here := environment(device)):
        raise EnvironmentBroken(
            f"the file was compressed with {packet.environment}, but here is {here}; rows of logits would differ"
        )
    with _judged():
        with _lane(artifact, device, isolated) as lane:
            encoded = decode(artifact, lane, packet.code, packet.documents, packet.tokens)
        sizes = [packet.text_bytes] * len(encoded)
        try:
            texts = list(tokenizer.decode(artifact, encoded, sizes, _deadline(), isolated))
        except Refused as error:  # it could decode them when they were compressed
            raise Refused(f"{_ASTRAY} ({error})") from None
    if text_digest(texts) != packet.text:
        raise Refused(_ASTRAY)
    _check_utf8(texts, "the compressed text")
    return texts


def environment(device: str) -> str:
    """What must agree, besides the artifact, for two processes to compute the same rows."""
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "constriction"))
    return f"{versions}, {device.partition(':')[0]} {place}, {len(os.sched_getaffinity(0))} cores"


def encode(artifact: Artifact, lane: Lane, encoded: Sequence[Ids]) -> bytes:
    """The code of documents of ids (n,), from a lane that was asked nothing yet."""
    coder = constriction.stream.queue.RangeEncoder()
    targets = [np.append(ids, artifact.manifest.bos).astype(np.int32) for ids in encoded]
    done = np.zeros(len(targets), dtype=np.int64)
    with _progress("compress", sum(map(len, targets))) as bar:

        def choose(documents: Index, probabilities: Floats) -> Ids:
            tokens = np.array([targets[d][done[d]] for d in documents], dtype=np.int32)
            coder.encode(tokens, _MODEL, probabilities)
            done[documents] += 1
            bar.update(len(tokens))
            return tokens

        follow(artifact, lane, len(targets), choose)
    words: npt.NDArray[np.uint32] = coder.get_compressed()
    return words.astype("<u4").tobytes()


def decode(artifact: Artifact, lane: Lane, code: bytes, documents: int, tokens: int) -> list[Ids]:
    """The documents of ids (n,) behind `code`, from a lane that was asked nothing yet.

    Raises Refused when there are not just so many documents and tokens in it.
    """
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(code, dtype="<u4").astype(np.uint32))
    with _progress("decompress", tokens) as bar:
        left = tokens

        def choose(documents: Index, probabilities: Floats) -> Ids:
            nonlocal left
            left -= len(documents)
            if left < 0:
                raise Refused(_ASTRAY)
            try:
                found: Ids = coder.decode(_MODEL, probabilities)
            except AssertionError:  # no probabilities like these can have led to this code
                raise Refused(_ASTRAY) from None
            bar.update(len(found))
            return found

        encoded = follow(artifact, lane, documents, choose)
    if left:
        raise Refused(_ASTRAY)
    return encoded


def follow(artifact: Artifact, lane: Lane, documents: int, choose: Choose) -> list[Ids]:
    """Let `choose` name one token after the other until each document has ended with BOS; their ids (n,)."""
    streaming = artifact.manifest.form == "streaming"
    return (_follow_rounds if streaming else _follow_windows)(artifact, lane, documents, choose)


def _follow_windows(artifact: Artifact, lane: Lane, documents: int, choose: Choose) -> list[Ids]:
    """Simple form: all documents go on by a token a step, side by side, so that windows are of one length."""
    manifest = artifact.manifest
    found = [np.zeros(0, dtype=np.int32)] * documents
    alive = np.arange(documents)
    text = np.full((documents, 2), manifest.bos, dtype=np.int32)  # (B, capacity) of the documents alive
    number = count()
    for known in count(1):
        if not len(alive):
            break
        if known == text.shape[1]:
            text = np.pad(text, ((0, 0), (0, known)))
        begin = windows.window_start(known - 1, manifest.context, manifest.stride or manifest.context)
        size = max(1, SLOT_BYTES // (4 * manifest.vocab_size) // (known - begin))
        for at in range(0, len(alive), size):
            part = text[at : at + size]
            last = np.full(len(part), known - begin - 1, dtype=np.int32)
            _extend(lane)
            lane.ask(asked := next(number), 0, Question(part[:, begin:known], last, 1))
            logits = lane.answer(asked, 0, len(part))
            part[:, known] = choose(alive[at : at + size], _probabilities(logits))
        ended = text[:, known] == manifest.bos
        for row in np.flatnonzero(ended):
            found[alive[row]] = text[row, 1:known].copy()
        alive, text = alive[~ended], text[~ended]
    return found


def _follow_rounds(artifact: Artifact, lane: Lane, documents: int, choose: Choose) -> list[Ids]:
    """Streaming form: one document after the other, in rounds of its own; a full round goes on in the next."""
    manifest = artifact.manifest
    found = []
    number = 0
    for document in range(documents):
        ids = [manifest.bos]
        begin = 0
        while len(ids) == 1 or ids[-1] != manifest.bos:
            if len(ids) - begin > manifest.round:
                number, begin = number + 1, begin + manifest.round
            piece = np.array(ids[begin:], dtype=np.int32)
            _extend(lane)
            [logits] = lane.show(number, [piece], last=True)
            ids += choose(np.array([document]), _probabilities(logits)).tolist()
            full = len(piece) == manifest.round or ids[-1] == manifest.bos
            if full and manifest.adapts:
                lane.update([piece])
        number += 1
        found.append(np.array(ids[1:-1], dtype=np.int32))
    return found


def _probabilities(logits: Tensor) -> Floats:
    """softmax in double precision, (B, V) -> (B, V). Raises Refused for NaN or infinity."""
    rows: Floats = logits.cpu().double().numpy()
    if not np.isfinite(rows).all():
        raise Refused("a row of logits holds NaN or infinity")
    weights = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def table(done: Compressed, size: int) -> str:
    """The sizes for people; `size` is that of the file in bytes."""
    packet = done.packet
    share = f", {8 * size / packet.text_bytes:.4f} bits per byte" if packet.text_bytes else ""
    scored = done.scored_bits / 8
    per_byte = f", {done.scored_bits / packet.text_bytes:.4f} bits per byte" if packet.text_bytes else ""
    lines = {
        "text": f"{packet.text_bytes:,} bytes, {packet.tokens:,} tokens",
        "file": f"{size:,} bytes{share}",
        "code": f"{len(packet.code):,} bytes, {size - len(packet.code)} more are header",
        "scored": f"{scored:,.1f} bytes{per_byte}",
        "seconds": ", ".join(f"{name} {value:.1f}" for name, value in done.seconds.items()),
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def text_file(texts: Sequence[bytes]) -> bytes:
    """What `pgolf decompress` writes: one document as it is, several as lines of JSON, {"text": ...} each."""
    if len(texts) == 1:
        return texts[0]
    return b"".join(json.dumps({"text": text.decode()}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write(data: bytes, path: Path) -> None:
    """Write a file, whole or not at all. Raises UsageError where that is not possible."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror})") from None


@contextmanager
def _lane(artifact: Artifact, device: str, isolated: bool) -> Iterator[Lane]:
    """A loaded worker, killed at the end."""
    lane = Lane(artifact, device, SLOT_BYTES, _deadline(), isolated)
    try:
        lane.worker.receive(Kind.READY, 0)
        yield lane
    finally:
        lane.close()


@contextmanager
def _judged() -> Iterator[None]:
    """Raises Refused in place of what a submission can cause on the wire."""
    try:
        yield
    except TimeoutError:
        raise Refused(f"the submission gave no answer for {rules.CODING_SECONDS:g} s") from None
    except WireError as error:
        raise Refused(f"the submission broke the wire protocol: {error}") from None


def _deadline() -> float:
    return time.monotonic() + rules.CODING_SECONDS


def _extend(lane: Lane) -> None:
    """Time for one more answer: the number of steps is bounded, and each of them."""
    lane.worker.channel.deadline = _deadline()


def _check_utf8(texts: Sequence[bytes], what: str) -> None:
    for text in texts:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{what} is not UTF-8 (byte {error.start})") from None


def _progress(name: str, tokens: int) -> "tqdm[None]":
    return tqdm(total=tokens, unit="tok", unit_scale=True, desc=name, leave=False, disable=None)
