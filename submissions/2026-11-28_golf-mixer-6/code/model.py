"""The strong baseline's transformer: naive's without U-Net skips, and with the switches of `GPTConfig`.

Kept from naive: RMSNorm without weights, QK-norm with a gain per head, grouped-query attention, the embedding mixed
into every block, output projections that start at zero, one matrix for embedding and head, logits capped by tanh. Each
switch names its source and, where that was measured, by how much it changes the bpb of the network alone on the laptop
track; negative is better (docs/benchmarks/golf.md).
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAY_BE_ZERO = ("xsa", "leak", "softcap", "rope_dims")
GATE_INPUTS = 12  # channels that the gate of smear looks at


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model and its switches; the defaults are the contest-sized model."""

    vocab_size: int = 8192
    context: int = 2048  # Longest sequence in tokens.
    layers: int = 11  # Transformer blocks.
    dim: int = 512  # Width of the residual stream.
    heads: int = 8  # Query heads.
    kv_heads: int = 4  # Key and value heads, each shared by heads / kv_heads query heads.
    mlp_ratio: int = 4
    """Wider MLPs gained more than more layers did once codes of 4 bits were cheap (contest, March)."""
    rope_base: float = 10000.0  # Base of the rotary frequencies.
    rope_dims: int = 16
    """Partial rotary positions (GPT-NeoX): only this many dimensions of a head turn (middle: +0.017); 0: all."""
    qk_gain: float = 5.0  # Initial gain of each query head.
    softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); 0: as they are."""
    embed_std: float = 0.02  # Standard deviation of the initial embedding.
    leak: float = 0.5
    """Slope of the MLP's squared ReLU below zero (contest, LeakyReLU^2): -0.008 ± 0.007; 0: as arXiv:2109.08668."""
    xsa: int = 11
    """This many last layers attend exclusively (XSA, contest): -0.009 ± 0.006; see `Attention.exclude`."""
    smear: bool = True
    """Each embedding takes up a learned, gated share of the one before (modded-nanogpt): -0.014 ± 0.011."""

    def __post_init__(self) -> None:
        for field in fields(GPTConfig):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and (value < 0 or (value == 0 and field.name not in MAY_BE_ZERO)):
                raise ValueError(f"{field.name} is {value}; it must be positive")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} does not split into {self.heads} heads of even width")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly")
        if self.rope_dims % 2 or self.rope_dims > self.dim // self.heads:
            raise ValueError(f"rope_dims {self.rope_dims} is odd or wider than a head of {self.dim // self.heads}")
        if self.dim < GATE_INPUTS:
            raise ValueError(f"dim {self.dim} is below the {GATE_INPUTS} channels that the gate looks at")


class Linear(nn.Linear):
    """Weights stay fp32 for the optimizer and are cast to the dtype of the activations."""

    def __init__(self, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False)
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


def rope_tables(context: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (context, 1, width / 2), in fp32, of position times frequency base^(-2i / width)."""
    # By numpy: torch's own cosine of doubles, on two threads, gave other last digits in one process of 26.
    angles = np.arange(context)[:, None, None] * base ** -(np.arange(0, width, 2) / width)
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first R dimensions of x (..., H, D) by the angles of cos and sin (..., 1, R / 2), in fp32."""
    width = 2 * cos.size(-1)
    a, b = x[..., :width].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., width:]), dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, ahead: Tensor) -> Tensor:
    """Causal attention (B, T, H, D) of queries (B, T, H, D), scaled already, to keys and values (B, T, H_kv, D).

    `ahead` (T, T) is 0, and minus infinity for keys that lie ahead.
    """
    B, T, H, D = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    if q.device.type != "cpu":
        grouped = k.size(1) != H
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=grouped).transpose(1, 2)
    # The backward pass of flash attention is slow on CPUs; plain products of short sequences are not.
    q = q.reshape(B, k.size(1), -1, D)  # heads that share keys are rows of one product
    weights = ((q @ k.mT).view(B, H, T, T).float() + ahead).softmax(-1).to(q.dtype)
    return (weights.view(B, k.size(1), -1, T) @ v).view(B, H, T, D).transpose(1, 2)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.dim // config.heads
        self.exclusive = layer >= config.layers - config.xsa
        self.query = Linear(config.dim, config.dim)
        self.key = Linear(config.dim, self.kv_heads * self.width)
        self.value = Linear(config.dim, self.kv_heads * self.width)
        self.out = Linear(config.dim, config.dim, zero=True)
        self.gain = nn.Parameter(torch.full((config.heads,), config.qk_gain))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, ahead: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.query(x).view(B, T, self.heads, self.width)  # (B, T, H, D)
        k = self.key(x).view(B, T, self.kv_heads, self.width)  # (B, T, H_kv, D)
        v = self.value(x).view(B, T, self.kv_heads, self.width)
        q = rotate(rms_norm(q), cos, sin) * (self.gain / self.width**0.5).to(x.dtype)[:, None]
        k = rotate(rms_norm(k), cos, sin)
        y = attend(q, k, v, ahead)
        if self.exclusive:
            y = self.exclude(y, v)
        out: Tensor = self.out(y.reshape(B, T, C))
        return out

    def exclude(self, y: Tensor, v: Tensor) -> Tensor:
        """y (B, T, H, D) without its component along the token's own value: the residual stream has that already."""
        B, T, H, D = y.shape
        y = y.reshape(B, T, self.kv_heads, -1, D)  # heads that share a value lie together
        v = F.normalize(v, dim=-1).unsqueeze(3)
        return (y - (y * v).sum(-1, keepdim=True) * v).view(B, T, H, D)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.leak = config.leak
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.leaky_relu(self.up(x), self.leak).square())
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.dim))
        self.mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, config.dim))  # of the input, of the embedding

    def forward(self, x: Tensor, x0: Tensor, *tables: Tensor) -> Tensor:  # (B, T, C) twice; see GPT.forward
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x), *tables)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))
        return x


