"""The predictor of the packed artifact: one token of each lane goes in, logits of the next one come out.

The network's probabilities are one input of a context mixer (mixer.py), which knows part of the training text and
learns from all that is shown. What the network computes for whole windows while training is computed here token by
token, with keys and values from a cache (`cache`, the naive baseline's). Every token attends to the last `context`
tokens of its lane.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import cast

import coder
import torch
import torch.nn.functional as F
from cache import Cache, linear
from mixer import NO_CONTEXTS, Mixer, switched_off
from model import GPT, Block, GPTConfig, cap, rms_norm, rope_tables, rotate, smeared
from torch import Tensor

BUDGET = {"laptop": 72.0}
"""Seconds that loading and all steps are to take, of the track's 120; 400 elsewhere, of 600."""
LATE = 1.5
"""The mixer is left out if even FEWEST nodes a token take more than LATE times the seconds that are left."""
FEWEST, MOST = 15, 400
"""Nodes of the tree that a prediction may visit, on average. More than MOST gain little."""
PREDICTION, NODE = 1.2, 0.05
"""How many times as long a prediction takes one thread as learning a token of the training text, and what each node
adds (docs/benchmarks/golf-mixer.md, Thresholds)."""
BESIDE = 1.5
"""Factor on the timed seconds: the scorer takes a part of both cores, and two threads mix less than twice as fast."""
TRIAL_STEPS = 50
SPEED = 0.001
"""The relative change of the threshold for each token that visits twice as many nodes as planned, or none at all."""


def load(root: Path, device: torch.device, lanes: int, count: int) -> "Network | Predictor":
    """The predictor of the artifact in `root`, for `count` tokens in `lanes` lanes."""
    begun = time.monotonic()
    manifest = json.loads((root / "submission.json").read_text(encoding="utf-8"))
    settings = (manifest.get("training") or {}).get("settings", {})
    off = switched_off(settings.get("off", ""))
    model = load_model(root, device)
    if "mixer" in off or not (root / "prior.bin").is_file():
        return Network(model, lanes)
    mixers = partial(Mixer, root / manifest["tokenizer"], manifest["bos"], lanes, off - NO_CONTEXTS)
    predictor = Predictor(Network(model, lanes), mixers(), (root / "prior.bin").read_bytes())
    end = begun + BUDGET.get(manifest["track"], 400.0)
    predictor.plan = planned(predictor, Network(model, lanes), count, end)
    if "text" in off:
        predictor.mixer, predictor.prior = mixers(), iter(())
    return predictor


def planned(predictor: "Predictor", trial: "Network", count: int, end: float) -> int:
    """The most nodes a token with which `count` tokens are predicted by `end` (see `affordable`).

    Unless it is 0, the mixer knows the prior. `trial` is a network to time, whose cache is spoilt.
    """
    # The other core is the mixer's. Set even if it is left out: products may round differently with other threads.
    torch.set_num_threads(max(1, predictor.threads - 1))
    plan = 0
    for _ in range(2):  # decide after a part of the prior, since a slow machine has no time for the rest; then again
        learning = predictor.beside.submit(next, predictor.prior)
        # Both at once, as in the steps: what two cores do together is not known from what one does alone.
        network = network_seconds(trial, count, learning.done)
        left, seconds = learning.result()
        plan = affordable(network, count * seconds, end - time.monotonic() - left * seconds, predictor.threads)
        if not plan:
            break
    return plan


def affordable(network: float, learning: float, left: float, threads: int) -> int:
    """The most nodes a token for which `left` seconds are enough, else FEWEST; 0, no mixer, if that is too late by far.

    `network`: seconds of all its steps; `learning`: seconds in which the mixer would learn as many tokens.
    """
    fixed = max(network, learning) + learning * PREDICTION / threads
    node = learning * NODE / threads
    if BESIDE * (fixed + node * FEWEST) > LATE * left:
        return 0
    return min(max(int((left / BESIDE - fixed) / node), FEWEST), MOST)


def network_seconds(network: "Network", count: int, done: Callable[[], bool]) -> float:
    """Seconds that the network will take for `count` tokens, timed until `done()`, in at least TRIAL_STEPS steps."""
    lanes = len(network.last)
    lane = torch.arange(lanes, device=network.last.device)
    network.cache.seen.fill_(network.config.context)  # full caches: what nearly all steps read
    step = partial(network.step, lane % network.config.vocab_size, lane)
    step(), step()  # the first ones are slower
    begun, steps = time.monotonic(), 0
    while steps < TRIAL_STEPS or not done():
        step()
        steps += 1
    return (time.monotonic() - begun) / steps * count / lanes


