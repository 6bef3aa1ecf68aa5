"""The strong baseline's transformer. Every technique is a switch of `GPTConfig`; nothing else is here.

From the naive baseline stay RMSNorm without weights, QK-norm with a gain per head, grouped-query attention, the
embedding mixed into every block, output projections that start at zero, one matrix for embedding and head, and logits
capped by tanh; its U-Net skips are gone. What is new has its source beside its switch and, in bpb, what it was worth
here: on the laptop track, or at the middle scale without n-grams. docs/benchmarks/golf.md has the commands and what was
left out.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ngram import BINS, ORDERS, Experts
from torch import Tensor, nn

MAY_BE_ZERO = ("loops", "loop_start", "xsa", "leak", "ngram", "softcap", "rope_dims")


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model and its switches; the defaults are the contest-sized model."""

    vocab_size: int = 8192
    context: int = 2048
    """Longest sequence in tokens."""
    layers: int = 11  # Transformer blocks.
    dim: int = 512  # Width of the residual stream.
    heads: int = 8  # Query heads.
    kv_heads: int = 4  # Key and value heads, each shared by heads / kv_heads query heads.
    mlp_ratio: int = 4
    """Wider MLPs gained more than more layers did once codes of 4 bits were cheap (contest, March)."""
    rope_base: float = 10000.0  # Base of the rotary frequencies.
    rope_dims: int = 16
    """Partial rotary positions (GPT-NeoX): only this many dimensions of a head turn (middle: +0.007); 0: all."""
    qk_gain: float = 5.0  # Initial gain of each query head.
    softcap: float = 30.0
    """Logits are softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); 0: as they are."""
    embed_std: float = 0.02  # Standard deviation of the initial embedding.
    leak: float = 0.5
    """Slope of the MLP's squared ReLU below zero (contest, LeakyReLU^2), middle: -0.003; 0: as arXiv:2109.08668."""
    xsa: int = 11
    """This many last layers attend exclusively (XSA, contest), middle: -0.006; see `Attention.exclude`."""
    gate: bool = True
    """Each head's output is scaled by a sigmoid of the first channels of its input (modded-nanogpt), middle: -0.005."""
    loops: int = 1
    """Depth recurrence: layers loop_start to loop_stop - 1 run this many times more (arXiv:2502.05171, contest); not
    for short runs, middle: +0.005."""
    loop_start: int = 3  # First recurrent layer.
    loop_stop: int = 6  # First layer after the recurrent ones.
    smear: bool = True
    """Each embedding takes up a learned, gated share of the one before (modded-nanogpt), middle: -0.011."""
    ngram: int = 0
    """Counts of n-grams of up to this many tokens are mixed in as experts (see ngram.py), laptop: -0.25; 0: none."""

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
        if self.loops and not self.loop_start < self.loop_stop <= self.layers:
            raise ValueError(f"layers {self.loop_start} to {self.loop_stop - 1} cannot loop: there are {self.layers}")
        if self.dim < Attention.GATE_INPUTS:
            raise ValueError(f"dim {self.dim} is below the {Attention.GATE_INPUTS} channels that the gates look at")
        if self.ngram not in (0, *range(2, ORDERS + 1)):
            raise ValueError(f"ngram is {self.ngram}; it must be 0 or from 2 to {ORDERS}")
        if self.vocab_size**self.ngram >= 2**63:
            raise ValueError(f"{self.ngram}-grams of a vocabulary of {self.vocab_size} do not fit 63 bits; lower ngram")

    def order(self, loops: int) -> list[int]:
        """Which layer runs when: 0 1 2 3 4 5 3 4 5 6 ... with one loop over 3 to 5."""
        looped = list(range(self.loop_start, self.loop_stop)) * loops
        return [*range(min(self.loop_stop, self.layers)), *looped, *range(self.loop_stop, self.layers)]


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


