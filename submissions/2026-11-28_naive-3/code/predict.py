"""The predictor of the packed artifact: one token of each lane goes in, logits of the next one come out.

What the model computes for whole windows while training is computed here token by token, with keys and values from a
cache. Every token attends to the last `context` tokens of its lane.
"""

from functools import partial
from pathlib import Path
from typing import cast

import quant
import torch
from cache import Cache, linear
from model import EPS, GPT, Block, GPTConfig, rms_norm, rope_tables, rotate
from torch import Tensor


def load(root: Path, device: torch.device, lanes: int, count: int) -> "Predictor":
    """The predictor of the artifact in `root`."""
    return Predictor(load_model(root, device), lanes)


def load_model(root: Path, device: torch.device) -> GPT:
    """The model of the artifact in `root`. fp32 on CPUs, bf16 on GPUs."""
    config, state = quant.loads((root / "weights.bin").read_bytes())
    model = GPT(GPTConfig(**config), torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.load_state_dict(state)
    return model.to(device).requires_grad_(False)


class Predictor:
    def __init__(self, model: GPT, lanes: int) -> None:
        self.config = config = model.config
        width = config.dim // config.heads
        self.head = model.embed.weight.detach().to(model.dtype)
        self.embed = rms_norm(self.head)
        self.skip = model.skip.detach().to(model.dtype)
        self.layers = [Layer(cast(Block, block), model.dtype) for block in model.blocks]
        shape = config.layers, lanes, config.context, config.kv_heads, width
        tables = partial(rope_tables, width=width, base=config.rope_base)
        self.cache = Cache(*shape, model.dtype, model.cos.device, tables)

    @torch.inference_mode()
    def step(self, ids: Tensor, lane: Tensor) -> Tensor:
        """Logits (B, V) of the next token in each lane (B,), whose last token is in ids (B,)."""
        order, places, cos, sin = self.cache.enter(lane)
        x = x0 = self.embed[ids[order]]  # (B, C)
        skips: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            second = i - len(self.skip)
            if 0 <= second < len(self.skip):
                x = x + self.skip[second] * skips.pop()
            x = layer(x, x0, cos, sin, self.cache, i)
            if second < 0:
                skips.append(x)
        logits, softcap = linear(normed(x)[places], self.head).float(), self.config.softcap  # (B, V)
        return logits.mul_(2 / softcap).sigmoid_().mul_(2 * softcap).sub_(softcap)  # as `cap`


class Layer:
    """A block for one token a lane. Weights in `dtype`; queries, keys and values come from one product."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attn, mlp = block.attn, block.mlp
        self.width, self.heads, self.kv_heads = attn.width, len(attn.gain), len(attn.key.weight) // attn.width
        self.qkv = torch.cat([attn.query.weight, attn.key.weight, attn.value.weight]).detach().to(dtype)
        self.gain = attn.gain.detach().to(dtype)[:, None]
        self.out = (block.attn_scale[:, None] * attn.out.weight).detach().to(dtype)
        self.up = mlp.up.weight.detach().to(dtype)
        self.down = (block.mlp_scale[:, None] * mlp.down.weight).detach().to(dtype)
        self.mix = block.mix.detach().to(dtype)

    def __call__(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, cache: Cache, number: int) -> Tensor:
        x = torch.addcmul(self.mix[0] * x, self.mix[1], x0)
        heads = linear(normed(x), self.qkv).view(len(x), -1, self.width)  # (B, H + 2 H_kv, D)
        v = heads[:, -self.kv_heads :]
        qk = rotate(normed(heads[:, : -self.kv_heads]), cos, sin)
        y = cache.attend(number, qk[:, : self.heads] * self.gain, qk[:, self.heads :], v)  # (B, H, D)
        x = x + linear(y.flatten(1), self.out)
        return x + linear(linear(normed(x), self.up).relu_().square_(), self.down)


def normed(x: Tensor) -> Tensor:
    """As rms_norm, which takes twice as long for few rows in fp32 on a CPU."""
    if x.dtype != torch.float32:
        return rms_norm(x)
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * length.square_().div_(x.size(-1)).add_(EPS).rsqrt_()
