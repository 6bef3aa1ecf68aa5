"""Make a dataset folder from any text: tokenizer, validation and development text, token shards, index, in this order.

The work can be killed at any moment and goes on when the same command is run again (see `checkpoint`). Since documents
are taken in order and shards are cut by token count alone, the files do not depend on interruptions or on the number
of worker processes.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from tqdm import tqdm

from pgolf.data.build import tokenize
from pgolf.data.build.batch import Batch
from pgolf.data.build.checkpoint import DEVELOPMENT, DOCUMENTS, TOKENIZER, Checkpoint, check_same, claimed, dumped
from pgolf.data.build.shard_writer import STATE, Json, ShardWriter
from pgolf.data.build.sources import FileSource, Source, read
from pgolf.data.build.tokenize import Encoded, Encoding
from pgolf.data.dataset import (
    FORMAT,
    INDEX,
    TEXT_BYTES,
    TEXT_DOCUMENTS,
    TOKENIZER_BYTES,
    VOCAB_SIZE,
    document_digests,
    file_digest,
    load_tokenizer,
    read_index,
    text_digest,
)
from pgolf.data.shards import Shard
from pgolf.data.transforms import TRANSFORMS
from pgolf.errors import UsageError
from pgolf.files import create, read_regular, write_atomically
from pgolf.machine import process_pool

SHARD_TOKENS = 100_000_000
SAMPLE_CHARACTERS = 16_000_000  # of training text for the tokenizer; twice as much changes it by under 0.1 %
CHECKPOINT_SECONDS = 2.0
DEVELOPMENT_SHARE = 100  # unless a number is given, 1 in 100 documents is held out as development text ...
DEVELOPMENT_DOCUMENTS = 500  # ... and at most this many


@dataclass(frozen=True)
class Settings:
    """What a dataset is made of. The same settings and sources give the same files."""

    name: str
    sources: Sequence[Source]
    validation: Sequence[Source] | int
    """Sources of the validation text, or how many of the first documents are held out for it."""
    development: int | None = None
    """How many of the documents after these are held out for the development text; None: a hundredth, at most 500."""
    field: str = "text"
    """Where JSON lines and table rows keep their text."""
    tokenizer: Path | None = None
    """A SentencePiece model; None: train one of `vocab_size` pieces."""
    vocab_size: int = 1024
    normalization: str = "identity"
    shard_tokens: int = SHARD_TOKENS
    transform: str | None = None
    """Name of the transform that text goes through before the tokenizer."""
    skip_bad: bool = False
    """Leave out documents that have no text, and count them, instead of ending there."""
    from_environment: bool = False
    """Whether the text can be rebuilt from what is installed on the machine."""

    def identity(self) -> Json:
        """The settings with digests in place of paths. Raises UsageError for what cannot work."""
        _check_between("--shard-tokens", self.shard_tokens, 1_000_000_000)
        if self.tokenizer is None:
            _check_between("--vocab-size", self.vocab_size, VOCAB_SIZE, ": tokens are uint16")
            tokenizer: Json = {"vocab_size": self.vocab_size, "normalization": self.normalization}
        else:
            tokenize.check(self.tokenizer)
            tokenizer = {"sha256": file_digest(self.tokenizer)}
        if self.transform not in (None, *TRANSFORMS):
            raise UsageError(f"--transform {self.transform}: known are {', '.join(TRANSFORMS)}")
        validation: int | list[Json]
        if isinstance(self.validation, int):
            validation = _check_between("--val-documents", self.validation, TEXT_DOCUMENTS)
        else:
            validation = [source.identity() for source in self.validation]
        if self.development:
            _check_between("--dev-documents", self.development, TEXT_DOCUMENTS)
        return {
            "name": self.name,
            "sources": [source.identity() for source in self.sources],
            "validation": validation,
            "development": self.development,
            "field": self.field,
            "tokenizer": tokenizer,
            "shard_tokens": self.shard_tokens,
            "transform": self.transform,
            "skip_bad": self.skip_bad or None,  # like the absent field of an older build
        }


def _check_between(option: str, value: int, most: int, why: str = "") -> int:
    if not 1 <= value <= most:
        raise UsageError(f"{option} {value} is not between 1 and {most:,}{why}")
    return value


def build(settings: Settings, out: Path, workers: int) -> Json:
    """Build the dataset folder `out`, or finish building it, and return the contents of its dataset.json.

    Does nothing if it is there already. Raises UsageError, leaving nothing behind, for sources or settings that
    cannot work, and EnvironmentBroken, keeping what is done, when the machine fails.
    """
    identity = settings.identity()
    if index := finished(out, identity):
        return index
    with process_pool(workers) as pool, claimed(out, identity) as state:
        return Builder(settings, out, state, pool, 3 * workers).run()


def finished(out: Path, identity: Json | None = None) -> Json | None:
    """The index of a finished folder, None if it is not finished.

    Raises UsageError when it was built with settings other than `identity`, or not here, and EnvironmentBroken when
    its index is damaged.
    """
    path = out / INDEX
    if not path.is_file():
        return None
    index = read_index(path)
    if not _is_complete(index):
        raise UsageError(f"{out}: holds a dataset that was not built here; choose another --out")
    if identity is not None:
        check_same(out, index["build"], identity)
    (out / STATE).unlink(missing_ok=True)
    return index


def _is_complete(index: Json) -> bool:
    """Whether it has what a build writes beyond what `read_index` asks for."""
    train, text = index.get("train"), index["text"]
    if not isinstance(train, dict) or not isinstance(index.get("build"), dict):
        return False
    counts = [train.get(key) for key in ("documents", "tokens", "bytes", "dropped_empty", "dropped_overlap")]
    counts += [text.get(key) for key in ("tokens", "dropped_empty", "changed_by_tokenizer")]
    return all(isinstance(count, int) for count in (*counts, index.get("overlap")))


@dataclass
class Builder:
    """One build; `run` continues where the checkpoint stands."""

    settings: Settings
    out: Path
    state: Checkpoint
    pool: ProcessPoolExecutor
    ahead: int
    """Batches that may be in the worker processes at a time."""
    validated: int = 0
    """How many of the first documents are held out for the validation text ..."""
    held_out: int = 0
    """... and for it or the development text."""

    def run(self) -> Json:
        """Make what is not there yet; returns the index."""
        state = self.state
        if state.validation is None:
            self._hold_out()
            if not (self.out / TOKENIZER).is_file():
                write_atomically(self.out / TOKENIZER, self._make_tokenizer())
            state.validation = self.validate()
            state.development = self._develop(state.validation)
            state.position = self.held_out
            state.save(self.out)
        self._train(state.validation)
        return self.finish(state.validation)

    def _texts(self, batch: Batch) -> Iterator[str]:
        """The texts of a batch; an empty one for a bad document that is skipped."""
        for _, text in batch.texts(self.settings.field, self.settings.skip_bad):
            yield text if text and text.strip() else ""

    def _hold_out(self) -> None:
        """Find the documents that do not train: at the beginning of the sources, first the validation text's."""
        settings = self.settings
        if isinstance(settings.validation, int):
            self.validated = self._find_held_out(settings.validation, 0)
        if settings.development is not None:
            self.held_out = self._find_held_out(settings.development, self.validated)
            return
        stop = self.validated + DEVELOPMENT_SHARE * DEVELOPMENT_DOCUMENTS
        batches = read(settings.sources, settings.field, self.validated, stop)
        self.held_out = self.validated + sum(len(batch.documents) for batch in batches) // DEVELOPMENT_SHARE

    def _find_held_out(self, wanted: int, start: int) -> int:
        """Where to stop in the sources so that `wanted` documents from `start` on are not empty."""
        position, found = start, 0
        if not wanted:
            return start
        for batch in read(self.settings.sources, self.settings.field, start):
            for text in self._texts(batch):
                position += 1
                found += bool(text)
                if found == wanted:
                    return position
        raise UsageError(f"the sources hold only {found} documents that are not empty; {wanted} cannot be held out")

    def _make_tokenizer(self) -> bytes:
        settings = self.settings
        if settings.tokenizer is not None:
            return read_regular(settings.tokenizer, TOKENIZER_BYTES)
        sample = list(self._sample())
        if not sample:
            raise UsageError("the sources hold no training document")
        arguments = (sample, settings.vocab_size, settings.normalization, settings.transform)
        return self.pool.submit(tokenize.train, *arguments).result()

    def _sample(self) -> Iterator[str]:
        """The beginning of the training text: an equal share of each source, and no more than the bound."""
        share = SAMPLE_CHARACTERS / len(self.settings.sources)
        total = position = 0
        for source in self.settings.sources:
            taken = 0
            for batch in source.batches(self.settings.field):
                for text in self._texts(batch.slice(max(self.held_out - position, 0))):
                    if text and taken < share:
                        yield text
                        taken += len(text)
                position += len(batch.documents)
                if taken >= share:
                    break
            total += taken
            if total >= SAMPLE_CHARACTERS:
                return

    def validate(self) -> Json:
        """Write validation text and shards, each document's round trip proven; returns their entries of the index."""
        settings = self.settings
        if isinstance(settings.validation, int):
            batches = read(settings.sources, settings.field, 0, self.validated)
        else:
            batches = read(settings.validation, settings.field)
        shards = ShardWriter(self.out, "val", settings.shard_tokens, [], 0)
        with shards:
            text = self._write_text(DOCUMENTS, batches, lambda encoded: shards.add(encoded.tokens, encoded.lengths))
            shards.close_shard()
        if not text["documents"]:
            raise UsageError("the validation sources hold no document")
        return {"shards": shards.done, "text": text}

    def _develop(self, validation: Json) -> Json | None:
        """Write the development text without the documents that are validated; returns its entry of the index."""
        batches = read(self.settings.sources, self.settings.field, self.validated, self.held_out)
        text = self._write_text(DEVELOPMENT, batches, known=self._digests(validation))
        if text["documents"]:
            return text
        (self.out / DEVELOPMENT).unlink()
        return None

    def _write_text(
        self,
        name: str,
        batches: Iterable[Batch],
        add: Callable[[Encoded], object] = lambda encoded: None,
        known: frozenset[bytes] = frozenset(),
    ) -> Json:
        """Write the canonical text of documents that are not `known`; returns its entry. `add` gets their tokens."""
        counted = ("documents", "bytes", "tokens", "dropped_empty", "skipped_bad", "changed_by_tokenizer")
        counts = dict.fromkeys(counted, 0)
        path, part = self.out / name, self.out / f"{name}.part"
        with create(part) as file, _bar(path.stem) as bar:
            for batch, encoded in self._encoded(batches, canonical=True):
                kept = encoded.without(known)
                file.writelines(
                    json.dumps({"text": t}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
                    for t in kept.canonical
                )
                add(kept)
                _count(counts, kept)
                counts["changed_by_tokenizer"] += encoded.changed
                bar.update(len(batch.documents))
                if counts["bytes"] > TEXT_BYTES or counts["documents"] > TEXT_DOCUMENTS:
                    limits = f"{TEXT_BYTES:,} bytes or {TEXT_DOCUMENTS:,} documents"
                    raise UsageError(f"{name}: the held-out text has over {limits}; hold out less")
        part.replace(path)
        with path.open(encoding="utf-8", newline="\n") as file:
            digest = text_digest(json.loads(line)["text"].encode() for line in file)
        return {"file": name, "sha256": digest, **counts}

    def _digests(self, validation: Json) -> frozenset[bytes]:
        """Of the validation documents."""
        processor = load_tokenizer(self.out / TOKENIZER)
        shards = (Shard(self.out / shard["file"], shard["tokens"]) for shard in validation["shards"])
        return frozenset(document_digests(shards, processor.vocab_size(), processor.bos_id()))

    def _developed(self) -> frozenset[bytes]:
        """Digests of the development documents, as `encode` would give them to training documents."""
        if self.state.development is None:
            return frozenset()
        batches = FileSource(self.out / DEVELOPMENT, lines=False).batches("text")
        return frozenset(
            d for _, encoded in self._encoded(batches, canonical=False, field="text") for d in encoded.digests
        )

    def _train(self, validation: Json) -> None:
        """Write the training shards, without the documents that are held out."""
        settings, state = self.settings, self.state
        known = self._digests(validation) | self._developed()
        sizes = [source.size for source in settings.sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        batches = read(settings.sources, settings.field, state.position)
        shards = ShardWriter(self.out, "train", settings.shard_tokens, state.shards, state.part_tokens)
        with shards, _bar("train", total, state.read_bytes) as bar:
            saved = monotonic()
            for batch, encoded in self._encoded(batches, canonical=False):
                kept = encoded.without(known)
                shards.add(kept.tokens, kept.lengths)
                _count(state.counts, kept)
                state.counts["dropped_overlap"] += len(encoded.lengths) - len(kept.lengths)
                state.position += len(batch.documents)
                state.read_bytes += batch.cost
                bar.update(batch.cost if total else len(batch.documents))
                bar.set_postfix(documents=state.counts["documents"], refresh=False)
                if monotonic() - saved > CHECKPOINT_SECONDS:
                    state.part_tokens = shards.flush()
                    state.save(self.out)
                    saved = monotonic()
            shards.close_shard()
        if not state.counts["documents"]:
            raise UsageError(
                f"no training document is left: {state.counts['dropped_overlap']} are held out too, "
                f"{state.counts['dropped_empty']} are empty"
            )

    def finish(self, validation: Json) -> Json:
        """Write the index, and remove the checkpoint."""
        model = self.out / TOKENIZER
        processor = load_tokenizer(model)
        index = {
            "format": FORMAT,
            "name": self.settings.name,
            "source": _described(self.state.settings),
            "tokenizer": {
                "file": TOKENIZER,
                "sha256": file_digest(model),
                "vocab_size": processor.vocab_size(),
                "bos": processor.bos_id(),
                "transform": self.settings.transform,
            },
            "shards": [*self.state.shards, *validation["shards"]],
            "text": validation["text"],
            "train": self.state.counts,
            "overlap": 0,  # training documents that are held out too: each one was dropped
            "build": self.state.settings,
        }
        if self.state.development is not None:
            index["development"] = self.state.development
        if self.settings.from_environment:
            index["environment"] = True
        write_atomically(self.out / INDEX, dumped(index))
        (self.out / STATE).unlink()
        return index

    def _encoded(
        self, batches: Iterable[Batch], canonical: bool, field: str | None = None
    ) -> Iterator[tuple[Batch, Encoded]]:
        """Tokenise in the worker processes, in order, a bounded number of batches ahead."""
        pending: deque[tuple[Batch, Future[Encoded]]] = deque()
        settings = self.settings
        encoding = Encoding(field or settings.field, self.out / TOKENIZER, settings.transform, settings.skip_bad)
        for batch in batches:
            pending.append((batch, self.pool.submit(tokenize.encode, batch, encoding, canonical)))
            if len(pending) > self.ahead:
                done, oldest = pending.popleft()
                yield done, oldest.result()
        for done, oldest in pending:
            yield done, oldest.result()


def _bar(title: str, total: int | None = None, initial: int = 0) -> "tqdm[Any]":
    unit = "B" if total else "doc"
    return tqdm(desc=title, total=total, initial=initial, unit=unit, unit_scale=True, disable=None)


def _count(counts: Json, encoded: Encoded) -> None:
    counts["documents"] += len(encoded.lengths)
    counts["tokens"] += len(encoded.tokens)
    counts["bytes"] += int(encoded.sizes.sum())
    counts["dropped_empty"] += encoded.empty
    counts["skipped_bad"] += encoded.bad


def _described(settings: Json) -> str:
    names = [str(source.get("file") or source.get("hub")) for source in settings["sources"]]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
