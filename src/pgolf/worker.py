"""The worker: runs a submission's code inside the sandbox and answers the scorer.

It is started with one JSON argument (see `sandbox.Worker`) and plays one of three roles: `encode` turns texts
into ids, `decode` turns ids into texts, `predict` turns batches of ids into logits. Nothing here is trusted by
the scorer; this is only the honest way to answer it.
"""

import json
import os
import resource
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

from pgolf import wire
from pgolf.wire import Channel, Kind


def main() -> None:
    """Play the role that the first argument describes until the scorer hangs up."""
    config = json.loads(sys.argv[1])
    for limit, value in config["limits"].items():
        resource.setrlimit(getattr(resource, limit), (value, value))
    channel = Channel(socket.socket(fileno=config["socket"]))
    root = Path(config["root"])
    try:
        {"encode": _encode, "decode": _decode, "predict": _predict}[config["role"]](channel, root, config)
    except wire.WireError:
        return
    except BaseException as error:
        traceback.print_exc()
        channel.send(Kind.FAILED, _describe(error, root).encode("utf-8", "replace")[: wire.MESSAGE_BYTES])


def _describe(error: BaseException, root: Path) -> str:
    """One line: what was raised, and where in the submission's own code."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(root))]
    where = f" ({Path(frames[-1].filename).relative_to(root)}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


def _encode(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """SentencePiece: texts to ids."""
    import numpy as np
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor(model_file=str(root / config["tokenizer"]))
    threads = os.cpu_count() or 1
    channel.send(Kind.READY)
    while True:
        texts = wire.decode_texts(channel.receive(Kind.TEXTS, sys.maxsize))
        documents = processor.encode([text.decode() for text in texts], num_threads=threads)
        channel.send(Kind.TOKENS, wire.encode_tokens([np.array(ids, dtype=np.int32) for ids in documents]))


def _decode(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """SentencePiece: ids to texts."""
    import sentencepiece as spm

    processor = spm.SentencePieceProcessor(model_file=str(root / config["tokenizer"]))
    threads = os.cpu_count() or 1
    channel.send(Kind.READY)
    while True:
        documents = wire.decode_tokens(channel.receive(Kind.TOKENS, sys.maxsize))
        texts = processor.decode([ids.tolist() for ids in documents], num_threads=threads)
        channel.send(Kind.TEXTS, wire.encode_texts([text.encode() for text in texts]))


def _predict(channel: Channel, root: Path, config: dict[str, Any]) -> None:
    """The simple form: `predict.load(root, device)` gives a module from ids (B, T) to logits (B, T, V)."""
    import torch

    sys.path.insert(0, str(root))
    import predict  # type: ignore[import-not-found]

    device = torch.device(config["device"])
    ring = wire.Ring(config["ring"], config["slot_bytes"])
    codes = {getattr(torch, dtype.name.lower()): dtype for dtype in wire.Dtype}
    module = predict.load(root, device)
    channel.send(Kind.READY)
    while True:
        batch = wire.Batch.decode(channel.receive(Kind.BATCH, sys.maxsize))
        ids = torch.from_numpy(batch.ids.astype("int64")).to(device)  # (B, T)
        with torch.inference_mode():
            logits = module(ids)  # (B, T, V)
            if logits.ndim != 3 or logits.shape[:2] != ids.shape:
                raise ValueError(f"logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids.shape)}")
            if logits.dtype not in codes:
                raise ValueError(f"logits are {logits.dtype}; allowed are float32, float16 and bfloat16")
            rows = logits[:, batch.first :]  # (B, R, V)
            slot = ring.slot(batch.slot, rows.numel() * rows.element_size())
            torch.frombuffer(slot, dtype=rows.dtype).view(rows.shape).copy_(rows)
        b, r, width = rows.shape
        reply = wire.Rows(batch.number, batch.slot, b * r, width, codes[logits.dtype])
        channel.send(Kind.ROWS, reply.encode())


if __name__ == "__main__":
    main()
