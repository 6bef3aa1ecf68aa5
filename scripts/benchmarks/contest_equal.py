"""The contest's train_gpt.py evaluates its own weights; pgolf scores the imported artifact; both on the same tokens.

    python scripts/benchmarks/contest_equal.py train_gpt.py --weights final_model.int8.ptz --tokenizer X.model \
        --shard fineweb_val_000000.bin --env MODEL_DIM=384 --env NUM_LAYERS=7

The script drops the tail of a shard that fills no window, and its last token is never an input. So documents are chosen
whose tokens fill whole windows, and the script gets one BOS more. Runs the script without a sandbox, on a CPU.
"""

import argparse
import io
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
import torch

from pgolf.cli.main import main as pgolf
from pgolf.data.shards import HEADER_BYTES, write_shard

BOS = 1
LONGEST = 4000  # tokens of a document


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--shard", type=Path, required=True, help="of validation tokens")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--context", type=int, default=128, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=2000, help="at least (default: %(default)s)")
    args = parser.parse_args()
    tokens = whole_windows(args.shard, args.context, args.tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script").mkdir()
        (folder / "data").mkdir()
        write_shard(folder / "script" / "fineweb_val_000000.bin", np.append(tokens, np.uint16(BOS)))
        write_shard(folder / "data" / "fineweb_val_000000.bin", tokens)
        (folder / "data" / args.tokenizer.name).write_bytes(args.tokenizer.read_bytes())
        print("script", *own(args, folder / "script"), flush=True)
        options = ["--weights", str(args.weights), "--tokenizer", str(args.tokenizer), "-o", str(folder / "a.zst")]
        for item in [*args.env, f"TRAIN_SEQ_LEN={args.context}"]:
            options += ["--env", item]
        if pgolf(["import", str(args.script), *options]) or pgolf(["score", name + "/a.zst", "--data", name + "/data"]):
            sys.exit("the import could not be scored")


def whole_windows(shard: Path, context: int, least: int) -> npt.NDArray[np.uint16]:
    """Documents, at random, of at least `least` tokens together, which fill whole windows."""
    stream = np.fromfile(shard, "<u2", offset=HEADER_BYTES)
    documents = [d for d in np.split(stream, np.flatnonzero(stream == BOS)[1:]) if len(d) < LONGEST]
    generator = np.random.default_rng(0)
    while True:
        chosen, total, order = [], 0, generator.permutation(len(documents)).tolist()
        while total < least:
            chosen.append(order.pop())
            total += len(documents[chosen[-1]])
        for last in order:
            if (total + len(documents[last])) % context == 0:
                return np.concatenate([documents[i] for i in (*chosen, last)])


def own(args: argparse.Namespace, data: Path) -> tuple[float, float]:
    """Nats per token and bits per byte, as the script's own functions compute them."""
    os.environ.update(item.split("=", 1) for item in args.env)
    os.environ.update(TRAIN_SEQ_LEN=str(args.context), VAL_BATCH_SIZE=str(1 << 20))
    source = args.script.read_text(encoding="utf-8").replace('device_type="cuda"', 'device_type="cpu"')
    script: dict[str, Any] = {"__name__": "script", "__file__": str(args.script)}
    exec(compile(source, str(args.script), "exec"), script)
    h, cpu = script["Hyperparameters"](), torch.device("cpu")
    shape = h.vocab_size, h.num_layers, h.model_dim, h.num_heads, h.num_kv_heads, h.mlp_mult, h.tie_embeddings
    model = script["GPT"](*shape, h.tied_embed_init_std, h.logit_softcap, h.rope_base, h.qk_gain_init).bfloat16()
    for module in model.modules():
        if isinstance(module, script["CastedLinear"]):
            module.float()
    script["restore_low_dim_params_to_fp32"](model)
    packed = io.BytesIO(zlib.decompress(args.weights.read_bytes()))
    model.load_state_dict(script["dequantize_state_dict_int8"](torch.load(packed, map_location="cpu")))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(args.tokenizer))
    tables = script["build_sentencepiece_luts"](pieces, h.vocab_size, cpu)
    tokens = script["load_validation_tokens"](str(data / "fineweb_val_*.bin"), args.context)
    loss, bpb = script["eval_val"](h, model, 0, 1, cpu, 8, tokens, *tables)
    return float(loss), float(bpb)


if __name__ == "__main__":
    main()
