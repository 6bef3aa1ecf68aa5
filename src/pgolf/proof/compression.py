"""Compression with a submission's predictor: the score is a code length, and this is the code.

The predictor says how probable each next token is, a range coder (constriction) spends -log2 p bits on the one that
comes. Both directions walk the schedule that the scorer walks: the encoder knows the tokens that follow, the decoder
reads them from the code. So both show the predictor the same, and where it is deterministic they get the same logits,
bit for bit. docs/proof.md has the file format.
"""

import binascii
import importlib.metadata
import json
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import constriction
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pgolf import rules
from pgolf.artifact import Artifact, Manifest
from pgolf.data.dataset import text_digest
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.machine import cores
from pgolf.sandbox.wire import Ids, WireError
from pgolf.score import schedule, tokenization
from pgolf.score.devices import Runtime
from pgolf.score.likelihood import Floats
from pgolf.score.predictors import Predictor, progress
from pgolf.score.schedule import Index, Targets

MAGIC = b"PGZ\x02"  # the last byte is the version of the format
MOST_BYTES = 1 << 28  # of the text in one file

# Rounds probabilities to multiples of 2^-24, none to zero, so that V tokens take at most V / 2^24 from the others.
_MODEL = constriction.stream.model.Categorical(perfect=False)
HEADER = struct.Struct("<4s32s32sIIIIIIB")
_ASTRAY = (
    "the text did not come back: the logits are not the ones, bit for bit, that it was compressed with, "
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
    steps: int
    """Steps of the schedule that are coded."""
    plan: int
    """What the predictor's `load` reported."""
    environment: str
    """What else the logits depend on (see `environment`)."""
    code: bytes
    """Words of 32 bits, little-endian."""

    def encode(self) -> bytes:
        """The file."""
        facts = self.environment.encode("ascii")
        digests = bytes.fromhex(self.artifact), bytes.fromhex(self.text)
        rest = facts + self.code
        head = [MAGIC, *digests, self.documents, self.tokens, self.text_bytes, self.steps, self.plan]
        checksum = binascii.crc32(HEADER.pack(*head, 0, len(facts)) + rest)
        return HEADER.pack(*head, checksum, len(facts)) + rest

    @staticmethod
    def decode(data: bytes, name: str) -> "Packet":
        """Read the file `name`. Raises UsageError when it is damaged, or claims more than the rules allow."""
        if len(data) < HEADER.size or not data.startswith(MAGIC):
            raise UsageError(f"{name}: is not a file that `pgolf compress` wrote (version {MAGIC[-1]})")
        *head, checksum, length = HEADER.unpack_from(data)
        _, artifact, text, documents, tokens, size, steps, plan = head
        rest = data[HEADER.size :]
        if binascii.crc32(HEADER.pack(*head, 0, length) + rest) != checksum:
            raise UsageError(f"{name}: is damaged, its checksum does not match")
        facts, code = rest[:length], rest[length:]
        if not facts.isascii() or not facts.decode("ascii").isprintable() or len(code) % 4:
            raise UsageError(f"{name}: is not laid out as docs/proof.md says")
        if not 0 < documents <= tokens <= rules.CODED_TOKENS or size > MOST_BYTES or steps > tokens:
            raise UsageError(f"{name}: claims {documents:,} documents of {tokens:,} tokens, which cannot be")
        if len(facts) < length:
            raise UsageError(f"{name}: is cut off")
        return Packet(artifact.hex(), text.hex(), documents, tokens, size, steps, plan, facts.decode("ascii"), code)


@dataclass(frozen=True)
class Compressed:
    """A finished compression, and what it is compared with."""

    packet: Packet
    entropy_bits: float
    """Sum of -log2 p of the coded tokens."""
    seconds: float


def compress(artifact: Artifact, texts: Sequence[bytes], runtime: Runtime) -> Compressed:
    """Compress documents of UTF-8.

    Raises UsageError for text that cannot be compressed with any artifact, Refused where the submission is at fault.
    """
    _check_step_form(artifact.manifest)
    _check_utf8(texts, "the text")
    with judged():
        return encode(artifact, texts, tokenize(artifact, texts, runtime), runtime, lambda *_: True)


def tokenize(artifact: Artifact, texts: Sequence[bytes], runtime: Runtime) -> list[Ids]:
    """Ids (n,) of each document, which decode to it. Raises Refused where they do not."""
    limit = nullcontext(coding_deadline(0))
    encoded = tokenization.encode(artifact, texts, runtime, limit)
    tokenization.check_decoding(artifact, texts, encoded, runtime, limit)
    return encoded


def encode(
    artifact: Artifact,
    texts: Sequence[bytes],
    encoded: Sequence[Ids],
    runtime: Runtime,
    more: Callable[[int, int, float], bool],
    plan: int | None = None,
) -> Compressed:
    """Code steps of the schedule as long as `more` (steps done, tokens done, seconds since the first) says so.

    `plan`: what the predictor reported when it was scored; None: what it reports now.
    """
    manifest = artifact.manifest
    size, tokens = sum(map(len, texts)), len(encoded) + sum(map(len, encoded))
    if tokens > rules.CODED_TOKENS or size > MOST_BYTES:
        raise UsageError(f"the text has {tokens:,} tokens; one file takes {rules.CODED_TOKENS:,}")
    count = schedule.count(manifest, len(encoded), tokens)
    targets = Targets.of(manifest, encoded)
    coder = constriction.stream.queue.RangeEncoder()
    entropy, steps, done = 0.0, 0, 0
    with progress("compress", tokens) as bar, Predictor(artifact, count, runtime) as predictor:
        predictor.set_deadline(coding_deadline(tokens))
        plan = predictor.load(plan) or 0
        start = time.monotonic()
        walk = schedule.steps(manifest, count)
        step = schedule.begin(walk)
        while step is not None and more(steps, done, time.monotonic() - start):
            p = probabilities(predictor.step(step))
            following = targets.tokens[targets.at(step)]
            coder.encode(following, _MODEL, p)
            entropy -= float(np.log2(np.maximum(p[np.arange(len(p)), following], 2.0**-1074)).sum())
            steps, done = steps + 1, done + len(following)
            bar.update(len(following))
            step = schedule.advance(walk, following)
    words: npt.NDArray[np.uint32] = coder.get_compressed()
    code = words.astype("<u4").tobytes()
    digest = text_digest(texts)
    facts = environment(runtime.device)
    packet = Packet(artifact.sha256, digest, len(texts), tokens, size, steps, plan, facts, code)
    return Compressed(packet, entropy, time.monotonic() - start)


def decompress(artifact: Artifact, packet: Packet, runtime: Runtime) -> list[bytes]:
    """The documents. Raises UsageError for a file of another artifact, EnvironmentBroken for one of another machine,
    Refused when the text does not come back."""
    with judged():
        segments = decode(artifact, packet, runtime)
        stream = np.concatenate(segments)
        ends = np.flatnonzero(stream == artifact.manifest.bos)
        if len(stream) != packet.tokens or len(ends) != packet.documents or ends[-1] != len(stream) - 1:
            raise Refused(_ASTRAY)
        documents = [part[:-1] for part in np.split(stream, ends[:-1] + 1)]
        sizes = [packet.text_bytes] * len(documents)
        try:
            texts = tokenization.decode(artifact, documents, sizes, runtime, nullcontext(coding_deadline(0)))
        except Refused as error:  # it could decode them when they were compressed
            raise Refused(f"{_ASTRAY} ({error})") from None
    if text_digest(texts) != packet.text:
        raise Refused(_ASTRAY)
    _check_utf8(texts, "the compressed text")
    return texts


def decode(artifact: Artifact, packet: Packet, runtime: Runtime) -> list[Ids]:
    """The tokens (n,) of each document or part, as far as they are coded, the BOS that ends a document included."""
    manifest = artifact.manifest
    _check_step_form(manifest)
    if packet.artifact != artifact.sha256:
        raise UsageError(
            f"the file was compressed with the artifact {packet.artifact[:16]}, not {artifact.sha256[:16]}"
        )
    if packet.environment != (here := environment(runtime.device)):
        raise EnvironmentBroken(
            f"the file was compressed with {packet.environment}, but here is {here}; logits would differ"
        )
    count = schedule.count(manifest, packet.documents, packet.tokens)
    coder = constriction.stream.queue.RangeDecoder(np.frombuffer(packet.code, dtype="<u4").astype(np.uint32))
    found: list[Ids] = [np.zeros(0, dtype=np.int32)]
    owner: list[Index] = [np.zeros(0, dtype=np.int64)]
    left = packet.tokens
    with progress("decompress", packet.tokens) as bar, Predictor(artifact, count, runtime) as predictor:
        predictor.set_deadline(coding_deadline(packet.tokens))
        predictor.load(packet.plan)
        walk = schedule.steps(manifest, count)
        step = schedule.begin(walk)
        for _ in range(packet.steps):
            if step is None or left < len(step.lane):
                raise Refused(_ASTRAY)
            p = probabilities(predictor.step(step))
            try:
                following: Ids = coder.decode(_MODEL, p)
            except AssertionError:  # no probabilities like these can have led to this code
                raise Refused(_ASTRAY) from None
            left -= len(p)
            found.append(following)
            owner.append(step.segment)
            bar.update(len(p))
            step = schedule.advance(walk, following)
    tokens, owners = np.concatenate(found), np.concatenate(owner)
    order = np.argsort(owners, kind="stable")
    edges = np.searchsorted(owners[order], np.arange(1, int(owners.max(initial=0)) + 1))
    return np.split(tokens[order], edges)


def environment(device: str) -> str:
    """What must agree, besides the artifact, for two processes to compute the same logits."""
    place = torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "constriction"))
    return f"{versions}, {device.partition(':')[0]} {place}, {cores()} cores"


