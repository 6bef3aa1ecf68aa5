"""Make a dataset folder from any text: tokenizer, validation text, token shards, index, in this order.

The work can be killed at any moment and goes on when the same command is run again. What is finished has its
final name; what is not ends in `.part`; `build.json` says what the build was asked for and how far it came, and
goes when `dataset.json` is there. Since documents are taken in order and shards are cut by token count alone, the
files do not depend on interruptions or on the number of worker processes.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from tqdm import tqdm

from pgolf.data.build import tokenize
from pgolf.data.build.shard_writer import STATE, Json, ShardWriter
from pgolf.data.build.sources import Batch, Source, read
from pgolf.data.build.tokenize import Encoded, Encoding
from pgolf.data.dataset import (
    FORMAT,
    INDEX,
    INDEX_BYTES,
    TEXT_BYTES,
    TEXT_DOCUMENTS,
    TOKENIZER_BYTES,
    VOCAB_SIZE,
    document_digest,
    file_digest,
    load_tokenizer,
    read_index,
    text_digest,
)
from pgolf.data.shards import read_shard, split_documents
from pgolf.data.transforms import TRANSFORMS
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import create, is_temporary, read_regular, write_atomically

SHARD_TOKENS = 100_000_000

_TOKENIZER = "tokenizer.model"
_DOCUMENTS = "val_documents.jsonl"
_SAMPLE_CHARACTERS = 16_000_000  # of training text for the tokenizer; twice as much changes it by under 0.1 %
_CHECKPOINT_SECONDS = 2.0


@dataclass(frozen=True)
class Settings:
    """What a dataset is made of. The same settings and sources give the same files."""

    name: str
    sources: Sequence[Source]
    validation: Sequence[Source] | int
    """Sources of the validation text, or how many of the first documents are held out for it."""
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
        if not 1 <= self.shard_tokens <= 1_000_000_000:
            raise UsageError(f"--shard-tokens {self.shard_tokens} is not between 1 and 1,000,000,000")
        if self.tokenizer is None:
            if not 1 <= self.vocab_size <= VOCAB_SIZE:
                raise UsageError(
                    f"--vocab-size {self.vocab_size} is not between 1 and {VOCAB_SIZE:,}: tokens are uint16"
                )
            tokenizer: Json = {"vocab_size": self.vocab_size, "normalization": self.normalization}
        else:
            tokenize.check(self.tokenizer)
            tokenizer = {"sha256": file_digest(self.tokenizer)}
        if self.transform not in (None, *TRANSFORMS):
            raise UsageError(f"--transform {self.transform}: known are {', '.join(TRANSFORMS)}")
        if isinstance(self.validation, int):
            if not 1 <= self.validation <= TEXT_DOCUMENTS:
                raise UsageError(f"--val-documents {self.validation} is not between 1 and {TEXT_DOCUMENTS:,}")
            validation: int | list[Json] = self.validation
        else:
            validation = [source.identity() for source in self.validation]
        return {
            "name": self.name,
            "sources": [source.identity() for source in self.sources],
            "validation": validation,
            "field": self.field,
            "tokenizer": tokenizer,
            "shard_tokens": self.shard_tokens,
            "transform": self.transform,
            "skip_bad": self.skip_bad or None,  # like the absent field of an older build
        }


@dataclass
class _State:
    """How far a build came; the contents of build.json."""

    settings: Json
    validation: Json | None = None
    """Entries for dataset.json, once validation text and shards are there."""
    position: int = 0
    """Documents of the training sources that are dealt with, held-out ones included."""
    read_bytes: int = 0
    shards: list[Json] = field(default_factory=list)
    part_tokens: int = 0
    """Tokens of the unfinished shard that belong to documents before `position`."""
    counts: Json = field(
        default_factory=lambda: dict.fromkeys(
            ("documents", "tokens", "bytes", "dropped_empty", "dropped_overlap", "skipped_bad"), 0
        )
    )


def build(settings: Settings, out: Path, workers: int) -> Json:
    """Build the dataset folder `out`, or finish building it, and return the contents of its dataset.json.

    Does nothing if it is there already. Raises UsageError, leaving nothing behind, for sources or settings that
    cannot work, and EnvironmentBroken, keeping what is done, when the machine fails.
    """
    identity = settings.identity()
    if index := finished(out, identity):
        return index
    # The workers are forked before anything here starts a thread or takes the lock.
    with _pool(workers) as pool, _claimed(out, identity) as state:
        return _Builder(settings, out, state, pool, workers).run()


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
        _check_same(out, index["build"], identity)
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


class _Builder:
    def __init__(self, settings: Settings, out: Path, state: _State, pool: ProcessPoolExecutor, workers: int) -> None:
        self._settings = settings
        self._out = out
        self._state = state
        self._pool = pool
        self._ahead = 3 * workers
        self._held_out = 0

    def run(self) -> Json:
        if isinstance(self._settings.validation, int):
            self._held_out = self._find_held_out(self._settings.validation)
        if not (self._out / _TOKENIZER).is_file():
            write_atomically(self._out / _TOKENIZER, self._make_tokenizer())
        if self._state.validation is None:
            self._state.validation = self._validate()
            self._state.position = self._held_out
            self._save()
        self._train(self._state.validation)
        return self._finish(self._state.validation)

    def _find_held_out(self, wanted: int) -> int:
        """How many documents of the sources to take so that `wanted` of them are not empty."""
        position = found = 0
        for batch in read(self._settings.sources, self._settings.field):
            for _, text in batch.sound_texts(self._settings.field, self._settings.skip_bad):
                position += 1
                found += bool(text and text.strip())
                if found == wanted:
                    return position
        raise UsageError(f"the sources hold only {found} documents that are not empty; {wanted} cannot be held out")

    def _make_tokenizer(self) -> bytes:
        settings = self._settings
        if settings.tokenizer is not None:
            return read_regular(settings.tokenizer, TOKENIZER_BYTES)
        sample = list(self._sample())
        if not sample:
            raise UsageError("the sources hold no training document")
        return self._pool.submit(
            tokenize.train, sample, settings.vocab_size, settings.normalization, settings.transform
        ).result()

    def _sample(self) -> Iterator[str]:
        """The beginning of the training text: an equal share of each source, and no more than the bound."""
        share = _SAMPLE_CHARACTERS / len(self._settings.sources)
        total = position = 0
        for source in self._settings.sources:
            taken = 0
            for batch in source.batches(self._settings.field):
                skipped = max(self._held_out - position, 0)
                position += batch.count
                if skipped < batch.count:
                    rest = batch.slice(skipped, batch.count)
                    for _, text in rest.sound_texts(self._settings.field, self._settings.skip_bad):
                        if text and text.strip() and taken < share:
                            yield text
                            taken += len(text)
                if taken >= share:
                    break
            total += taken
            if total >= _SAMPLE_CHARACTERS:
                return

    def _validate(self) -> Json:
        """Write validation text and shards, each document's round trip proven."""
        settings = self._settings
        if isinstance(settings.validation, int):
            batches = read(settings.sources, settings.field, 0, self._held_out)
        else:
            batches = read(settings.validation, settings.field)
        names = ("documents", "bytes", "tokens", "dropped_empty", "skipped_bad", "changed_by_tokenizer")
        counts = dict.fromkeys(names, 0)
        path = self._out / _DOCUMENTS
        part = path.with_name(path.name + ".part")
        shards = ShardWriter(self._out, "val", settings.shard_tokens, [], 0)
        with shards, create(part) as file, self._bar("validation") as bar:
            for batch, encoded in self._encoded(batches, canonical=True):
                file.writelines(_dumped_line({"text": text}) for text in encoded.canonical)
                shards.add(encoded.tokens, encoded.lengths)
                _count(counts, encoded)
                counts["changed_by_tokenizer"] += encoded.changed
                bar.update(batch.count)
                if counts["bytes"] > TEXT_BYTES or counts["documents"] > TEXT_DOCUMENTS:
                    limits = f"{TEXT_BYTES:,} bytes or {TEXT_DOCUMENTS:,} documents"
                    raise UsageError(f"the validation text has over {limits}; hold out less")
            shards.close_shard()
        if not counts["documents"]:
            raise UsageError("the validation sources hold no document")
        part.replace(path)
        with path.open(encoding="utf-8", newline="\n") as file:
            digest = text_digest(json.loads(line)["text"].encode() for line in file)
        return {"shards": shards.done, "counts": counts, "sha256": digest}

    def _train(self, validation: Json) -> None:
        """Write the training shards, without the documents that are validation documents too."""
        settings, state = self._settings, self._state
        known = self._validation_digests(validation["shards"])
        sizes = [source.size for source in settings.sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        batches = read(settings.sources, settings.field, state.position)
        shards = ShardWriter(self._out, "train", settings.shard_tokens, state.shards, state.part_tokens)
        with shards, self._bar("train", total, state.read_bytes) as bar:
            saved = monotonic()
            for batch, encoded in self._encoded(batches, canonical=False):
                kept, dropped = _without(encoded, known)
                shards.add(kept.tokens, kept.lengths)
                _count(state.counts, kept)
                state.counts["dropped_overlap"] += dropped
                state.position += batch.count
                state.read_bytes += batch.cost
                bar.update(batch.cost if total else batch.count)
                bar.set_postfix(documents=state.counts["documents"], refresh=False)
                if monotonic() - saved > _CHECKPOINT_SECONDS:
                    state.part_tokens = shards.flush()
                    self._save()
                    saved = monotonic()
            shards.close_shard()
        if not state.counts["documents"]:
            raise UsageError(
                f"no training document is left: {state.counts['dropped_overlap']} are validation documents too, "
                f"{state.counts['dropped_empty']} are empty"
            )

    def _finish(self, validation: Json) -> Json:
        model = self._out / _TOKENIZER
        processor = load_tokenizer(model)
        counts = dict(validation["counts"])
        text = {"file": _DOCUMENTS, "sha256": validation["sha256"], "bytes": counts.pop("bytes")}
        text["documents"] = counts.pop("documents")
        index = {
            "format": FORMAT,
            "name": self._settings.name,
            "source": _described(self._state.settings),
            "tokenizer": {
                "file": _TOKENIZER,
                "sha256": file_digest(model),
                "vocab_size": processor.vocab_size(),
                "bos": processor.bos_id(),
                "transform": self._settings.transform,
            },
            "shards": [*self._state.shards, *validation["shards"]],
            "text": text | counts,
            "train": self._state.counts,
            "overlap": 0,  # training documents that are validation documents too: each one was dropped
            "build": self._state.settings,
        }
        if self._settings.from_environment:
            index["environment"] = True
        write_atomically(self._out / INDEX, _dumped(index))
        (self._out / STATE).unlink()
        return index

    def _validation_digests(self, shards: list[Json]) -> frozenset[bytes]:
        processor = load_tokenizer(self._out / _TOKENIZER)
        paths = [self._out / shard["file"] for shard in shards]
        return frozenset(
            document_digest(ids)
            for path in paths
            for ids in split_documents(path, read_shard(path, processor.vocab_size()), processor.bos_id())
        )

    def _encoded(self, batches: Iterable[Batch], canonical: bool) -> Iterator[tuple[Batch, Encoded]]:
        """Tokenise in the worker processes, in order, a bounded number of batches ahead."""
        pending: deque[tuple[Batch, Future[Encoded]]] = deque()
        settings = self._settings
        encoding = Encoding(settings.field, self._out / _TOKENIZER, settings.transform, settings.skip_bad)
        for batch in batches:
            future = self._pool.submit(tokenize.encode, batch, encoding, canonical)
            pending.append((batch, future))
            if len(pending) > self._ahead:
                done, oldest = pending.popleft()
                yield done, oldest.result()
        for done, oldest in pending:
            yield done, oldest.result()

    def _save(self) -> None:
        write_atomically(self._out / STATE, _dumped(asdict(self._state)))

    def _bar(self, title: str, total: int | None = None, initial: int = 0) -> "tqdm[Any]":
        unit = "B" if total else "doc"
        return tqdm(desc=title, total=total, initial=initial, unit=unit, unit_scale=True, disable=None)


def _without(encoded: Encoded, known: frozenset[bytes]) -> tuple[Encoded, int]:
    """The documents that are not `known`, and how many are."""
    keep = np.array([digest not in known for digest in encoded.digests], dtype=bool)
    dropped = int(len(keep) - keep.sum())
    if not dropped:
        return encoded, 0
    tokens = encoded.tokens[np.repeat(keep, encoded.lengths)]
    lengths, sizes = encoded.lengths[keep], encoded.sizes[keep]
    return replace(encoded, tokens=tokens, lengths=lengths, sizes=sizes, digests=[], canonical=[]), dropped


def _count(counts: Json, encoded: Encoded) -> None:
    counts["documents"] += len(encoded.lengths)
    counts["tokens"] += len(encoded.tokens)
    counts["bytes"] += int(encoded.sizes.sum())
    counts["dropped_empty"] += encoded.empty
    counts["skipped_bad"] += encoded.bad


@contextmanager
def _claimed(out: Path, identity: Json) -> Iterator[_State]:
    """The state of the build in `out`, begun here if there is none, while no other process works on it."""
    state: _State | None = None
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = _load_state(out, identity)
            for path in filter(is_temporary, out.iterdir()):
                path.unlink()
            yield state
        finally:
            os.close(lock)
    except UsageError:
        if state is not None:
            _remove(out, made)
        raise
    except BlockingIOError:
        raise UsageError(f"{out}: another build is at work there") from None
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out}: is not a folder") from None
    except BrokenProcessPool:
        raise EnvironmentBroken(
            "a worker process died, most likely for lack of memory; run the same command again to continue, "
            "with fewer --workers"
        ) from None
    except OSError as error:
        raise EnvironmentBroken(
            f"{error.filename or out}: {error.strerror or error}; put that right and run the same command again"
        ) from None


