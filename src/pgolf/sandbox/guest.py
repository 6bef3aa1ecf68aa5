"""The guest: runs a submission's code inside the sandbox and submits its results.

It is started with one JSON argument (see `box.Worker`) and plays one role: `encode` turns texts into ids, `decode`
turns ids into texts, `predict` turns tokens into logits, `train` runs a train.py. The harness trusts nothing here.
"""

import importlib
import io
import itertools
import json
import os
import resource
import socket
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgolf.sandbox import wire
from pgolf.sandbox.wire import Channel, Kind, Ring


def main() -> None:
    """Play the role that the first argument describes until the scorer hangs up."""
    config = json.loads(sys.argv[1])
    for limit, value in config["limits"].items():
        _, hard = resource.getrlimit(getattr(resource, limit))
        least = min((each for each in (value, hard) if each != resource.RLIM_INFINITY), default=resource.RLIM_INFINITY)
        resource.setrlimit(getattr(resource, limit), (least, least))
    if config["isolated"]:
        Path("/tmp/null").touch()  # target of /dev/null: a sandbox could leave a mark on the host's
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the end of a worker is a kill, and what it buffers is lost
    channel = Channel(socket.socket(fileno=config["socket"]))
    root = Path(config["root"])
    roles = {"encode": _encode, "decode": _decode, "predict": _predict, "probe": _probe, "train": _train}
    try:
        for name in config["imports"]:
            importlib.import_module(name)
        if config["role"] == "predict" and config["device"] == "cuda":
            importlib.import_module("torch").cuda.init()
        channel.send(Kind.STARTED)  # failures up to here are the machine's, not the submission's
        roles[config["role"]](channel, root, config)
    except wire.WireError:
        return
    except BaseException as error:
        traceback.print_exc()
        channel.send(Kind.FAILED, _describe(error, root).encode("utf-8", "replace")[: wire.MESSAGE_BYTES])
        channel.socket.shutdown(socket.SHUT_WR)  # ends the wait for the rest of a frame that was begun
        while channel.socket.recv(1 << 16):  # read what the scorer is still sending, so that it can receive the failure
            pass


