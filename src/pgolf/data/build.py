"""Make a dataset folder from any text: tokenizer, validation text, token shards, index, in this order.

The work can be killed at any moment and goes on when the same command is run again. What is finished has its
final name; what is not ends in `.part`; `build.json` says what the build was asked for and how far it came, and
goes when `dataset.json` is there. Since documents are taken in order and shards are cut by token count alone, the
files do not depend on interruptions or on the number of worker processes.
"""

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from pgolf.data import vocabulary
from pgolf.data.dataset import FORMAT, INDEX, document_digest, file_digest, load_tokenizer, text_digest
from pgolf.data.shards import HEADER_BYTES, Tokens, header_bytes, read_shard, split_documents
from pgolf.data.sources import Batch, Source, read
from pgolf.data.vocabulary import Encoded
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import write_atomically

STATE = "build.json"
SHARD_TOKENS = 100_000_000

_TOKENIZER = "tokenizer.model"
_DOCUMENTS = "val_documents.jsonl"
_SAMPLE_CHARACTERS = 16_000_000  # of training text for the tokenizer; twice as much changes it by under 0.1 %
_CHECKPOINT_SECONDS = 2.0

_Json = dict[str, Any]


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

    def identity(self) -> _Json:
        """The settings with digests in place of paths. Raises UsageError for what cannot work."""
        if not 1 <= self.shard_tokens <= 1_000_000_000:
            raise UsageError(f"--shard-tokens {self.shard_tokens} is not between 1 and 1,000,000,000")
        if self.tokenizer is None:
            if not 1 <= self.vocab_size <= vocabulary.VOCAB_SIZE:
                raise UsageError(
                    f"--vocab-size {self.vocab_size} is not between 1 and {vocabulary.VOCAB_SIZE:,}: tokens are uint16"
                )
            tokenizer: _Json = {"vocab_size": self.vocab_size, "normalization": self.normalization}
        else:
            vocabulary.check(self.tokenizer)
            tokenizer = {"sha256": file_digest(self.tokenizer)}
        if isinstance(self.validation, int):
            if self.validation < 1:
                raise UsageError(f"--val-documents {self.validation} holds nothing out; give 1 or more")
            validation: int | list[_Json] = self.validation
        else:
            validation = [source.identity() for source in self.validation]
        return {
            "name": self.name,
            "sources": [source.identity() for source in self.sources],
            "validation": validation,
            "field": self.field,
            "tokenizer": tokenizer,
            "shard_tokens": self.shard_tokens,
        }


@dataclass
class _State:
    """How far a build came; the contents of build.json."""

    settings: _Json
    validation: _Json | None = None
    """Entries for dataset.json, once validation text and shards are there."""
    position: int = 0
    """Documents of the training sources that are dealt with, held-out ones included."""
    read_bytes: int = 0
    shards: list[_Json] = field(default_factory=list)
    part_tokens: int = 0
    """Tokens of the unfinished shard that belong to documents before `position`."""
    counts: _Json = field(
        default_factory=lambda: {"documents": 0, "tokens": 0, "bytes": 0, "dropped_empty": 0, "dropped_overlap": 0}
    )


def build(settings: Settings, out: Path, workers: int) -> _Json:
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


def finished(out: Path, identity: _Json | None = None) -> _Json | None:
    """The index of a finished folder, None if it is not finished.

    Raises UsageError when it was built with settings other than `identity`.
    """
    path = out / INDEX
    if not path.is_file():
        return None
    try:
        index: _Json = json.loads(path.read_text(encoding="utf-8"))
        settings = index["build"]
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{out}: holds a dataset that was not built here; choose another --out") from None
    if identity is not None:
        _check_same(out, settings, identity)
    (out / STATE).unlink(missing_ok=True)
    return index