class Rotary(nn.Module):
    """Turns the first R of D dimensions by the position in the window."""

    cos: Tensor
    sin: Tensor

    def __init__(self, context: int, width: int, base: float) -> None:
        super().__init__()
        cos, sin = rope_tables(context, width, base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, H, D)
        return rotate(x, self.cos[: x.size(1)], self.sin[: x.size(1)])


class Attention(nn.Module):
    GATE_INPUTS = 12

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = config.heads, config.kv_heads, config.dim // config.heads
        self.exclusive = layer >= config.layers - config.xsa
        self.query = Linear(config.dim, config.dim)
        self.key = Linear(config.dim, self.kv_heads * self.width)
        self.value = Linear(config.dim, self.kv_heads * self.width)
        self.out = Linear(config.dim, config.dim, zero=True)
        self.gain = nn.Parameter(torch.full((config.heads,), config.qk_gain))
        self.gate = nn.Parameter(torch.zeros(config.heads, self.GATE_INPUTS)) if config.gate else None

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        B, T, C = x.shape
        q = self.query(x).view(B, T, self.heads, self.width)  # (B, T, H, D)
        k = self.key(x).view(B, T, self.kv_heads, self.width)  # (B, T, H_kv, D)
        v = self.value(x).view(B, T, self.kv_heads, self.width)
        q = rotary(rms_norm(q)) * (self.gain / self.width**0.5).to(x.dtype)[:, None]
        k = rotary(rms_norm(k))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # (B, H, T, D)
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=1.0,
            enable_gqa=self.heads != self.kv_heads,
        ).transpose(1, 2)
        if self.exclusive:
            y = self.exclude(y, v)
        if self.gate is not None:
            y = y * 2 * torch.sigmoid(F.linear(x[..., : self.GATE_INPUTS], self.gate.to(x.dtype)))[..., None]
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

    def forward(self, x: Tensor, x0: Tensor, rotary: Rotary) -> Tensor:  # (B, T, C) twice
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x), rotary)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32) -> None:
        """Parameters are fp32; activations and matrix products are `dtype`."""
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        nn.init.normal_(self.embed.weight, std=config.embed_std)
        self.smear = nn.Parameter(torch.zeros(Attention.GATE_INPUTS + 1)) if config.smear else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.experts: Experts | None = None  # only prediction needs them whole
        if config.ngram:
            self.gate = nn.Parameter(torch.zeros(config.ngram, config.dim))
            self.bin_bias = nn.Parameter(torch.zeros(config.ngram - 1, BINS, config.ngram))
        self.rotary = Rotary(config.context, config.rope_dims or config.dim // config.heads, config.rope_base)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        expert_probs: Tensor | None = None,
        context_bins: Tensor | None = None,
        loops: int | None = None,
    ) -> Tensor:
        """Logits (B, T, V) in fp32 for ids (B, T); with targets (B, T) the mean loss in nats per token.

        Training with experts needs their probabilities of the targets and the bins of their contexts, both
        (B, T, E). `loops` replaces the config's number: training runs its first part without recurrence.
        """
        if self.config.context < ids.size(1):
            raise ValueError(f"{ids.size(1)} tokens are more than the context of {self.config.context}")
        x = x0 = self.embedding(ids)  # (B, T, C)
        for layer in self.config.order(self.config.loops if loops is None else loops):
            x = self.blocks[layer](x, x0, self.rotary)
        x = rms_norm(x)
        head, softcap = self.embed.weight, self.config.softcap
        if targets is not None:
            own = other = None
            if expert_probs is not None and context_bins is not None:
                weights = self.weights(x, context_bins)
                own, other = weights[..., 0].flatten(), (weights[..., 1:] * expert_probs).sum(-1).flatten()
            return capped_cross_entropy(x.flatten(0, 1), head, targets.flatten(), softcap, own, other)
        logits = cap(F.linear(x, head.to(x.dtype)).float(), softcap)  # (B, T, V)
        if self.experts is None:
            return logits
        weights = self.weights(x, self.experts.context_bins(ids))
        return (
            self.experts.mix(logits.softmax(-1).mul_(weights[..., :1]), weights[..., 1:], ids).clamp_min_(TINY).log_()
        )

    def weights(self, x: Tensor, context_bins: Tensor) -> Tensor:
        """Weights (B, T, 1 + E), summing to 1, of the network and the experts, whose contexts have these bins."""
        gate = F.linear(x, self.gate.to(x.dtype)).float()
        for expert in range(context_bins.size(-1)):
            gate = gate + F.embedding(context_bins[..., expert].long(), self.bin_bias[expert])
        absent = F.pad(context_bins == 0, (1, 0))
        return gate.masked_fill(absent, -torch.inf).softmax(-1)

    def embedding(self, ids: Tensor) -> Tensor:
        """Normalised embedding (B, T, C) of ids (B, T) and the tokens just before them."""
        x = rms_norm(self.embed(ids).to(self.dtype))
        if self.smear is None:
            return x
        smear = self.smear.to(x.dtype)
        gate = torch.sigmoid(F.linear(x[..., : Attention.GATE_INPUTS], smear[None, 1:]))  # (B, T, 1)
        return rms_norm(x + smear[0] * gate * F.pad(x[:, :-1], (0, 0, 1, 0)))