def probabilities(logits: Tensor) -> Floats:
    """softmax in double precision, (B, V) -> (B, V). Raises Refused for NaN or infinity."""
    rows: Floats = logits.cpu().double().numpy()
    if not np.isfinite(rows).all():
        raise Refused("the logits hold NaN or infinity")
    rows -= rows.max(axis=1, keepdims=True)
    np.exp(rows, out=rows)
    rows /= rows.sum(axis=1, keepdims=True)
    return rows


def table(done: Compressed, size: int) -> str:
    """The sizes for people; `size` is that of the file in bytes."""
    packet = done.packet
    share = f", {8 * size / packet.text_bytes:.4f} bits per byte" if packet.text_bytes else ""
    lines = {
        "text": f"{packet.text_bytes:,} bytes, {packet.tokens:,} tokens",
        "file": f"{size:,} bytes{share}",
        "code": f"{len(packet.code):,} bytes, {size - len(packet.code)} more are header",
        "log-loss": f"{done.entropy_bits / 8:,.1f} bytes",
        "seconds": f"{done.seconds:.1f}",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())


def text_file(texts: Sequence[bytes]) -> bytes:
    """What `pgolf decompress` writes: one document as it is, several as lines of JSON, {"text": ...} each."""
    if len(texts) == 1:
        return texts[0]
    return b"".join(
        json.dumps({"text": text.decode()}, ensure_ascii=False, allow_nan=False).encode() + b"\n" for text in texts
    )


@contextmanager
def judged() -> Iterator[None]:
    """Raises Refused in place of what a submission can cause on the wire."""
    try:
        yield
    except TimeoutError:
        raise Refused("the submission took longer than the limit for this number of tokens (rules.py)") from None
    except WireError as error:
        raise Refused(f"the submission broke the wire protocol: {error}") from None


def coding_deadline(tokens: int) -> float:
    """The deadline for loading and coding `tokens` tokens from now on, a value of time.monotonic()."""
    return time.monotonic() + rules.CODING_SECONDS + rules.CODING_TOKEN_SECONDS * tokens


def _check_step_form(manifest: Manifest) -> None:
    if manifest.form != "step":
        raise UsageError("the artifact is of the window form, which cannot be decoded; only the step form can")


def _check_utf8(texts: Sequence[bytes], what: str) -> None:
    for text in texts:
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{what} is not UTF-8 (byte {error.start})") from None