def _describe(error: BaseException, root: Path) -> str:
    """One line: what was raised, and where in the submission's code if it came from there, not from a check here."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(root))]
    where = f" ({Path(frames[-1].filename).relative_to(root)}, line {frames[-1].lineno})" if frames else ""
    whose = "your code raised " if frames or isinstance(error, SyntaxError) else ""
    return f"{whose}{type(error).__name__}: {error}{where}"


def _probe(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """Try what a predictor needs: the files, room in /tmp, the device."""
    import torch

    (Path("/tmp") / "probe").write_bytes((root / "probe").read_bytes())
    torch.ones(2, 2, device=config["device"]).sum().item()
    if config.get("compile"):
        Path("/tmp/probe.cpp").write_text("#include <Python.h>\n#include <omp.h>\n#include <vector>\n")
        include, source = f"-I{sysconfig.get_path('include')}", "/tmp/probe.cpp"
        command = ["g++", "-fopenmp", "-shared", "-fPIC", include, source, "-o", "/tmp/probe.so"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"g++ fails: {done.stderr.strip().splitlines()[0]}")
    channel.send(Kind.READY)
    while channel.socket.recv(1 << 16):
        pass


def _train(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """Run train.py in one or several processes, with torchrun's variables; the first one talks to the harness."""
    world = config["processes"]
    command = [sys.executable, "train.py", "--data", config["data"], *config["arguments"]]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([*config["harness"], *config["packages"]])}
    if config["eager"]:
        variables["TORCH_COMPILE_DISABLE"] = "1"
    if world > 1:
        variables |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_MASTER_PORT)}
        variables |= {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // world))}
    ranks = []
    for rank in range(world):
        own = {"PGOLF_HARNESS": str(config["socket"])} if rank == 0 else {}
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        shared = [config["socket"]] if rank == 0 else []
        ranks.append(subprocess.Popen(command, cwd=root, env={**variables, **own}, pass_fds=shared))
    statuses = iter(lambda: os.waitstatus_to_exitcode(os.wait()[1]), None)
    status = next((status for status in itertools.islice(statuses, world) if status), 0)
    for process in ranks:
        process.kill()
    hint = {0: "; it has to send it", 2: "; does it accept the flags of a re-run?"}.get(status, "")
    where = " (docs/artifact.md, training again)" if hint else ""
    raise ChildProcessError(f"train.py ended with exit status {status} before it handed over an artifact{hint}{where}")


def _encode(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """Texts to ids."""
    import numpy as np

    encode, _ = _tokenizer(root, config["tokenizer"])
    apply = _transform(config["transform"])[0]
    channel.send(Kind.READY)
    while True:
        texts = wire.decode_texts(channel.receive(Kind.TEXTS, sys.maxsize))
        documents = encode([apply(text.decode()) for text in texts])
        channel.send(Kind.TOKENS, wire.encode_tokens([np.array(ids, dtype=np.int32) for ids in documents]))


def _decode(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """Ids to texts."""
    _, decode = _tokenizer(root, config["tokenizer"])
    invert = _transform(config["transform"])[1]
    channel.send(Kind.READY)
    while True:
        documents = wire.decode_tokens(channel.receive(Kind.TOKENS, sys.maxsize))
        texts = decode([ids.tolist() for ids in documents])
        channel.send(Kind.TEXTS, wire.encode_texts([invert(text).encode() for text in texts]))


def _transform(name: str | None) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """The harness's reversible transform of that name and its inverse."""
    if name is None:
        return str, str
    from pgolf.data.transforms import TRANSFORMS

    return TRANSFORMS[name].apply, TRANSFORMS[name].invert


_MASTER_PORT = 29_500  # nobody else is in this network

Encode = Callable[[list[str]], list[Any]]
Decode = Callable[[list[list[int]]], list[str]]


def _tokenizer(root: Path, member: str) -> tuple[Encode, Decode]:
    """Functions from texts to ids and back, by the kind of file that describes the tokenizer."""
    if member == "bytes":
        return lambda texts: [list(t.encode()) for t in texts], lambda documents: [bytes(d).decode() for d in documents]
    if member.endswith(".py"):
        sys.path.insert(0, str((root / member).parent))
        module = importlib.import_module(Path(member).stem)
        return lambda texts: [module.encode(t) for t in texts], lambda documents: [module.decode(d) for d in documents]
    if member.endswith(".json"):
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(root / member))
        return (
            lambda texts: [encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)],
            lambda documents: fast.decode_batch(documents, skip_special_tokens=False),
        )
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor(model_file=str(root / member))
    threads = os.cpu_count() or 1
    return (
        lambda texts: processor.encode(texts, num_threads=threads),
        lambda documents: processor.decode(documents, num_threads=threads),
    )


def _predict(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """Step form: load(root, device, lanes, count) -> Predictor; window form: load(root, device) -> module."""
    import torch

    sys.path.insert(0, str(root))
    device = torch.device(config["device"])
    ring = Ring(config["ring"], config["slot_bytes"])
    if device.type == "cuda":
        ring.pin()
    import predict  # type: ignore[import-not-found]

    if config["form"] == "window":
        module = predict.load(root, device)
        channel.send(Kind.READY)
        _serve_windows(channel, ring, module, device)
    predictor = predict.load(root, device, config["lanes"], config["count"])
    plan = int(getattr(predictor, "plan", 0))
    if not 0 <= plan < 1 << 8 * wire.PLAN_BYTES:
        raise ValueError(f"the plan is {plan}; it has to be a number of at most {8 * wire.PLAN_BYTES} bits")
    channel.send(Kind.READY, plan.to_bytes(wire.PLAN_BYTES, "little"))
    plan = int.from_bytes(channel.receive(Kind.PLAN, wire.PLAN_BYTES), "little")
    if hasattr(predictor, "plan"):
        predictor.plan = plan
    _serve_steps(channel, ring, predictor, device)


def _serve_steps(channel: Channel, ring: Ring, predictor: Any, device: Any) -> None:
    """Step form: predictor.step(ids (B,), lane (B,)) -> logits (B, V) of the token after each."""
    import torch

    while True:
        step = wire.Step.decode(channel.receive(Kind.STEP, sys.maxsize))
        ids, lane = (torch.from_numpy(numbers.astype("int64")).to(device) for numbers in (step.ids, step.lane))
        logits = predictor.step(ids, lane)
        if logits.ndim != 2 or len(logits) != len(ids):
            raise ValueError(f"step gave logits of shape {tuple(logits.shape)} for {len(ids)} lanes")
        _submit(channel, ring, step.number, logits)


def _serve_windows(channel: Channel, ring: Ring, module: Any, device: Any) -> None:
    """Window form: module(ids (B, T)) -> logits (B, T, V)."""
    import torch

    while True:
        batch = wire.WindowBatch.decode(channel.receive(Kind.WINDOWS, sys.maxsize))
        ids = torch.from_numpy(batch.ids.astype("int64")).to(device)  # (B, T)
        with torch.inference_mode():
            logits = module(ids)  # (B, T, V)
            if logits.ndim != 3 or logits.shape[:2] != ids.shape:
                raise ValueError(f"logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids.shape)}")
            _submit(channel, ring, batch.number, logits[:, batch.first : batch.first + batch.count].flatten(0, 1))


def _submit(channel: Channel, ring: Ring, number: int, logits: Any) -> None:
    """Put logits (R, V) into their slot and announce them."""
    import torch

    codes = {torch.float32: wire.Dtype.FLOAT32, torch.float16: wire.Dtype.FLOAT16, torch.bfloat16: wire.Dtype.BFLOAT16}
    if logits.dtype not in codes:
        raise ValueError(f"logits are {logits.dtype}; allowed are float32, float16 and bfloat16")
    memory = ring.slot(number % wire.SLOTS, logits.numel() * logits.element_size())
    if logits.numel():
        torch.frombuffer(memory, dtype=logits.dtype).view(logits.shape).copy_(logits.detach())
    channel.send(Kind.LOGITS, wire.Logits(number, len(logits), logits.shape[1], codes[logits.dtype]).encode())


if __name__ == "__main__":
    main()