class Predictor:
    """Network and mixer. `plan`, nodes a token, decides what is predicted; a decoder sets it before the first step."""

    def __init__(self, network: "Network", mixer: Mixer, prior: bytes) -> None:
        self.network, self.mixer, self.prior = network, mixer, mixer.decode(prior)
        self.plan, self.threads = 0, torch.get_num_threads()
        self.threshold = 0.005  # of `Mixer.predict`
        self.beside = ThreadPoolExecutor(1)

    def step(self, ids: Tensor, lane: Tensor) -> Tensor:
        """Log-probabilities (B, V), or logits, of the next token in each lane (B,), whose last token is in ids (B,)."""
        if not self.plan:
            return self.network.step(ids, lane)
        for _ in self.prior:  # where this machine would leave the mixer out, but the plan is the encoder's
            pass
        shown, lanes = ids.cpu().numpy(), lane.cpu().numpy()
        learning = self.beside.submit(self.mixer.learn, shown, lanes)
        p = self.network.step(ids, lane).softmax(-1).cpu().contiguous()
        learning.result()
        nodes = self.mixer.predict(lanes, p.numpy(), self.threshold, self.threads)
        # Text that is easy to predict has fewer nodes above a threshold: then a lower one is affordable.
        change = 1 + SPEED * (nodes / self.plan - len(lanes))
        self.threshold = min(max(self.threshold * min(max(change, 0.5), 2), 1e-5), 0.5)
        return p


def load_model(root: Path, device: torch.device) -> GPT:
    """The model of the artifact in `root`. fp32 on CPUs, bf16 on GPUs."""
    config, tensors = coder.loads((root / "weights.bin").read_bytes())
    model = GPT(GPTConfig(**config), torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in tensors.items()})
    return model.to(device).requires_grad_(False)


class Network:
    def __init__(self, model: GPT, lanes: int) -> None:
        self.config = config = model.config
        dtype, device = model.dtype, model.embed.weight.device
        self.head = model.embed.weight.detach().to(dtype)
        self.embed = F.pad(rms_norm(self.head), (0, 0, 0, 1))  # (V + 1, C): the last one, token -1, is no token
        self.smear = None if model.smear is None else model.smear.detach().to(dtype)
        self.layers = [Layer(cast(Block, block), dtype) for block in model.blocks]
        shape = config.layers, lanes, config.context, config.kv_heads, config.dim // config.heads
        tables = partial(rope_tables, width=config.rope_dims or config.dim // config.heads, base=config.rope_base)
        self.cache = Cache(*shape, dtype, device, tables)
        self.last = torch.full((lanes,), -1, device=device)  # the token that each lane was shown last

    @torch.inference_mode()
    def step(self, ids: Tensor, lane: Tensor) -> Tensor:
        """Logits (B, V) of the next token in each lane (B,), whose last token is in ids (B,)."""
        order, places, cos, sin = self.cache.enter(lane)
        before, self.last[lane] = self.last[lane], ids
        x = x0 = self.embed[ids[order]]  # (B, C)
        if self.smear is not None:
            x = x0 = smeared(x, self.embed[before[order]], self.smear)
        for number, layer in enumerate(self.layers):
            x = layer(x, x0, cos, sin, self.cache, number)
        return cap(linear(rms_norm(x)[places], self.head).float(), self.config.softcap)


class Layer:
    """A block for one token a lane. Weights in `dtype`; queries, keys and values come from one product."""

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attn, mlp = block.attn, block.mlp
        self.attn, self.leak = attn, mlp.leak
        self.qkv = torch.cat([attn.query.weight, attn.key.weight, attn.value.weight]).detach().to(dtype)
        self.gain = attn.gain.detach().to(dtype)[:, None]
        self.out = (block.attn_scale[:, None] * attn.out.weight).detach().to(dtype)
        self.up = mlp.up.weight.detach().to(dtype)
        self.down = (block.mlp_scale[:, None] * mlp.down.weight).detach().to(dtype)
        self.mix = block.mix.detach().to(dtype)

    def __call__(self, x: Tensor, x0: Tensor, cos: Tensor, sin: Tensor, cache: Cache, number: int) -> Tensor:
        x = torch.addcmul(self.mix[0] * x, self.mix[1], x0)
        x = x + linear(self.attend(rms_norm(x), cos, sin, cache, number), self.out)
        return x + linear(F.leaky_relu(linear(rms_norm(x), self.up), self.leak).square(), self.down)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, number: int) -> Tensor:
        """What attention makes of x (B, C) before its output projection."""
        attn, B = self.attn, len(x)
        heads = linear(x, self.qkv).view(B, -1, attn.width)  # (B, H + 2 H_kv, D)
        v = heads[:, -attn.kv_heads :]
        qk = rotate(rms_norm(heads[:, : -attn.kv_heads]), cos, sin)
        y = cache.attend(number, qk[:, : attn.heads] * self.gain, qk[:, attn.heads :], v)  # (B, H, D)
        if attn.exclusive:
            y = attn.exclude(y[:, None], v[:, None]).squeeze(1)
        return y.flatten(1)
