"""The contest's baseline transformer, on a page.

Notable features:
- RMSNorm without weights, in front of every sublayer and on queries and keys (QK-norm, arXiv:2010.04245)
- rotary positions (arXiv:2104.09864), tables in fp32 whatever the activations are
- grouped-query attention (arXiv:2305.13245), a learned gain per query head
- MLP with squared ReLU (arXiv:2109.08668)
- every block mixes the normalised embedding back into its input
- U-Net skips: the outputs of the first half are added, last first, to the inputs of the second half
- output projections start at zero, embedding and head share one matrix, logits are capped by tanh
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the model; the defaults are the contest's 9x512 with 17,059,912 parameters."""

    vocab_size: int = 1024
    context: int = 1024
    """Longest sequence in tokens."""
    layers: int = 9  # Transformer blocks.
    dim: int = 512  # Width of the residual stream.
    heads: int = 8  # Query heads.
    kv_heads: int = 4  # Key and value heads, each shared by heads / kv_heads query heads.
    mlp_ratio: int = 2  # Hidden width of the MLP over dim.
    rope_base: float = 10000.0  # Base of the rotary frequencies.
    qk_gain: float = 1.5  # Initial gain of each query head.
    softcap: float = 30.0  # Logits are softcap * tanh(logits / softcap).
    embed_std: float = 0.005  # Standard deviation of the initial embedding.

    def __post_init__(self) -> None:
        for field in fields(GPTConfig):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be positive")
        if self.layers < 2:
            raise ValueError("layers is 1; the skips need at least 2")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} does not split into {self.heads} heads of even width")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv_heads evenly")


class Linear(nn.Linear):
    """Weights stay fp32 for the optimizer and are cast to the dtype of the activations."""

    def __init__(self, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False)
        if zero:
            nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def rope_tables(context: int, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (context, 1, width / 2) of position times frequency base^(-2i / width)."""
    # By numpy: torch's own cosine of doubles, on two threads, gave other last digits in one process of 26.
    angles = np.arange(context)[:, None, None] * base ** -(np.arange(0, width, 2) / width)
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, H, D) by its angle, in fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, ahead: Tensor) -> Tensor:
    """Causal attention by plain products: on CPUs they are faster than the backward pass of flash attention.

    From q (B, H, T, D), k and v (B, H_kv, T, D), and `ahead` (T, T), minus infinity for keys that lie ahead and 0 for
    others, to (B, H, T, D).
    """
    B, H, T, D = q.shape
    q = q.reshape(B, k.size(1), -1, D) * D**-0.5  # heads that share keys are rows of one product
    weights = ((q @ k.mT).view(B, H, T, T).float() + ahead).softmax(-1).to(q.dtype)
    return (weights.view(B, k.size(1), -1, T) @ v).view(B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.width = config.dim // config.heads  # D
        self.grouped = config.kv_heads != config.heads
        self.query = Linear(config.dim, config.dim)
        self.key = Linear(config.dim, config.kv_heads * self.width)
        self.value = Linear(config.dim, config.kv_heads * self.width)
        self.out = Linear(config.dim, config.dim, zero=True)
        self.gain = nn.Parameter(torch.full((config.heads,), config.qk_gain))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, ahead: Tensor) -> Tensor:
        B, T, C = x.shape
        q = self.query(x).view(B, T, -1, self.width)  # (B, T, H, D)
        k = self.key(x).view(B, T, -1, self.width)  # (B, T, H_kv, D)
        v = self.value(x).view(B, T, -1, self.width)
        q = rotate(rms_norm(q), cos, sin) * self.gain.to(x.dtype)[:, None]
        k = rotate(rms_norm(k), cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D)
        y = attend(q, k, v, ahead) if x.device.type == "cpu" else self.flash(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, C))
        return out

    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.dim, config.mlp_ratio * config.dim)
        self.down = Linear(config.mlp_ratio * config.dim, config.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = MLP(config)
        self.attn_scale = nn.Parameter(torch.ones(config.dim))
        self.mlp_scale = nn.Parameter(torch.ones(config.dim))
        self.mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, config.dim))  # of the input, of the embedding

    def forward(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, ahead: Tensor) -> Tensor:
        mix = self.mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(rms_norm(x), cos, sin, ahead)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))
        return x


def cap(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), by a sigmoid: a tanh takes a CPU longer than all the rest of the loss."""
    return 2 * softcap * torch.sigmoid(logits * (2 / softcap)) - softcap


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
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.skip = nn.Parameter(torch.ones(config.layers // 2, config.dim))
        cos, sin = rope_tables(config.context, config.dim // config.heads, config.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        ahead = torch.full((config.context, config.context), -torch.inf).triu(1)
        self.register_buffer("ahead", ahead, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) in fp32 for ids (B, T); with targets (B, T) the mean loss in nats per token."""
        T = ids.size(1)
        if self.config.context < T:
            raise ValueError(f"{T} tokens are more than the context of {self.config.context}")
        cos, sin = self.cos[:T], self.sin[:T]
        x = x0 = rms_norm(self.embed(ids).to(self.dtype))  # (B, T, C)
        skips: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            second = i - len(self.skip)  # index within the second half
            if 0 <= second < len(self.skip):
                x = x + self.skip[second].to(x.dtype) * skips.pop()
            x = block(x, x0, cos, sin, self.ahead[:T, :T])
            if second < 0:
                skips.append(x)
        logits = F.linear(rms_norm(x), self.embed.weight.to(x.dtype)).float()  # (B, T, V)
        logits = cap(logits, self.config.softcap)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
