"""Import scripts of the contest's record folders: the table in docs/from-parameter-golf.md.

    python scripts/benchmarks/contest_records.py CLONE --tokenizers DIR [--only PART ...]

CLONE is a checkout of the contest's repository. The weights of its records are not in it, so each script makes a model
of random weights, smaller than its own, and saves it with its own quantiser. That is imported as `pgolf import` does,
and the log-loss of one window compared with what the script's own forward gives. Runs the scripts without a sandbox, in
children of this process: for a repository that you trust.
"""

import argparse
import ast
import json
import multiprocessing
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf.artifact import Artifact
from pgolf.errors import PgolfError, Refused
from pgolf.score.devices import Runtime
from pgolf.score.likelihood import log_losses
from pgolf.submission import importing, script
from pgolf.submission.modules import loaded, unpacked
from pgolf.submission.script import Script, _Slicer

CONTEXT = 128
SMALL = {"MODEL_DIM": "128", "NUM_HEADS": "4", "NUM_KV_HEADS": "2", "TRAIN_SEQ_LEN": "128", "EVAL_SEQ_LEN": "128"}
SMALL |= {"EMBEDDING_DIM": "128", "COMPRESSOR": "brotli"}
TEMPLATES = Path(importing.__file__).parent / "templates"


class Eyes(dict[str, torch.Tensor]):
    """Hessians of calibration that knows nothing: the identity for each weight."""

    def __init__(self, model: torch.nn.Module, module: Any) -> None:
        state = model.state_dict()
        if hasattr(module, "_unbank_state_dict"):
            state = module._unbank_state_dict(state, module.Hyperparameters().num_layers)
        super().__init__({name: torch.eye(t.shape[1]) for name, t in state.items() if t.ndim == 2})


def randomise(model: torch.nn.Module) -> None:
    """Matrices whose products are about as large as what goes in, so that every layer counts."""
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)


def save(read: Script, module: Any) -> None:
    """Make a model of random weights and let the script's quantiser write it to the working directory."""
    if hasattr(module, "serialize") and hasattr(module, "deserialize"):
        h = module.Hyperparameters()
        model = module.GPT(h).to("cpu").bfloat16()
        module.restore_fp32_params(model)
        randomise(model)
        module._logger_hparams = h
        module._compressed_code_size = lambda code: (0, 0)  # of some, with a program to shorten the code
        module.collect_hessians = lambda *args, **kwargs: Eyes(model, module)
        for name in ("ShuffledSequenceLoader", "DistributedTokenLoader"):
            setattr(module, name, lambda *args, **kwargs: None)
        module.serialize(h, model, "")
        return
    slicer = _Slicer(read)
    for function in slicer.functions.values():
        paths = [p for p in script._paths(function.body, _writes) if len(p.blocks) < 5]
        if paths:
            break
    else:
        raise Refused("its quantiser is not found")
    target = paths[-1]
    writes = [s for s in target.blocks[-1][: target.indices[-1] + 1] if ast.unparse(s).startswith("f.write(")]
    needed = {name for write in writes for name in script._loads(write)} - {"f"}
    statements = [*slicer._before(function, target, needed), _file(writes)]
    names = dict(vars(module))
    for statement in statements:
        code = ast.fix_missing_locations(ast.Module([statement], []))
        exec(compile(code, read.name, "exec"), names)
        if (model := names.get("base_model")) is not None and not hasattr(model, "_random"):
            model._random = True
            randomise(model)


def _writes(node: ast.stmt) -> bool:
    text = ast.unparse(node)
    return text.startswith("f.write(") and ("blob" in text or "compressed" in text)


def _file(writes: list[ast.stmt]) -> ast.stmt:
    file = ast.parse("with open('weights.ptz', 'wb') as f:\n    pass").body[0]
    assert isinstance(file, ast.With)
    file.body = writes
    return file


