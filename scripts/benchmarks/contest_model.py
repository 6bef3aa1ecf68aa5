"""Make an artifact of a model that the contest's own script trained (final_model.int8.ptz), to score or study it here.

The shape is read from the weights, which are coded anew as baselines/naive does it: 8 bits and more for each.
"""

import argparse
import io
import sys
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf import rules
from pgolf.artifact import code_in, pack
from pgolf.data.dataset import open_dataset
from pgolf.errors import EnvironmentBroken, PgolfError, UsageError
from pgolf.submission.modules import loaded
from pgolf.train import loop

NAIVE = Path(__file__).parents[2] / "baselines" / "naive"
NAMES = {
    "tok_emb": "embed",
    "skip_weights": "skip",
    "resid_mix": "mix",
    "attn.proj": "attn.out",
    "mlp.proj": "mlp.down",
}
NAMES |= {"mlp.fc": "mlp.up", "c_q": "query", "c_k": "key", "c_v": "value", "q_gain": "gain"}
"""Parts of the contest's names, and ours."""


def main() -> int:
    """Write the artifact; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python scripts/benchmarks/contest_model.py "
        "final_model.int8.ptz --data data/fineweb10B_sp1024",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="the contest's weights file")
    parser.add_argument("--data", type=Path, required=True, help="dataset with the tokenizer that it was trained on")
    parser.add_argument("--context", type=int, default=1024, help="sequence length that it was trained with")
    parser.add_argument("--out", type=Path, default=Path("contest.zst"), metavar="FILE")
    args = parser.parse_args()
    try:
        size = convert(args)
    except PgolfError as error:
        print(f"contest_model: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{args.out}: {size:,} bytes")
    return 0


def convert(args: argparse.Namespace) -> int:
    weights, data = contest_weights(args.model), open_dataset(args.data)
    members = loop.members(data, "main", code_in(NAIVE), args.model.name)
    with loaded(NAIVE, names=("model", "quant")) as naive:
        config = naive.model.GPTConfig(**shape(weights), context=args.context)
        naive.model.GPT(config).load_state_dict(weights)  # names and shapes all fit
        members["weights.bin"] = naive.quant.dumps(asdict(config), weights)
    return pack(members, args.out, rules.TRACKS["main"].artifact_bytes)


def contest_weights(path: Path) -> dict[str, Tensor]:
    """Weights in the contest's format (int8 rows, else fp16 or fp32) under our names."""
    try:
        stored = torch.load(io.BytesIO(zlib.decompress(path.read_bytes())), weights_only=True)
    except OSError as error:
        raise EnvironmentBroken(f"{path}: {error.strerror}") from None
    except zlib.error:
        raise UsageError(f"{path}: not a weights file of the contest's script") from None
    state = {name: t.float() for name, t in stored["passthrough"].items()}
    for name, codes in stored["quantized"].items():
        scale = stored["scales"][name].float()
        value = codes.float() * (scale[:, None] if scale.ndim else scale)
        state[name] = value.to(getattr(torch, stored["dtypes"][name])).float()  # rounded as it was stored
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for theirs, our in NAMES.items():
            name = name.replace(theirs, our)
        ours[name] = tensor
    return ours


def shape(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The model's settings that the weights tell."""
    vocab_size, dim = weights["embed.weight"].shape
    heads = len(weights["blocks.0.attn.gain"])
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "layers": len([name for name in weights if name.endswith("attn.query.weight")]),
        "heads": heads,
        "kv_heads": len(weights["blocks.0.attn.key.weight"]) * heads // dim,
        "mlp_ratio": len(weights["blocks.0.mlp.up.weight"]) // dim,
    }


if __name__ == "__main__":
    sys.exit(main())
