"""Fetch a published export, shard by shard, into a folder in the contest's layout.

What is whole has its final name; what is not ends in `.part`. The validation shards get their names last, so a folder
that was never finished is no dataset. `fetch.json` says what each file is, and what the checks found.
"""

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from pgolf.data.build import checks
from pgolf.data.build.byte_model import byte_model
from pgolf.data.build.checkpoint import locked
from pgolf.data.build.export import DOCUMENTS, Variant, read_variant
from pgolf.data.build.hub import RemoteFile, Repository, download, download_lines, matches, open_repository
from pgolf.data.dataset import INDEX, INDEX_BYTES, open_dataset
from pgolf.data.shards import read_shard
from pgolf.errors import EnvironmentBroken, UsageError
from pgolf.files import printable, read_regular, write_atomically

REPOSITORY = "willdepueoai/parameter-golf"
FOLDER = "datasets"
STATE = "fetch.json"
SPARE_BYTES = 1 << 28  # to be left free on the disk
DOCUMENT_BYTES = 4_000  # guess of an average document, for the free space; the contest's have 3,022

Json = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What to fetch."""

    repository: str = REPOSITORY
    folder: str = FOLDER
    """Where in the repository the export is."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    variant: str = "sp1024"
    shards: int = 1
    """How many training shards, the first ones."""
    documents: bool = False
    """Whether to fetch the text of the validation documents as it was before any tokenizer."""


def fetch(wanted: Wanted, out: Path, say: Say) -> Json:
    """Fetch what is not there yet, check it, and return the contents of fetch.json.

    `say` gets a sentence at each stage. Raises UsageError for what does not exist on the hub, EnvironmentBroken,
    keeping what is done, when hub or machine fail.
    """
    made = not out.exists()
    try:
        repository = open_repository(wanted.repository, wanted.revision)
        variant = read_variant(repository, wanted.folder, wanted.variant)
        if wanted.shards > len(variant.train):
            raise UsageError(f"--shards {wanted.shards}: {variant.name} has {len(variant.train)} training shards")
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            return _Fetch(wanted, repository, variant, out, say).run()
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{out}: is not a folder") from None
    except OSError as error:
        raise EnvironmentBroken(
            f"{error.filename or out}: {error.strerror or error}; put that right and run the same command again"
        ) from None
    finally:
        if made:
            with suppress(OSError):  # only a folder that is empty goes
                out.rmdir()


@dataclass(frozen=True)
class _Task:
    """A file to be fetched."""

    file: RemoteFile
    name: str
    lines: int | None = None
    """How many lines of it; None: all."""

    @property
    def size(self) -> int:
        """Bytes, at most."""
        return self.file.size if self.lines is None else min(self.file.size, self.lines * DOCUMENT_BYTES)

    def part(self, out: Path) -> Path:
        """Where it is while it is not whole: another version of the file has another part."""
        return out / f"{self.name}.{self.file.digest[:12]}.part"