class _Builder:
    def __init__(self, settings: Settings, out: Path, state: _State, pool: ProcessPoolExecutor, workers: int) -> None:
        self._settings = settings
        self._out = out
        self._state = state
        self._pool = pool
        self._ahead = 3 * workers
        self._held_out = 0

    def run(self) -> _Json:
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
            for _, text in batch.texts(self._settings.field):
                position += 1
                found += bool(text.strip())
                if found == wanted:
                    return position
        raise UsageError(f"the sources hold only {found} documents that are not empty; {wanted} cannot be held out")

    def _make_tokenizer(self) -> bytes:
        settings = self._settings
        if settings.tokenizer is not None:
            return settings.tokenizer.read_bytes()
        sample = list(self._sample())
        if not sample:
            raise UsageError("the sources hold no training document")
        return self._pool.submit(vocabulary.train, sample, settings.vocab_size, settings.normalization).result()

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
                    for _, text in batch.slice(skipped, batch.count).texts(self._settings.field):
                        if text.strip() and taken < share:
                            yield text
                            taken += len(text)
                if taken >= share:
                    break
            total += taken
            if total >= _SAMPLE_CHARACTERS:
                return

    def _validate(self) -> _Json:
        """Write validation text and shards, each document's round trip proven."""
        settings = self._settings
        if isinstance(settings.validation, int):
            batches = read(settings.sources, settings.field, 0, self._held_out)
        else:
            batches = read(settings.validation, settings.field)
        counts = {"documents": 0, "bytes": 0, "tokens": 0, "dropped_empty": 0, "changed_by_tokenizer": 0}
        path = self._out / _DOCUMENTS
        part = path.with_name(path.name + ".part")
        shards = _ShardWriter(self._out, "val", settings.shard_tokens, [], 0)
        with shards, part.open("w", encoding="utf-8") as file, self._bar("validation") as bar:
            for batch, encoded in self._encoded(batches, canonical=True):
                file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in encoded.canonical)
                shards.add(encoded.tokens, encoded.lengths)
                _count(counts, encoded)
                counts["changed_by_tokenizer"] += encoded.changed
                bar.update(batch.count)
            shards.close_shard()
        if not counts["documents"]:
            raise UsageError("the validation sources hold no document")
        part.replace(path)
        with path.open(encoding="utf-8", newline="\n") as file:
            digest = text_digest(json.loads(line)["text"].encode() for line in file)
        return {"shards": shards.done, "counts": counts, "sha256": digest}

    def _train(self, validation: _Json) -> None:
        """Write the training shards, without the documents that are validation documents too."""
        settings, state = self._settings, self._state
        known = self._validation_digests(validation["shards"])
        sizes = [source.size for source in settings.sources]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        batches = read(settings.sources, settings.field, state.position)
        shards = _ShardWriter(self._out, "train", settings.shard_tokens, state.shards, state.part_tokens)
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

    def _finish(self, validation: _Json) -> _Json:
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
            },
            "shards": [*self._state.shards, *validation["shards"]],
            "text": text | counts,
            "train": self._state.counts,
            "overlap": 0,  # training documents that are validation documents too: each one was dropped
            "build": self._state.settings,
        }
        write_atomically(self._out / INDEX, _dumped(index))
        (self._out / STATE).unlink()
        return index

    def _validation_digests(self, shards: list[_Json]) -> frozenset[bytes]:
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
        model = self._out / _TOKENIZER
        for batch in batches:
            future = self._pool.submit(vocabulary.encode, batch, self._settings.field, model, canonical)
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


