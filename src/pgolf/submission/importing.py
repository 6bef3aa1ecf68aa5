"""Make an artifact of a submission to the Parameter Golf contest: its script, weights and tokenizer, as they are.

The script is read here and run in the sandbox only. The artifact is in the window form, which is for practice: logits
of whole windows, from the script's own model. It is tried on one window before it is written.
"""

import importlib.metadata
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import artifact, rules
from pgolf.artifact import MANIFEST, Artifact
from pgolf.data.dataset import load_tokenizer
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import check_replaceable, printable, read_regular, write_atomically
from pgolf.sandbox import lock
from pgolf.sandbox.wire import Ids, WireError
from pgolf.score.devices import Runtime
from pgolf.score.likelihood import log_losses
from pgolf.score.predictors import Predictor
from pgolf.submission import script
from pgolf.submission.script import Loader, Script

_TEMPLATE = Path(__file__).parent / "templates" / "predict.py"
_TRAIN = 'raise SystemExit("trained by {name} outside of pgolf, which cannot train it again")\n'
_MEMBERS = {MANIFEST, "predict.py", "train.py", "build.py", "import.json"}


@dataclass(frozen=True)
class Request:
    """What to import, and how."""

    script: Path
    weights: Path
    tokenizer: Path
    out: Path
    env: Mapping[str, str]
    """Environment variables that the script is to find."""
    name: str
    author: str
    track: str
    context: int | None = None
    """None: what the script says it evaluates, or trains, with."""
    stride: int | None = None
    switches: Mapping[str, str] | None = None
    """Attributes of the model and the Python literals to set them to once the weights are loaded."""


@dataclass(frozen=True)
class Imported:
    """An artifact that was written."""

    path: Path
    bytes: int
    vocab_size: int
    context: int
    stride: int
    nats: float
    """Mean log-loss of the window of made-up tokens that it was tried on: finite, and otherwise without meaning."""
    loader: Loader
    stubs: tuple[str, ...]
    """Packages that the script imports and that are not here."""
    evaluations: tuple[str, ...]
    """The script's functions that are not carried over."""


def import_submission(request: Request, runtime: Runtime) -> Imported:
    """Write the artifact. Raises UsageError for files or settings that do not fit each other, Refused when script or
    weights cannot be imported, EnvironmentBroken when this machine cannot try them. Nothing is written then.
    """
    _check_out(request.out)
    data = _read(request.script, script.SOURCE_BYTES)
    read = script.parse(request.script.name, data)
    if unknown := script.unused(request.env, read):
        raise UsageError(f"--env {unknown[0]}: {read.name} reads no environment variable of that name")
    script.check_import(read)
    loader = script.loader(read)
    siblings = _siblings(request.script, read)
    stubs, packages = _packages(read, set(siblings))
    vocab_size, bos = _vocabulary(request.tokenizer)
    manifest = {
        "name": request.name,
        "author": request.author,
        "track": request.track,
        "vocab_size": vocab_size,
        "bos": bos,
        "tokenizer": request.tokenizer.name,
        "form": "window",
        "context": request.context or _context(read, request.env),
        "stride": request.stride,
        "packages": packages,
    }
    settings = {
        "script": read.name,
        "weights": request.weights.name,
        "env": dict(request.env),
        "model": loader.model,
        "stubs": stubs,
        "autocast": "autocast(" in read.source,
    }
    members = {
        MANIFEST: json.dumps(
            {key: value for key, value in manifest.items() if value is not None}, indent=1, allow_nan=False
        ).encode(),
        "predict.py": _TEMPLATE.read_bytes(),
        "train.py": _TRAIN.format(name=read.name.replace('"', "")).encode(),
        "build.py": (loader.source + _switched(loader.model, request.switches or {})).encode(),
        "import.json": json.dumps(settings, indent=1, allow_nan=False).encode(),
    }
    given = {read.name: data, request.weights.name: _read(request.weights, rules.UNPACKED_BYTES)}
    given |= {request.tokenizer.name: _read(request.tokenizer, rules.UNPACKED_BYTES), **siblings}
    if taken := sorted(given.keys() & _MEMBERS) or (["of the files"] if len(given) < 3 + len(siblings) else []):
        raise UsageError(f"{taken[0]}: two members of the artifact would have this name; rename the file")
    found, packed = _packed({**members, **given})
    nats = _try(found, runtime)
    write_atomically(request.out, packed)
    context, stride = found.manifest.context, found.manifest.stride or found.manifest.context
    left = tuple(script.evaluations(read))
    return Imported(request.out, found.size, vocab_size, context, stride, nats, loader, tuple(stubs), left)


def as_json(result: Imported) -> dict[str, Any]:
    """For programs."""
    return {**asdict(result), "path": str(result.path)}