class _Fetch:
    """One run; it goes on where the last one ended."""

    def __init__(self, wanted: Wanted, repository: Repository, variant: Variant, out: Path, say: Say) -> None:
        self.repository, self.variant, self.out, self.say = repository, variant, out, say
        self.source = {"repository": repository.name, "folder": wanted.folder, "variant": variant.name}
        self.shards = [_task(file) for file in (*variant.train[: wanted.shards], *variant.val)]
        self.tasks = [_task(variant.tokenizer), *self.shards]
        if wanted.documents:
            if variant.documents is None:
                raise UsageError(f"{repository.name}: has no {DOCUMENTS}; leave out --documents")
            self.tasks.append(_Task(variant.documents, DOCUMENTS, variant.val_documents))
        self.state = _load(out, self.source)

    def run(self) -> Json:
        done: dict[str, Json] = self.state["files"]
        missing = [task for task in self.tasks if not self._is_there(task, done)]
        self._remove_old_parts(missing)
        self._check_space(missing)
        if missing:
            size = sum(task.size for task in missing)
            self.say(
                f"fetching {len(missing)} files, {_shown(size)}, of {self.repository.name} at revision "
                f"{self.repository.revision[:12]}"
            )
            self._get(missing, size)
        else:
            self.say(f"{self.out}: all {len(self.tasks)} files are there")
        for task in missing:  # the validation shards only now
            self._place(task, done)
        self.state |= {"revision": self.repository.revision, "published_shards": len(self.variant.train)}
        self._check()
        self._save()
        return self.state

    def _is_there(self, task: _Task, done: dict[str, Json]) -> bool:
        """Whether a file is whole. Raises EnvironmentBroken when the hub's is another one now."""
        path = self.out / task.name
        if not path.is_file():
            return False
        if task.name in done and path.stat().st_size == done[task.name]["size"]:
            if done[task.name]["digest"] == task.file.digest:
                return True
            own, new = done[task.name]["revision"][:12], self.repository.revision[:12]
            raise EnvironmentBroken(
                f"{path}: is of revision {own}, and at revision {new} the hub has another one; go on with --revision "
                f"{own}, or delete this file to take the new one"
            )
        if task.lines is None and matches(path, task.file):
            self._record(task, done)
            return True
        raise EnvironmentBroken(
            f"{path}: is not the file that {self.repository.name} has; move it away and run the same command again"
        )

    def _remove_old_parts(self, missing: Iterable[_Task]) -> None:
        for task in missing:
            for path in self.out.glob(f"{task.name}.*.part"):
                if path != task.part(self.out):
                    path.unlink()

    def _check_space(self, missing: Iterable[_Task]) -> None:
        have = sum(part.stat().st_size for task in missing if (part := task.part(self.out)).is_file())
        needed = sum(task.size for task in missing) - have
        free = shutil.disk_usage(self.out).free
        if needed > 0 and needed + SPARE_BYTES > free:
            raise EnvironmentBroken(
                f"{self.out}: {_shown(needed)} are to be fetched and {_shown(free)} are free there (at least "
                f"{_shown(SPARE_BYTES)} have to stay free); free space, take another --out or fewer --shards"
            )

    def _get(self, missing: Iterable[_Task], size: int) -> None:
        """Bring all parts to their full size; training shards and tokenizer also get their names."""
        with tqdm(total=size, desc=self.variant.name, unit="B", unit_scale=True, disable=None) as bar:
            for task in missing:
                bar.set_postfix_str(task.name, refresh=False)
                part = task.part(self.out)
                if task.lines is None:
                    download(self.repository, task.file, part, bar.update)
                else:
                    download_lines(self.repository, task.file, part, task.lines, bar.update)
                self._check_part(task, part)
                if task.file not in self.variant.val:
                    self._place(task, self.state["files"])

    def _check_part(self, task: _Task, part: Path) -> None:
        """Raises EnvironmentBroken, and removes the part, when it is no shard or tokenizer of this vocabulary."""
        try:
            if task in self.shards:
                read_shard(part, self.variant.vocab_size)
            elif task.file == self.variant.tokenizer:
                checks.check_tokenizer(part, task.name, self.variant.vocab_size)
        except EnvironmentBroken as error:
            part.unlink()
            what = str(error).removeprefix(f"{part}: ")
            raise EnvironmentBroken(
                f"{self.repository.name}: {printable(task.file.path)} does not belong to {self.variant.name}: {what}"
            ) from None

    def _place(self, task: _Task, done: dict[str, Json]) -> None:
        part = task.part(self.out)
        if not part.is_file():
            return  # it has its name
        if task.name.endswith(".json"):
            write_atomically(self.out / f"{self.variant.name}.model", byte_model())
        self._record(task, done, part)
        part.replace(self.out / task.name)

    def _record(self, task: _Task, done: dict[str, Json], path: Path | None = None) -> None:
        size = (path or self.out / task.name).stat().st_size
        revision = self.repository.revision
        done[task.name] = {"path": task.file.path, "size": size, "digest": task.file.digest, "revision": revision}
        self.state |= {"revision": revision, "validation": None, "overlap": None}
        self._save()

    def _save(self) -> None:
        write_atomically(self.out / STATE, (json.dumps(self.state, indent=1, allow_nan=False) + "\n").encode())

    def _check(self) -> None:
        """Validation text and overlap, as far as they are not known from the last run."""
        dataset = open_dataset(self.out)
        if self.state["validation"] is None:
            self.say("decoding the validation text")
            self.state["validation"] = checks.validation(dataset)
        if self.state["overlap"] is None:
            self.say(f"comparing {len(dataset.train_shards)} training shards with the validation text")
            self.state["train"], self.state["overlap"] = checks.training(dataset)


def _task(file: RemoteFile) -> _Task:
    return _Task(file, PurePosixPath(file.path).name)


def _load(out: Path, source: Json) -> Json:
    """The state of an earlier run. Raises UsageError when the folder is something else's."""
    path = out / STATE
    if (out / INDEX).exists():
        raise UsageError(f"{out}: holds a dataset that was built ({INDEX}); choose another --out")
    if not path.exists():
        return {**source, "revision": None, "files": {}, "validation": None, "overlap": None}
    try:
        state = json.loads(read_regular(path, INDEX_BYTES))
        text = [each[key] for each in state["files"].values() for key in ("digest", "revision")]
        if not all(isinstance(value, str) for value in text) or not isinstance(state["revision"], str):
            raise ValueError
        before = {key: state[key] for key in source}
        state["validation"], state["overlap"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise EnvironmentBroken(f"{path}: is damaged; delete it, and the files are compared with the hub's") from None
    for key, value in source.items():
        if before[key] != value:
            raise UsageError(f"{out}: was fetched with {key} {before[key]!s:.80}, not {value}; choose another --out")
    return dict(state)


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10_000_000 else f"{size / 1e6:.2f} MB"
