"""What a trainer gains by work before the clock: text that is installed, or text and weights that its source carries.

Each line trains the naive baseline for the laptop track's number of steps on the dataset, after half as many on other
text or from coarse weights; the loss is that of the dataset's first validation tokens. Steps are counted and not
timed, so the figures do not depend on the machine.
"""

import argparse
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf.data.dataset import load_tokenizer, open_dataset
from pgolf.data.shards import first_tokens
from pgolf.sandbox import environment
from pgolf.submission.modules import loaded
from pgolf.train import optim

NAIVE = Path(__file__).parents[2] / "baselines" / "naive"
VALIDATION = 100_000  # tokens
DOCSTRINGS = 4_000_000  # characters: more than half the steps take
CARRIED = 0.18  # part of the training tokens that source carries as packed text: 0.45 MB in 200 kB
DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The steps of the laptop track by default."""
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=231)
    parser.add_argument("--batch_tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)


def bench_early(args: argparse.Namespace) -> None:
    """Print a row for each kind of early work."""
    data = open_dataset(args.data)
    processor = load_tokenizer(data.tokenizer)
    with loaded(NAIVE, names=("train", "model", "quant")) as naive:
        s = replace(naive.train.LAPTOP, vocab_size=data.vocab_size, batch_tokens=args.batch_tokens)
        train = first_tokens(data.train_shards, data.vocab_size, 10**8)
        held = first_tokens(data.val_shards, data.vocab_size, VALIDATION)
        cut = int((1 - CARRIED) * len(train))
        train, carried = train[:cut], train[cut:]
        text = installed_text()
        print(f"installed text: {len(text.encode()) / 1e6:.1f} MB", flush=True)
        pieces = text.split("\n\n")
        random.Random(0).shuffle(pieces)
        docs = np.array(processor.encode("\n\n".join(pieces)[:DOCSTRINGS]), dtype=np.uint16)
        bits = bits_a_byte(processor, held)

        def trained(model: Any, tokens: Any, steps: int) -> Any:
            run = argparse.Namespace(settings=s, model=model, forward=model, orthogonalize=optim.orthogonalize)
            trainer, feed = naive.train.Trainer(run), batches(tokens, s)
            for step in range(steps):
                trainer.step(step, steps - step, step / steps, *next(feed))
            return model

        def fresh() -> Any:
            torch.manual_seed(args.seed)
            model = naive.model.GPT(naive.model.GPTConfig(**{f: getattr(s, f) for f in fields(naive)}))
            model.dtype = torch.float32
            return model

        def show(name: str, model: Any) -> float:
            loss = validation(model, held, s.context) * bits
            print(f"{name:40} {loss:.4f} bpb", flush=True)
            return loss

        half = args.steps // 2
        honest = show("nothing early", trained(fresh(), train, args.steps))
        for name, tokens in (("text that is installed", docs), ("0.45 MB of text in source", carried)):
            loss = show(name, trained(trained(fresh(), tokens, half), train, args.steps))
            print(f"{'':40} {honest - loss:+.4f} gained")
        model = trained(fresh(), train, 3 * args.steps)
        show("three times the steps", model)
        kept = coarse(model)
        show(f"  rounded to {kept / 8000:.0f} kB", model)
        loss = show("  and trained as above", trained(model, train, args.steps))
        print(f"{'':40} {honest - loss:+.4f} gained")


def fields(naive: Any) -> list[str]:
    return list(naive.model.GPTConfig.__dataclass_fields__)


def installed_text() -> str:
    """The docstrings of all modules that a trainer's sandbox holds."""
    files = environment.listing("train").files
    texts = (path.read_text(errors="replace") for path in files if path.suffix == ".py")
    return "\n".join(found for text in texts for found in DOCSTRING.findall(text) if len(found) > 80)


def batches(tokens: Any, s: Any) -> Any:
    """Ids and targets (B, T) in order, from the start again when they are used up."""
    at, need = 0, s.batch_tokens + 1
    while True:
        at = 0 if at + need > len(tokens) else at
        span = torch.from_numpy(tokens[at : at + need].astype(np.int64))
        yield span[:-1].view(-1, s.context), span[1:].view(-1, s.context)
        at += s.batch_tokens


@torch.no_grad()
def validation(model: Any, held: Any, context: int) -> float:
    """Mean loss in nats per token."""
    ids = torch.from_numpy(held.astype(np.int64))
    count = (len(ids) - 1) // context
    inputs, targets = ids[: count * context].view(-1, context), ids[1 : count * context + 1].view(-1, context)
    losses = [float(model(*pair)) for pair in zip(inputs.split(16), targets.split(16), strict=True)]
    return float(np.mean(losses))


def bits_a_byte(processor: Any, held: Any) -> float:
    """Bits per byte for each nat per token."""
    return len(held) / len(processor.decode(held.tolist()).encode()) / math.log(2)


@torch.no_grad()
def coarse(model: Any) -> float:
    """Round matrices to three values a row and tables to seven, in place; returns their entropy in bits."""
    total = 0.0
    for parameter in model.parameters():
        if parameter.ndim == 2:
            most = 3 if parameter is model.embed.weight else 1
            step = parameter.abs().mean(1, keepdim=True) * (1.0 if most == 3 else 1.4)
            codes = (parameter / step).round().clamp(-most, most)
            rates = torch.bincount((codes + most).long().flatten()).double() / codes.numel()
            total += float(-(rates[rates > 0] * rates[rates > 0].log2()).sum()) * codes.numel()
            parameter.copy_(codes * step)
            total += 16 * len(codes)
        else:
            total += 16 * parameter.numel()
    return total