class GPT(nn.Module):
    cos: Tensor
    sin: Tensor
    ahead: Tensor

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32) -> None:
        """Parameters are fp32; activations and matrix products are `dtype`."""
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embed.weight, std=config.embed_std)
        # What smear is multiplied by, then the weights of its gate.
        self.smear = nn.Parameter(torch.zeros(1 + GATE_INPUTS)) if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        cos, sin = rope_tables(config.context, config.rope_dims or config.dim // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        ahead = torch.full((config.context, config.context), -torch.inf).triu(1)  # attention adds it to its scores
        self.register_buffer("ahead", ahead, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) in fp32 for ids (B, T); with targets (B, T) the mean loss in nats per token."""
        T = ids.size(1)
        if self.config.context < T:
            raise ValueError(f"{T} tokens are more than the context of {self.config.context}")
        x = x0 = self.embedding(ids)  # (B, T, C)
        for block in self.blocks:
            x = block(x, x0, self.cos[:T], self.sin[:T], self.ahead[:T, :T])
        x = rms_norm(x)
        head, softcap = self.embed.weight, self.config.softcap
        if targets is not None:
            return capped_cross_entropy(x.flatten(0, 1), head, targets.flatten(), softcap)
        return cap(F.linear(x, head.to(x.dtype)).float(), softcap)

    def embedding(self, ids: Tensor) -> Tensor:
        """Normalised embedding (B, T, C) of ids (B, T) and the tokens just before them."""
        x = rms_norm(self.embed(ids).to(self.dtype))
        if self.smear is None:
            return x
        return smeared(x, F.pad(x[:, :-1], (0, 0, 1, 0)), self.smear.to(x.dtype))


def smeared(x: Tensor, before: Tensor, smear: Tensor) -> Tensor:
    """x (..., C) and a gated share of what is before each, normalised. `smear`: the share, the gate's weights."""
    gate = torch.sigmoid(F.linear(x[..., :GATE_INPUTS], smear[None, 1:]))  # (..., 1)
    return rms_norm(x + smear[0] * gate * before)


def cap(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), by a sigmoid: a tanh takes a CPU longer than the rest of the loss."""
    return 2 * softcap * torch.sigmoid(logits * (2 / softcap)) - softcap if softcap else logits


ROWS = 16384


class CappedCrossEntropy(torch.autograd.Function):
    """Head, softcap and cross-entropy in one, for ROWS tokens at a time (Liger kernel, arXiv:2410.10989).

    The forward pass also computes the gradients, and the backward pass only scales them. So logits and their gradient
    never exist for the whole batch, whose size they would limit.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        weight, n, total = head.to(x.dtype), len(x), x.new_zeros((), dtype=torch.float32)
        grad_head, grads_x = torch.zeros_like(head), []
        for i in range(0, n, ROWS):
            rows, target = x[i : i + ROWS], targets[i : i + ROWS]
            logits = cap(F.linear(rows, weight).float(), softcap)  # (R, V)
            highest = logits.amax(-1, keepdim=True)
            exps = (logits - highest).exp()
            partition = exps.sum(-1, keepdim=True)
            target_logit = logits.gather(-1, target[:, None])  # (R, 1)
            total = total + (highest + partition.log() - target_logit).sum()
            # The gradient of the logits is (softmax - one-hot of the target) / n: `grad` less `at_target` in one place.
            grad, at_target = exps / (n * partition), torch.full_like(target_logit, 1 / n)
            if softcap:  # the derivative of the cap is 1 - (capped / softcap)^2
                grad = grad * (1 - (logits / softcap).square())
                at_target = at_target * (1 - (target_logit / softcap).square())
            grad = grad.to(x.dtype)
            grads_x.append((grad @ weight - at_target * weight[target]).to(x.dtype))
            grad_head = (grad_head + (grad.mT @ rows).float()).index_add(0, target, -at_target * rows.float())
        ctx.save_for_backward(torch.cat(grads_x), grad_head)
        return total / n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_head = ctx.saved_tensors
        return grad_x * grad.to(grad_x.dtype), grad_head * grad, None, None


def capped_cross_entropy(x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
    """Mean of -log softmax(cap(x head^T))[target], for x (N, C), head (V, C), targets (N,)."""
    loss: Tensor = CappedCrossEntropy.apply(x, head, targets, softcap)  # type: ignore[no-untyped-call]
    return loss
