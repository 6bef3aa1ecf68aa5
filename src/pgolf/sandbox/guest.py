"""The worker: runs a submission's code inside the sandbox and answers the scorer.

It is started with one JSON argument (see `sandbox.Worker`) and plays one of three roles: `encode` turns texts
into ids, `decode` turns ids into texts, `predict` turns batches of ids into logits. Nothing here is trusted by
the scorer; this is only the honest way to answer it.
"""

import importlib
import json
import os
import resource
import socket
import subprocess
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate
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
        Path("/tmp/null").touch()  # what /dev/null leads to: the host's own could be marked
    channel = Channel(socket.socket(fileno=config["socket"]))
    root = Path(config["root"])
    try:
        play = {"encode": _encode, "decode": _decode, "predict": _predict, "probe": _probe}[config["role"]]
        for name in config["imports"]:
            importlib.import_module(name)
        channel.send(Kind.STARTED)  # what fails up to here is no fault of the submission
        play(channel, root, config)
    except wire.WireError:
        return
    except BaseException as error:
        traceback.print_exc()
        channel.send(Kind.FAILED, _describe(error, root).encode("utf-8", "replace")[: wire.MESSAGE_BYTES])
        while channel.socket.recv(1 << 16):  # what the scorer has still to say, before it hears this
            pass


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


def _describe(error: BaseException, root: Path) -> str:
    """One line: what was raised, and where in the submission's own code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(root))]
    where = f" ({Path(frames[-1].filename).relative_to(root)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _encode(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """Texts to ids."""
    import numpy as np

    encode, _ = _tokenizer(root, config["tokenizer"])
    channel.send(Kind.READY)
    while True:
        texts = wire.decode_texts(channel.receive(Kind.TEXTS, sys.maxsize))
        documents = encode([text.decode() for text in texts])
        channel.send(Kind.TOKENS, wire.encode_tokens([np.array(ids, dtype=np.int32) for ids in documents]))


def _decode(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """Ids to texts."""
    _, decode = _tokenizer(root, config["tokenizer"])
    channel.send(Kind.READY)
    while True:
        documents = wire.decode_tokens(channel.receive(Kind.TOKENS, sys.maxsize))
        texts = decode([ids.tolist() for ids in documents])
        channel.send(Kind.TEXTS, wire.encode_texts([text.encode() for text in texts]))


def _tokenizer(root: Path, member: str) -> tuple[Callable[[list[str]], Any], Callable[[list[list[int]]], Any]]:
    """Functions from texts to ids and back: a SentencePiece model, or a module with `encode` and `decode`."""
    if member.endswith(".py"):
        sys.path.insert(0, str((root / member).parent))
        module = importlib.import_module(Path(member).stem)
        return lambda texts: [module.encode(t) for t in texts], lambda documents: [module.decode(d) for d in documents]
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor(model_file=str(root / member))
    threads = os.cpu_count() or 1
    return partial(processor.encode, num_threads=threads), partial(processor.decode, num_threads=threads)


def _predict(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """`predict.load(root, device)` gives a module from windows to logits, or a streaming predictor."""
    import torch

    sys.path.insert(0, str(root))
    import predict  # type: ignore[import-not-found]

    device = torch.device(config["device"])
    ring = wire.Ring(config["ring"], config["slot_bytes"])
    predictor = predict.load(root, device)
    channel.send(Kind.READY)
    (_answer_rounds if config["streaming"] else _answer_batches)(channel, ring, predictor, device)


def _answer_batches(channel: Channel, ring: Ring, module: Any, device: Any) -> None:
    """Simple form: module(ids (B, T)) -> logits (B, T, V)."""
    import torch

    while True:
        batch = wire.Batch.decode(channel.receive(Kind.BATCH, sys.maxsize))
        ids = torch.from_numpy(batch.ids.astype("int64")).to(device)  # (B, T)
        with torch.inference_mode():
            logits = module(ids)  # (B, T, V)
            if logits.ndim != 3 or logits.shape[:2] != ids.shape:
                raise ValueError(f"logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids.shape)}")
            if (batch.first == batch.first[0]).all():
                rows = logits[:, batch.first[0] : batch.first[0] + batch.count]
            else:
                wanted = torch.from_numpy(batch.first.astype("int64"))[:, None] + torch.arange(batch.count)
                rows = logits[torch.arange(len(ids))[:, None], wanted.to(device)]
            _write(channel, ring, batch.number, batch.slot, rows.flatten(0, 1))


def _answer_rounds(channel: Channel, ring: Ring, predictor: Any, device: Any) -> None:
    """Streaming form: predict(documents) yields logits (R, V), a row a token; update(documents) may learn."""
    import torch

    while True:
        asked = wire.Round.decode(channel.receive(Kind.ROUND, sys.maxsize))
        documents = [torch.from_numpy(ids.astype("int64")).to(device) for ids in asked.documents]
        if asked.wanted == wire.Wanted.UPDATE:
            predictor.update(documents)
            channel.send(Kind.READY)
            continue
        blocks, due = predictor.predict(documents), sum(map(len, documents))
        if asked.wanted == wire.Wanted.LAST:
            blocks, due = _last_rows(blocks, [len(ids) for ids in asked.documents]), len(documents)
        sent = given = 0
        for block in blocks:
            given += len(block)
            if given > due:
                raise ValueError(f"predict gave {given} rows of logits or more where {due} were due")
            most = max(1, ring.slot_bytes // (block.shape[-1] * block.element_size()))
            for rows in block.detach().split(most):
                if sent >= wire.SLOTS:
                    channel.receive(Kind.TAKEN, 0)
                _write(channel, ring, sent, sent % wire.SLOTS, rows)
                sent += 1
        if given < due:
            raise ValueError(f"predict gave {given} rows of logits where {due} were due")
        for _ in range(min(sent, wire.SLOTS)):
            channel.receive(Kind.TAKEN, 0)


def _last_rows(blocks: Iterable[Any], lengths: list[int]) -> Iterator[Any]:
    """Of blocks of rows laid end to end, the rows at the ends of parts of these lengths."""
    ends = [end - 1 for end in accumulate(lengths)]
    done = 0
    for block in blocks:
        inside = [end - done for end in ends if done <= end < done + len(block)]
        done += len(block)
        if inside:
            yield block[inside]


def _write(channel: Channel, ring: Ring, number: int, slot: int, rows: Any) -> None:
    """Put rows (R, V) into a slot and announce them."""
    import torch

    codes = {getattr(torch, dtype.name.lower()): dtype for dtype in wire.Dtype}
    if rows.ndim != 2:
        raise ValueError(f"logits of shape {tuple(rows.shape)} where rows of logits were due")
    if rows.dtype not in codes:
        raise ValueError(f"logits are {rows.dtype}; allowed are float32, float16 and bfloat16")
    memory = ring.slot(slot, rows.numel() * rows.element_size())
    if rows.numel():
        torch.frombuffer(memory, dtype=rows.dtype).view(rows.shape).copy_(rows)
    reply = wire.Rows(number, slot, rows.shape[0], rows.shape[1], codes[rows.dtype])
    channel.send(Kind.ROWS, reply.encode())


if __name__ == "__main__":
    main()