def cap(logits: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


ROWS = 4096
TINY = 1e-37  # a probability that underflows costs 85 nats, not all


class CappedCrossEntropy(torch.autograd.Function):
    """Head, softcap and cross-entropy in one: the logits of ROWS tokens at a time, gradients at once.

    Neither logits nor their gradient ever exist for the whole batch, which is what limits its size, and the
    backward pass has nothing left to do but to scale (Liger kernel, arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, softcap: float, own: Tensor | None, other: Tensor | None
    ) -> Tensor:
        weight, n, total = head.to(x.dtype), len(x), x.new_zeros((), dtype=torch.float32)
        grad_head, grads_x, mixture = torch.zeros_like(head), [], []
        for i in range(0, n, ROWS):
            rows, wanted = x[i : i + ROWS], targets[i : i + ROWS, None]
            logits = cap(F.linear(rows, weight).float(), softcap)  # (R, V)
            log_p = logits.log_softmax(-1)
            target_log_p = log_p.gather(-1, wanted)  # (R, 1)
            if own is None or other is None:
                total = total - target_log_p.sum()
            else:
                p = target_log_p.exp().squeeze(1)
                mixed = (own[i : i + ROWS] * p + other[i : i + ROWS]).clamp_min(TINY)
                total = total - mixed.log().sum()
                mixture.append(torch.stack((-p, -torch.ones_like(p))) / mixed / n)
            grad = log_p.exp().scatter_add(-1, wanted, torch.full_like(target_log_p, -1.0))
            if softcap:
                grad = grad * (1 - (logits / softcap).square())
            grad = (grad / n).to(x.dtype)
            grads_x.append(grad @ weight)
            grad_head = grad_head + (grad.mT @ rows).float()
        ctx.save_for_backward(torch.cat(grads_x), grad_head, *(torch.cat(mixture, dim=1).unbind() if mixture else ()))
        return total / n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grad_head, *mixture = ctx.saved_tensors
        own, other = (grad * m for m in mixture) if mixture else (None, None)
        return grad_x * grad.to(grad_x.dtype), grad_head * grad, None, None, own, other


def capped_cross_entropy(
    x: Tensor, head: Tensor, targets: Tensor, softcap: float, own: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """Mean of -log(own * p + other) with p = softmax(cap(x head^T))[target], for x (N, C), head (V, C), targets (N,).

    `own` and `other` (N,) are 1 and 0 if they are not given. They get the gradients of this loss, x and head those of
    -log p: a network taught only what the experts leave over learns too slowly (docs/LOG.md).
    """
    loss: Tensor = CappedCrossEntropy.apply(x, head, targets, softcap, own, other)  # type: ignore[no-untyped-call]
    return loss
