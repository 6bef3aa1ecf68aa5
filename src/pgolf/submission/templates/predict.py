"""Logits of the model of a contest script, in pgolf's window form. Written by `pgolf import`.

The script is a member, unchanged. It is imported, so that its main does not run. `build.py` holds those of its
statements that make the model and read the weights. `import.json` has the settings.
"""

import builtins
import dis
import importlib.machinery
import importlib.util
import inspect
import json
import os
import pickle
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


def load(root, device):
    settings = json.loads((root / "import.json").read_text(encoding="utf-8"))
    os.environ.update(settings["env"])
    sys.meta_path.append(Stubs(settings["stubs"]))
    stand_in(device)
    weights = root / settings["weights"]
    only_tensors(weights)
    script = imported(root / settings["script"], weights, device)
    Stub.importing = False
    code = compile((root / "build.py").read_text(encoding="utf-8"), str(root / "build.py"), "exec")
    names = space(code, script)
    exec(code, names)
    pieces = json.loads((root / "submission.json").read_text(encoding="utf-8"))["vocab_size"]
    return Logits(names[settings["model"]].to(device).eval(), device, settings["autocast"], pieces)


class Logits(nn.Module):
    """ids (B, T) -> logits (B, T, V): from `forward_logits`, or from what `forward` computes its loss of."""

    def __init__(self, model, device, autocast, pieces):
        super().__init__()
        self.model, self.device, self.autocast, self.pieces = model, device, autocast, pieces
        required = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
        self.targets = len([p for p in required if p.kind == p.POSITIONAL_OR_KEYWORD]) > 1

    def forward(self, ids):
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            logits = self.logits(ids)
        return logits.reshape(*ids.shape, logits.shape[-1])

    def logits(self, ids):
        if hasattr(self.model, "forward_logits"):
            found = self.model.forward_logits(ids)
            return found[0] if isinstance(found, tuple) else found
        with intercepted(ids.numel(), self.pieces):
            try:
                found = self.model(ids, ids) if self.targets else self.model(ids)  # these targets tell it nothing new
            except Caught as caught:
                return caught.logits
        if isinstance(found, torch.Tensor) and found.shape[:2] == ids.shape and found.ndim == 3:
            return found
        raise ValueError(
            f"the model has no forward_logits, and its forward hands none of cross_entropy, log_softmax and logsumexp "
            f"a row of logits for each of {ids.numel()} tokens"
        )


LOSSES = (F, "cross_entropy"), (F, "log_softmax"), (torch, "log_softmax"), (torch, "logsumexp")


class Caught(BaseException):  # no `except Exception` of the script stops it
    """Ends `forward` where it computes its loss."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits


@contextmanager
def intercepted(tokens, pieces):
    """Raise Caught when a function that a loss is made of is handed logits (tokens, V), V at least `pieces`."""

    def instead(original):
        def function(input, *args, **kwargs):
            if input.ndim == 2 and len(input) == tokens and input.shape[1] >= pieces:
                raise Caught(input)
            return original(input, *args, **kwargs)

        return function

    originals = [(module, name, getattr(module, name)) for module, name in LOSSES]
    try:
        for module, name, original in originals:
            setattr(module, name, instead(original))
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def imported(path, weights, device):
    """The script as a module. Binary files that it opens and that are not there are the weights."""

    def opened(file, mode="r", *args, **kwargs):
        if "b" in mode and not set(mode) & set("wax+") and not Path(file).exists():
            file = weights
        return builtins.open(file, mode, *args, **kwargs)  # noqa: PTH123 (it may be a descriptor)

    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    module.open = opened
    spec.loader.exec_module(module)
    for name, value in list(vars(module).items()):
        if isinstance(value, torch.device) and value.type == "cuda":
            setattr(module, name, device)
        elif isinstance(value, str) and value == "cuda":
            setattr(module, name, device.type)
    module.device = device
    return module


def space(code, script):
    """The names that build.py runs with: the script's, or a copy of them.

    A copy where it gives the name of a module, class or function to something else, since what was local to the
    script's main must not replace what its classes use. In minified scripts F is such a name.
    """
    stored = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_NAME"}
    known = vars(script)
    clash = any(callable(known.get(name)) or isinstance(known.get(name), types.ModuleType) for name in stored)
    return dict(known) if clash else known


def only_tensors(weights):
    """Let the script's own code read the weights, but never run code that is in them."""
    original = torch.load

    def tensors(file, *args, **kwargs):
        if isinstance(file, (str, os.PathLike)):
            file = weights
        try:
            return original(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            words = str(error).split("WeightsUnpickler error: ")[-1].split("\n")[0].split(". ")[0]
            raise ValueError(f"{weights.name}: a pickle that is more than tensors and plain values ({words})") from None
        except EOFError:
            raise ValueError(f"{weights.name}: ends too early") from None

    def refuse(*args, **kwargs):
        raise ValueError(f"{weights.name} is read with pickle, which runs code; save it with torch.save")

    torch.load, pickle.load, pickle.loads = tensors, refuse, refuse


def stand_in(device):
    """What scripts call on their way to a GPU and what is the same without one."""
    torch.compile = lambda model=None, *args, **kwargs: model if model is not None else (lambda function: function)
    nn.Module.cuda = torch.Tensor.cuda = lambda self, *args, **kwargs: self.to(device)
    dist.init_process_group = dist.barrier = dist.destroy_process_group = lambda *args, **kwargs: None
    if device.type != "cuda":
        for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "manual_seed_all"):
            setattr(torch.cuda, name, lambda *args, **kwargs: None)
        torch.cuda.get_device_capability = lambda *args: (0, 0)
        torch.cuda.get_device_name = lambda *args: "none"


class Stub(types.ModuleType):
    """A package that is not here, or a name in it. While the script is imported it may be called, as a decorator is."""

    importing = True
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "flash_attn_func" and self.__name__.startswith("flash_attn"):
            return attention
        return Stub(f"{self.__name__}.{name}")

    def __getitem__(self, key):
        return self

    def __call__(self, *args, **kwargs):
        if Stub.importing:
            return self
        raise RuntimeError(f"the model needs {self.__name__}, which is not in the sandbox (a kernel for GPUs?)")


class Stubs:
    """Finds a stub for each package named."""

    def __init__(self, names):
        self.names = set(names)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def attention(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), **options):
    """flash_attn_func with torch: (B, T, H, C) each; k and v may have fewer heads."""
    if any(options.values()):
        raise RuntimeError(f"flash_attn_func is called with {', '.join(sorted(options))}, which torch does not have")
    mask = None
    if tuple(window_size) != (-1, -1):
        age = torch.arange(q.shape[1], device=q.device)[:, None] - torch.arange(k.shape[1], device=q.device)
        left, right = (w if w >= 0 else q.shape[1] for w in window_size)
        mask = (age <= left) & (age >= (0 if causal else -right))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal and mask is None, scale=softmax_scale, enable_gqa=grouped
    )
    return out.transpose(1, 2)