def own_loss(path: Path, env: Mapping[str, str], vocab: int, folder: Path) -> float:
    """Save random weights, load them as the script does, and compute its own loss of one window."""
    os.chdir(folder)
    Path("logs").mkdir()  # where scripts expect it
    torch.manual_seed(0)
    with loaded(TEMPLATES) as modules:
        predict, device = modules.predict, torch.device("cpu")
        read = script.parse(path.name, path.read_bytes())
        os.environ.update(env)
        sys.meta_path.append(predict.Stubs(importing._packages(read, set())[0]))
        predict.stand_in(device)
        module = predict.imported(path, folder / "weights.ptz", device)
        predict.Stub.importing = False
        save(read, module)
        written = max((f for f in folder.iterdir() if f.suffix == ".ptz"), key=lambda f: f.stat().st_mtime)
        written.rename(folder / "weights.ptz")
        loader = script.loader(read)
        predict.only_tensors(folder / "weights.ptz")
        code = compile(loader.source, "build.py", "exec")
        names = predict.space(code, module)
        exec(code, names)
        model = names[loader.model].eval()
        ids = torch.from_numpy(importing.made_up(vocab, 1, CONTEXT)[None].astype(np.int64))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled="autocast(" in read.source):
            options = {"reduction": "none"} if "reduction" in signature(model.forward).parameters else {}
            return float(model(ids[:, :-1], ids[:, 1:], **options).mean())  # its mean may hold more than log-loss


def tried(found: Artifact, runtime: Runtime) -> float:
    """What `pgolf import` tries, in a forked process: a new Python takes longer than all else here."""
    manifest = found.manifest
    ids = importing.made_up(manifest.vocab_size, manifest.bos, manifest.context)

    def loss() -> float:
        with unpacked(found.members) as root, loaded(root) as modules, torch.inference_mode():
            module = modules.predict.load(root, torch.device("cpu"))
            logits = module(torch.from_numpy(ids[None, :-1].astype(np.int64)))[0]
            if logits.shape[1] != manifest.vocab_size:
                raise Refused(f"logits of width {logits.shape[1]:,} for {manifest.vocab_size:,} pieces")
            return float(log_losses(logits, ids, np.arange(1, len(ids))).mean())

    return forked(loss)


def forked(function: Callable[[], float]) -> float:
    """The result of a function that runs in a child. Raises Refused with what it raised."""
    ours, theirs = multiprocessing.Pipe()

    def run() -> None:
        torch.set_num_threads(1)
        try:
            with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
                result: float | str = function()
        except BaseException as error:
            result = f"{type(error).__name__}: {error}"[:400]
        theirs.send(result)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    while process.is_alive() and not ours.poll(1):
        pass
    result = ours.recv() if ours.poll() else f"ended with {process.exitcode}"
    process.join()
    if isinstance(result, str):
        raise Refused(result)
    return float(result)


def record(path: Path, tokenizers: Path) -> dict[str, Any]:
    """Import one script; what came of it."""
    row: dict[str, Any] = {"script": f"{path.parent.name}/{path.name}"}
    try:
        read = script.parse(path.name, path.read_bytes())
        vocab = script.setting(read, "VOCAB_SIZE", {}) or 1024
        env = {name: value for name, value in SMALL.items() if script.names(read, name)}
        tokenizer = tokenizers / f"fineweb_{vocab}_bpe.model"
        if not tokenizer.is_file():
            raise Refused(f"no SentencePiece model of {vocab:,} pieces: its tokens are bytes or of another tokenizer")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            weights = folder / "weights.ptz"
            try:
                row["own"] = forked(lambda: own_loss(path, env, vocab, folder))
            except Refused as error:
                row["no loss of its own"] = str(error)
            if not weights.exists():
                weights.write_bytes(zlib.compress(b"none"))
            title = path.parent.name[:90]
            request = importing.Request(
                path, weights, tokenizer, folder / "a.zst", env, title, "contest", "main", CONTEXT
            )
            done = importing.import_submission(request, Runtime("cpu", isolated=False))
            row |= {"imported": done.nats, "bytes": done.bytes, "stubs": done.stubs, "skipped": done.loader.skipped}
            row |= {"evaluations": done.evaluations}
    except PgolfError as error:
        row["refused"] = str(error)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--tokenizers", type=Path, required=True, help="folder with fineweb_<pieces>_bpe.model")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="only scripts with this in their path")
    parser.add_argument("--jobs", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    paths = [p for p in sorted(args.clone.glob("records/*/*/train*.py")) if any(part in str(p) for part in args.only)]
    importing._try = tried
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
        for row in pool.map(record, paths, [args.tokenizers] * len(paths)):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
