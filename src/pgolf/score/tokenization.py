"""Any tokenizer, proven lossless on the text that is scored.

Encoding and decoding run in separate boxes: the decoder receives nothing but ids, and what it returns must be
the canonical text, byte for byte, document by document. So the ids carry the whole text, and no byte count is
ever taken from a submission.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise

import numpy as np

from pgolf import rules
from pgolf.artifact import Artifact, Manifest
from pgolf.errors import Refused
from pgolf.sandbox import wire
from pgolf.sandbox.box import Worker
from pgolf.sandbox.wire import Ids, Kind


def encode(artifact: Artifact, documents: Sequence[bytes], deadline: float, isolated: bool) -> list[Ids]:
    """Ids (n,) of each document. Raises Refused for ids that are out of range, spell BOS, or are too many."""
    if artifact.manifest.tokenizer == "bytes":
        return [np.frombuffer(document, dtype=np.uint8).astype(np.int32) for document in documents]
    encoded: list[Ids] = []
    with _worker("encode", artifact, deadline, isolated) as worker:
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
    artifact: Artifact, documents: Sequence[bytes], encoded: Sequence[Ids], deadline: float, isolated: bool
) -> None:
    """Decode the ids in a fresh box. Raises Refused at the first byte that differs from the canonical text."""
    if artifact.manifest.tokenizer == "bytes":
        return
    sizes = [len(text) for text in documents]
    with closing(decode(artifact, encoded, sizes, deadline, isolated)) as decoded:
        for number, (text, back) in enumerate(zip(documents, decoded, strict=True)):
            if back != text:
                raise Refused(_difference(number, text, back))


def decode(
    artifact: Artifact, encoded: Sequence[Ids], sizes: Sequence[int], deadline: float, isolated: bool
) -> Generator[bytes, None, None]:
    """The text of each document, from a fresh box that receives nothing but the ids.

    `sizes`: bytes that each text has, or at most has. Raises Refused when the box sends more than twice as much.
    """
    if artifact.manifest.tokenizer == "bytes":
        for number, ids in enumerate(encoded):
            if len(ids) and int(ids.max()) > 255:
                raise Refused(f"document {number}: id {int(ids.max())} is no byte")
            yield ids.astype(np.uint8).tobytes()
        return
    with _worker("decode", artifact, deadline, isolated) as worker:
        for begin, end in _groups(sizes):
            group = list(encoded[begin:end])
            most = 2 * sum(sizes[begin:end]) + 8 * len(group) + wire.TEXT_FRAME_BYTES
            worker.send(Kind.TOKENS, wire.encode_tokens(group))
            decoded = wire.decode_texts(worker.receive(Kind.TEXTS, most))
            if len(decoded) != len(group):
                raise Refused(f"the tokenizer gave {len(decoded)} documents back for {len(group)}")
            yield from decoded


@contextmanager
def _worker(role: str, artifact: Artifact, deadline: float, isolated: bool) -> Iterator[Worker]:
    """A box that holds the tokenizer's file, or the whole artifact where the tokenizer is code."""
    name = artifact.manifest.tokenizer
    files = artifact.members if name.endswith(".py") else {name: artifact.members[name]}
    packages = artifact.manifest.packages if name.endswith(".py") else ()
    config = {"tokenizer": name}
    with Worker(role, files, deadline=deadline, isolated=isolated, config=config, packages=packages) as worker:
        worker.receive(Kind.READY, 0)
        yield worker


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
