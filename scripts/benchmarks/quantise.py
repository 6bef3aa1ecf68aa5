"""What coarser weights cost: those of a trained artifact, taken as exact, rounded to fewer and fewer bits each.

What baselines/golf does is measured one by one: rounding to the nearest or by GPTQ, and rows in steps of their spread
or, balanced, of what they matter; training tokens of the dataset show that. The cost is that of the dataset's first
validation tokens, in non-overlapping windows. Runs the artifact's code without a sandbox: for your own.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf import rules
from pgolf.artifact import read
from pgolf.data.dataset import Dataset, open_dataset
from pgolf.data.shards import Shard, count_tokens, first_tokens
from pgolf.errors import UsageError
from pgolf.submission.modules import loaded, unpacked

GOLF = Path(__file__).parents[2] / "baselines" / "golf"
CALIBRATION = 131_072  # training tokens, as in the trainer


@torch.no_grad()
def bench_quantise(args: argparse.Namespace) -> None:
    """Print a row for each number of bits."""
    data, artifact = open_dataset(args.data), read(args.artifact, rules.ARTIFACT_BYTES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with unpacked(artifact.members) as folder, loaded(folder) as own:
        model = own.predict.load_model(folder, device)
    with loaded(GOLF, names=("coder", "quant")) as golf:
        coder, quant = golf.coder, golf.quant
    context = model.config.context
    if args.tokens < context or not data.train_shards:
        raise UsageError(f"this needs training shards and --tokens of at least a context, {context}")
    training = tokens_of(data, data.train_shards, CALIBRATION)
    text = tokens_of(data, data.val_shards, args.tokens + 1)
    exact, measured = nats_per_token(model, text, context, device), {}
    stream = count_tokens(data.val_shards)
    bits_per_byte = stream / data.canonical_text().bytes / math.log(2)  # for each nat per token
    weights = {name: t.clone() for name, t in model.state_dict().items() if name.endswith("weight")}
    count = sum(map(Tensor.numel, weights.values()))
    print(f"{count:,} weights; {exact:.5f} nats per token over {args.tokens:,} tokens", flush=True)
    parts = training[: len(training) // context * context].view(-1, context).to(device).split(max(1, 8192 // context))
    model.requires_grad_(True)
    inverses, sensitivity = quant.calibrate(model, model, parts)
    ways: dict[str, tuple[Any, ...]] = {
        "rounded": ({}, None),
        "GPTQ": (inverses, None),
        "rounded, balanced": ({}, quant.row_steps(weights, {}, sensitivity)),
        "GPTQ, balanced": (inverses, quant.row_steps(weights, inverses, sensitivity)),
    }
    print("| bits per weight |", " | ".join(ways), "|\n|", "--- | " * (1 + len(ways)))
    for bits in args.bits:
        for way, (used, rows) in ways.items():
            dump = lambda step, c=used, r=rows: coder.dumps({}, quant.quantize(weights, c, step, r), {})  # noqa: E731
            try:
                packed, _ = quant.fit(dump, round(count * bits / 8), count)
            except ValueError as error:
                raise UsageError(f"--bits {bits:g}: {count:,} weights {error}") from None
            coded = coder.parse(packed)[1]
            model.load_state_dict({n: torch.from_numpy(c.weights()) for n, c in coded.items()}, strict=False)
            measured[way] = (nats_per_token(model, text, context, device) - exact) * bits_per_byte
        model.load_state_dict(weights, strict=False)
        print(f"| {bits:g} |", " | ".join(f"{measured[way]:+.4f}" for way in ways), "|", flush=True)


def tokens_of(data: Dataset, shards: Sequence[Shard], count: int) -> Tensor:
    """The first `count` tokens of the shards."""
    return torch.from_numpy(first_tokens(shards, data.vocab_size, count).astype(np.int64))


def nats_per_token(model: nn.Module, tokens: Tensor, context: int, device: torch.device) -> float:
    """Mean loss over tokens (N,), in non-overlapping windows of `context`."""
    count = (len(tokens) - 1) // context * context
    ids, targets = (tokens[i : i + count].view(-1, context).to(device) for i in (0, 1))
    batch = max(1, 8192 // context)
    pairs = zip(ids.split(batch), targets.split(batch), strict=True)
    return sum(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item() for x, y in pairs) / count