def table(result: Imported) -> str:
    """For people."""
    lines = ", ".join(map(str, result.loader.lines))
    rows = [
        ("artifact", f"{result.path}: {result.bytes:,} bytes"),
        ("windows", f"{result.context:,} tokens, {result.stride:,} new in each; {result.vocab_size:,} pieces"),
        ("model", f"{result.loader.model}, as the statements at lines {lines} make it (build.py in the artifact)"),
    ]
    if result.stubs:
        rows.append(("not here", f"{', '.join(result.stubs)}: imported as a stub"))
    if result.evaluations:
        rows.append(("left out", f"the script's own {', '.join(result.evaluations)}"))
    rows += [
        ("left out", f"{switch}; --set does the same, if the model is evaluated so") for switch in result.loader.skipped
    ]
    return "\n".join(f"{name:<9} {printable(text)}" for name, text in rows)


def _check_out(out: Path) -> None:
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent}: no such folder for the artifact")
    try:
        check_replaceable(out)
    except OSError as error:
        raise UsageError(f"{out}: {error.strerror}") from None


def _read(path: Path, limit: int) -> bytes:
    try:
        return read_regular(path, limit)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _siblings(path: Path, read: Script) -> dict[str, bytes]:
    """Modules beside the script that it imports."""
    names = sorted(f"{name}.py" for name in script.imports(read, everywhere=True))
    return {name: _read(path.parent / name, script.SOURCE_BYTES) for name in names if (path.parent / name).is_file()}


def _packages(read: Script, siblings: set[str]) -> tuple[list[str], list[str]]:
    """Packages to stand in for, since the script needs them to be imported; and those that the sandbox is to have."""
    owners = importlib.metadata.packages_distributions()
    needed = script.imports(read)
    stubs, packages = [], {"numpy", "torch"}
    for name in sorted(script.imports(read, everywhere=True) - {"__future__", "numpy", "torch"}):
        if name in sys.stdlib_module_names or f"{name}.py" in siblings:
            continue
        if name in owners and importlib.util.find_spec(name):
            packages.add(owners[name][0])
        elif name in needed:
            stubs.append(name)
    return stubs, sorted(packages)


def _vocabulary(tokenizer: Path) -> tuple[int, int]:
    """Number of pieces of a SentencePiece model, and its BOS."""
    if tokenizer.suffix != ".model":
        raise UsageError(f"{tokenizer}: is no SentencePiece model (.model), which the contest's scripts read")
    try:
        processor = load_tokenizer(tokenizer)
    except EnvironmentBroken as error:
        raise UsageError(str(error)) from None
    if processor.bos_id() < 0:
        raise UsageError(f"{tokenizer}: has no BOS piece, which begins each of the contest's documents")
    return int(processor.vocab_size()), int(processor.bos_id())


def _context(read: Script, env: Mapping[str, str]) -> int:
    for name in ("EVAL_SEQ_LEN", "TRAIN_SEQ_LEN"):
        if found := script.setting(read, name, env):
            return found
    raise UsageError(f"{read.name} reads neither EVAL_SEQ_LEN nor TRAIN_SEQ_LEN; say --context N")


def _switched(model: str, switches: Mapping[str, str]) -> str:
    return "".join(f"{model}.{name} = {value}\n" for name, value in switches.items())


def _packed(members: Mapping[str, bytes]) -> tuple[Artifact, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact.zst"
        artifact.pack(members, path, rules.ARTIFACT_BYTES)
        return artifact.read(path, rules.ARTIFACT_BYTES), path.read_bytes()


def _try(found: Artifact, runtime: Runtime) -> float:
    """Load the model and let it see one window; the mean log-loss of its made-up tokens in nats."""
    manifest = found.manifest
    ids = made_up(manifest.vocab_size, manifest.bos, manifest.context)
    with lock.hold(), Predictor(found, 0, runtime) as predictor:
        predictor.set_deadline(time.monotonic() + rules.track(manifest.track).eval_seconds)
        try:
            predictor.load()
            predictor.submit_windows(ids[None, :-1], 0)
            logits = predictor.receive(manifest.context)
        except TimeoutError:
            raise Refused("the model does not compute one window within the track's time for evaluation") from None
        except Refused as error:
            raise _explained(error, manifest.vocab_size) from None
        except WireError as error:
            raise Refused(f"the script broke the wire protocol: {error}") from None
        return float(log_losses(logits, ids, np.arange(1, manifest.context + 1)).mean())


def made_up(vocab_size: int, bos: int, context: int) -> Ids:
    """The tokens (context + 1,) that a model is tried on: BOS and random ones, always the same."""
    ids = np.random.default_rng(0).integers(0, vocab_size, context + 1).astype(np.int32)
    ids[0] = bos
    return ids


def _explained(error: Refused, vocab_size: int) -> Exception:
    """A vocabulary that does not fit is a wrong argument; the rest is the submission's."""
    words = str(error).removeprefix("step 0: ")
    if match := re.match(r"logits of shape \(\d+, (\d+)\) where", words):
        return UsageError(
            f"the tokenizer has {vocab_size:,} pieces and the model {int(match[1]):,}; give the tokenizer that the "
            "model was trained with, and its --env VOCAB_SIZE"
        )
    if match := re.search(r"size mismatch for ([\w.]+)", words):
        return UsageError(
            f"the weights do not fit the model that the script makes ({printable(match[1])} differs in size); give the "
            "settings of the training as --env NAME=VALUE"
        )
    return Refused(words)