class _ShardWriter:
    """Appends documents to shards. The unfinished shard ends in `.part` and has no header yet."""

    def __init__(self, root: Path, prefix: str, limit: int, done: list[_Json], part_tokens: int) -> None:
        """Go on after the shards `done` and the first `part_tokens` tokens of the unfinished one."""
        self.done = done
        self._root = root
        self._prefix = prefix
        self._limit = limit
        self._tokens = 0
        self._file: BinaryIO | None = None
        if part_tokens:
            self._reopen(part_tokens)

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def add(self, tokens: Tokens, lengths: npt.NDArray[np.int64]) -> None:
        """Append documents: tokens (N,), and how many of them each document has (D,).

        A shard is full when the next document does not fit; a document is never split.
        """
        ends = np.cumsum(lengths)
        first = start = 0
        while first < len(ends):
            fit = int(np.searchsorted(ends, start + self._limit - self._tokens, side="right"))
            if fit == first and not self._tokens:
                fit += 1
            if fit > first:
                stop = int(ends[fit - 1])
                self._append(tokens[start:stop])
                first, start = fit, stop
            if first < len(ends):
                self.close_shard()

    def flush(self) -> int:
        """Bring everything to the disk; returns the tokens in the unfinished shard."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._tokens

    def close_shard(self) -> None:
        """Give the unfinished shard, if there is one, its header and its name."""
        if self._file is None:
            return
        path, part = self._paths()
        self._file.seek(0)
        self._file.write(header_bytes(self._tokens))
        self.flush()
        self._file.close()
        digest = file_digest(part)
        part.replace(path)
        self.done.append({"file": path.name, "sha256": digest, "tokens": self._tokens})
        self._file, self._tokens = None, 0

    def _append(self, tokens: Tokens) -> None:
        if self._file is None:
            self._file = self._paths()[1].open("wb")
            self._file.write(header_bytes(0))
        self._file.write(tokens.astype("<u2", copy=False).tobytes())
        self._tokens += len(tokens)

    def _reopen(self, tokens: int) -> None:
        path, part = self._paths()
        if not part.is_file() and path.is_file():
            path.replace(part)  # it was finished after the last checkpoint: take back what came later
        size = HEADER_BYTES + 2 * tokens
        if not part.is_file() or part.stat().st_size < size:
            raise EnvironmentBroken(f"{part}: shorter than {STATE} says; delete the folder and build again")
        self._file = part.open("r+b")
        self._file.truncate(size)
        self._file.seek(size)
        self._tokens = tokens

    def _paths(self) -> tuple[Path, Path]:
        path = self._root / f"{self._prefix}_{len(self.done):06d}.bin"
        return path, path.with_name(path.name + ".part")


def _without(encoded: Encoded, known: frozenset[bytes]) -> tuple[Encoded, int]:
    """The documents that are not `known`, and how many are."""
    keep = np.array([digest not in known for digest in encoded.digests], dtype=bool)
    dropped = int(len(keep) - keep.sum())
    if not dropped:
        return encoded, 0
    tokens = encoded.tokens[np.repeat(keep, encoded.lengths)]
    kept = Encoded(tokens, encoded.lengths[keep], [], encoded.sizes[keep], encoded.empty, [], encoded.changed)
    return kept, dropped


def _count(counts: _Json, encoded: Encoded) -> None:
    counts["documents"] += len(encoded.lengths)
    counts["tokens"] += len(encoded.tokens)
    counts["bytes"] += int(encoded.sizes.sum())
    counts["dropped_empty"] += encoded.empty


@contextmanager
def _claimed(out: Path, identity: _Json) -> Iterator[_State]:
    """The state of the build in `out`, begun here if there is none, while no other process works on it."""
    state: _State | None = None
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = _load_state(out, identity)
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


def _load_state(out: Path, identity: _Json) -> _State:
    path = out / STATE
    if path.is_file():
        try:
            state = _State(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise EnvironmentBroken(f"{path}: damaged; delete the folder and build again") from None
        _check_same(out, state.settings, identity)
        return state
    if others := [p.name for p in out.iterdir() if p.name != STATE + ".part"]:
        raise UsageError(f"{out}: is not empty ({min(others)}) and no build began there; choose another --out")
    state = _State(identity)
    write_atomically(path, _dumped(asdict(state)))
    return state


def _check_same(out: Path, before: _Json, now: _Json) -> None:
    for key, value in now.items():
        if before.get(key) != value:
            detail = f"{key} {before.get(key)}, not {value}" if isinstance(value, str | int) else f"other {key}"
            raise UsageError(f"{out}: was begun with {detail}; choose another --out or delete it")


def _remove(out: Path, made: bool) -> None:
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


def _described(settings: _Json) -> str:
    names = [str(source.get("file") or source.get("hub")) for source in settings["sources"]]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _dumped(value: _Json) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
