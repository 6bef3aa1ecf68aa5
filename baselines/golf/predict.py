"""The predictor of the packed artifact: weights.bin beside this file becomes a model that gives logits."""

from pathlib import Path

import coder
import ngram
import torch
from model import GPT, GPTConfig
from torch import nn


def load(root: Path, device: torch.device) -> nn.Module:
    """A module that maps ids (B, T) to logits (B, T, V); row t predicts token t + 1. fp32 on CPUs, bf16 on GPUs."""
    config, tensors = coder.loads((root / "weights.bin").read_bytes())
    model = GPT(GPTConfig(**config), torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    if (counts := root / "counts.bin").is_file():
        model.experts = ngram.Experts(*ngram.loads(counts.read_bytes()))
    return model.to(device).eval().requires_grad_(False)