def _load_state(out: Path, identity: Json) -> _State:
    path = out / STATE
    if path.is_file():
        try:
            state = _State(**json.loads(read_regular(path, INDEX_BYTES)))
        except (ValueError, TypeError, RecursionError):
            raise EnvironmentBroken(f"{path}: damaged; delete the folder and build again") from None
        _check_same(out, state.settings, identity)
        return state
    if others := [p.name for p in out.iterdir() if not is_temporary(p)]:
        raise UsageError(f"{out}: is not empty ({min(others)}) and no build began there; choose another --out")
    state = _State(identity)
    write_atomically(path, _dumped(asdict(state)))
    return state


def _check_same(out: Path, before: Json, now: Json) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            detail = f"{key} {before.get(key)}, not {value}" if isinstance(value, str | int) else f"other {key}"
            raise UsageError(f"{out}: was begun with {detail}; choose another --out or delete it")


def _remove(out: Path, made: bool) -> None:
    with contextlib.suppress(OSError):  # the mistake is what matters
        for name in (STATE, _TOKENIZER, _DOCUMENTS, "train_*.bin", "val_*.bin"):
            for path in (*out.glob(name), *out.glob(name + ".part")):
                path.unlink()
        if made:
            out.rmdir()


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes that end with this one, however it ends."""
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        pool.submit(os.getpid).result()  # forks them all
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _described(settings: Json) -> str:
    names = [str(source.get("file") or source.get("hub")) for source in settings["sources"]]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _dumped(value: Json) -> bytes:
    """JSON. Bytes of a file name that are no text become escapes, which JSON has too."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def _dumped_line(value: Json) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode()
