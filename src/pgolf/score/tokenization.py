"""Any tokenizer, proven lossless on the text that is scored.

Encoding and decoding run in separate sandboxes: the decoder receives nothing but ids, and what it returns must be
the canonical text, byte for byte, document by document. So the ids carry the whole text, and no byte count is
ever taken from a submission. A declarative tokenizer (a SentencePiece model, a tokenizer.json, bytes, each behind a
transform of the harness if it likes) is run by the harness's own code; one that is Python code has held text that is
not scored yet, so it is for practice.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise

import numpy as np

from pgolf import rules
from pgolf.artifact import Artifact, Manifest
from pgolf.errors import Refused
from pgolf.sandbox import wire
from pgolf.sandbox.box import Worker
from pgolf.sandbox.wire import Ids, Kind, WireError
from pgolf.score.devices import Runtime

Timed = AbstractContextManager[float]
"""Entered when the sandbox has started; gives the deadline, a value of time.monotonic()."""


def is_code(manifest: Manifest) -> bool:
    """Whether encoding runs code of the submission."""
    return manifest.tokenizer.endswith(".py")


def encode(artifact: Artifact, documents: Sequence[bytes], runtime: Runtime, timed: Timed) -> list[Ids]:
    """Ids (n,) of each document. Raises Refused for ids that are out of range, spell BOS, or are too many."""
    if artifact.manifest.tokenizer == "bytes" and artifact.manifest.transform is None:
        return [np.frombuffer(document, dtype=np.uint8).astype(np.int32) for document in documents]
    encoded: list[Ids] = []
    with _worker("encode", artifact, runtime, timed) as worker:
        for begin, end in _groups([len(document) for document in documents]):
            group = list(documents[begin:end])
            tokens = rules.TOKENS_PER_BYTE * sum(map(len, group)) + len(group)
            worker.send(Kind.TEXTS, wire.encode_texts(group))
            reply = wire.decode_tokens(worker.receive(Kind.TOKENS, 4 * (1 + len(group) + tokens)))
            if len(reply) != len(group):
                raise Refused(f"the tokenizer gave {len(reply)} documents back for {len(group)}")
            for number, ids in enumerate(reply, begin):
                _check_ids(ids, number, artifact.manifest)
            encoded += reply
    return encoded


def check_decoding(
    artifact: Artifact, documents: Sequence[bytes], encoded: Sequence[Ids], runtime: Runtime, timed: Timed
) -> None:
    """Decode the ids in a fresh sandbox. Raises Refused at the first byte that differs from the canonical text."""
    sizes = [len(text) for text in documents]
    for number, (text, back) in enumerate(
        zip(documents, decode(artifact, encoded, sizes, runtime, timed), strict=True)
    ):
        if back != text:
            raise Refused(_difference(number, text, back))


def decode(
    artifact: Artifact, encoded: Sequence[Ids], sizes: Sequence[int], runtime: Runtime, timed: Timed
) -> list[bytes]:
    """The text of each document, from a fresh sandbox that receives nothing but the ids.

    `sizes`: upper bound on the bytes of each text. Raises Refused when the sandbox sends more than twice as much.
    """
    if artifact.manifest.tokenizer == "bytes" and artifact.manifest.transform is None:
        for number, ids in enumerate(encoded):
            if len(ids) and int(ids.max()) > 255:
                raise Refused(f"document {number}: id {int(ids.max())} is no byte")
        return [ids.astype(np.uint8).tobytes() for ids in encoded]
    texts: list[bytes] = []
    with _worker("decode", artifact, runtime, timed) as worker:
        for begin, end in _groups(sizes):
            group = list(encoded[begin:end])
            most = 2 * sum(sizes[begin:end]) + 8 * len(group) + wire.TEXT_FRAME_BYTES
            worker.send(Kind.TOKENS, wire.encode_tokens(group))
            decoded = wire.decode_texts(worker.receive(Kind.TEXTS, most))
            if len(decoded) != len(group):
                raise Refused(f"the tokenizer gave {len(decoded)} documents back for {len(group)}")
            texts += decoded
    return texts


@contextmanager
def _worker(role: str, artifact: Artifact, runtime: Runtime, timed: Timed) -> Iterator[Worker]:
    """A sandbox that holds the tokenizer's file, or the whole artifact where the tokenizer is code."""
    manifest = artifact.manifest
    name = manifest.tokenizer
    code = is_code(manifest)
    files = artifact.members if code else {name: artifact.members[name]} if name != "bytes" else {}
    packages = manifest.packages if code else ()
    config = {"tokenizer": name, "transform": manifest.transform}
    with Worker(role, files, isolated=runtime.isolated, config=config, packages=packages) as worker, timed as deadline:
        worker.channel.deadline = deadline
        worker.receive(Kind.READY, 0)
        try:
            yield worker
        except WireError as error:
            raise Refused(f"the submission broke the wire protocol: {error}") from None


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbouring documents, each of about one frame."""
    frames = np.cumsum(sizes) // wire.TEXT_FRAME_BYTES if len(sizes) else np.zeros(0, dtype=np.int64)
    edges = np.flatnonzero(np.diff(frames, prepend=-1, append=-1))
    yield from pairwise(edges.tolist())


def _check_ids(ids: Ids, number: int, manifest: Manifest) -> None:
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < manifest.vocab_size):
        raise Refused(
            f"document {number}: the tokenizer gave id {int(ids.max())}, but vocab_size is {manifest.vocab_size}"
        )
    if np.any(ids == manifest.bos):
        raise Refused(f"document {number}: the tokenizer used BOS ({manifest.bos}) inside a document")


def _difference(number: int, text: bytes, back: bytes) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return (
        f"the tokenizer is lossy: document {number} differs from the canonical text at byte {at} "
        f"({text[at : at + 12]!r} became {back[at : at + 12]!r})"
    )
