"""`pgolf import`: submissions to the contest become artifacts whose logits are the script's own."""

import base64
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sentencepiece as spm
import torch

from pgolf import artifact, rules
from pgolf.cli.main import main
from pgolf.errors import PgolfError, Refused, UsageError
from pgolf.sandbox import wire
from pgolf.score.devices import Runtime
from pgolf.submission import script
from pgolf.submission.importing import Request, import_submission, made_up

RUNTIME = Runtime("cpu", isolated=False)

# A script as the contest's are: settings from the environment, a loss from forward, everything else in main.
PLAIN = """
import io, os, zlib
import torch
import torch.nn.functional as F
from torch import nn

class Hyperparameters:
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    model_dim = int(os.environ.get("MODEL_DIM", 8))
    train_seq_len = int(os.environ.get("TRAIN_SEQ_LEN", 32))

class GPT(nn.Module):
    def __init__(self, vocab_size, model_dim):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab_size, model_dim)
        self.scale = nn.Parameter(torch.ones(model_dim))
        self.depth = 1

    def forward(self, input_ids, target_ids):
        x = self.tok_emb(input_ids).cumsum(1)
        for _ in range(self.depth):
            x = torch.tanh(x * self.scale.to(x.dtype))
        logits = F.linear(x.reshape(-1, x.size(-1)), self.tok_emb.weight)
        return F.cross_entropy(logits.float(), target_ids.reshape(-1))

def keep_fp32(module):
    for parameter in module.parameters():
        if parameter.ndim < 2:
            parameter.data = parameter.data.float()

def quantize(state):
    return {name: ((t.float() * 64).round().to(torch.int8) if t.ndim == 2 else t) for name, t in state.items()}

def dequantize(quantized):
    return {name: (t.float() / 64 if t.ndim == 2 else t) for name, t in quantized.items()}

def eval_val(model):
    raise RuntimeError("its own evaluation is not carried over")

def main():
    args = Hyperparameters()
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    base_model = GPT(args.vocab_size, args.model_dim).to(device).bfloat16()
    keep_fp32(base_model)
    compiled = torch.compile(base_model)
    optimizer = torch.optim.Adam(base_model.parameters())
    step = 0
    while step < 100:
        base_model.depth = 2
        compiled(train_batch()).backward()
        optimizer.step()
        step += 1
    blob = zlib.compress(b"what torch.save gives")
    with open("final_model.ptz", "wb") as f:
        f.write(blob)
    with open("final_model.ptz", "rb") as f:
        blob_on_disk = f.read()
    state = torch.load(io.BytesIO(zlib.decompress(blob_on_disk)), map_location="cpu")
    base_model.load_state_dict(dequantize(state), strict=True)
    eval_val(compiled)

if __name__ == "__main__":
    main()
"""

# A later kind: forward_logits, a function that loads, GPU packages at the top, a switch after loading.
LATE = (
    "import torch\nimport triton\nimport triton.language as tl\n"
    "from flash_attn_interface import flash_attn_func as attend\n"
    "if torch.cuda.get_device_capability()[0] >= 9:\n    torch.cuda.set_device(0)\n"
    "@triton.jit\ndef kernel(pointer, block: tl.constexpr):\n    pass\n"
    + PLAIN[: PLAIN.index("def main")].replace(
        "    def forward(",
        """    def forward_logits(self, input_ids):
        x = torch.tanh(self.tok_emb(input_ids))
        heads = x.view(*x.shape[:2], 2, -1)
        x = attend(heads, heads[:, :, :1], heads[:, :, :1], causal=True, window_size=(5, 0)).flatten(2) * self.depth
        return F.linear(x, self.tok_emb.weight)

    def forward(""",
    )
    + """
def deserialize(h, device):
    eval_model = GPT(h.vocab_size, h.model_dim).to(device)
    with open("final_model.ptz", "rb") as f:
        state = torch.load(io.BytesIO(zlib.decompress(f.read())), map_location="cpu")
    eval_model.load_state_dict(dequantize(state))
    return eval_model

def train_and_eval(h, device):
    eval_model = deserialize(h, device)
    if h.vocab_size > 0:
        eval_model.depth = 3
    eval_val(eval_model)

def main():
    settings = Hyperparameters()
    train_and_eval(settings, torch.device("cuda"))

if __name__ == "__main__":
    main()
"""
)


@pytest.fixture
def submission(tmp_path: Path, tokenizer_model: Path) -> Callable[..., Request]:
    """A function that writes a script and weights for it, and returns the request to import them."""
    vocab = spm.SentencePieceProcessor(model_file=str(tokenizer_model)).vocab_size()

    def make(source: str = PLAIN, weights: Any = None, **changes: Any) -> Request:
        (tmp_path / "train_gpt.py").write_text(source)
        buffer = io.BytesIO()
        torch.manual_seed(0)
        table = (64 * torch.randn(vocab, 8)).clamp(-127, 127).to(torch.int8)
        torch.save(weights or {"tok_emb.weight": table, "scale": torch.rand(8)}, buffer)
        (tmp_path / "final.ptz").write_bytes(zlib.compress(buffer.getvalue()))
        request = Request(
            script=tmp_path / "train_gpt.py",
            weights=tmp_path / "final.ptz",
            tokenizer=tokenizer_model,
            out=tmp_path / "a.zst",
            env={"VOCAB_SIZE": str(vocab)},
            name="mine",
            author="me",
            track="laptop",
        )
        return replace(request, **changes)

    return make


def own_loss(request: Request, source: str, depth: int, change: Callable[[Any], Any]) -> float:
    """What the script's classes give for the window that an import is tried on."""
    before = source[: source.index("def deserialize" if "def deserialize" in source else "def main")]
    space: dict[str, Any] = {"__name__": "own"}
    exec(before[before.index("import io") :], space)
    vocab, context = int(request.env["VOCAB_SIZE"]), space["Hyperparameters"].train_seq_len
    model = change(space["GPT"](vocab, 8))
    state = torch.load(io.BytesIO(zlib.decompress(request.weights.read_bytes())), weights_only=True)
    model.load_state_dict(space["dequantize"](state))
    model.depth = depth
    ids = torch.from_numpy(made_up(vocab, 1, context).astype("int64"))[None]
    if hasattr(model, "forward_logits"):
        space["attend"] = windowed
        logits = model.forward_logits(ids[:, :-1])[0].detach()
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    with torch.no_grad():
        return float(model(ids[:, :-1], ids[:, 1:]))


def windowed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window_size: tuple[int, int]
) -> torch.Tensor:
    """Attention to the last tokens, written out: (B, T, H, C)."""
    k, v = (x.expand(-1, -1, q.shape[2], -1) for x in (k, v))
    scores = torch.einsum("bthc,bshc->bhts", q, k) / q.shape[-1] ** 0.5
    t = torch.arange(q.shape[1])
    age = t[:, None] - t
    scores = scores.masked_fill((age < 0) | (age > window_size[0]), -torch.inf)
    return torch.einsum("bhts,bshc->bthc", scores.softmax(-1), v)


def test_logits_from_a_loss(submission: Callable[..., Request]) -> None:
    """The model in the precision that main gives it; what training switches is named, and --set does it."""
    request = submission(switches={"depth": "2"})
    done = import_submission(request, RUNTIME)

    def cast(model: torch.nn.Module) -> torch.nn.Module:
        model.bfloat16()
        for parameter in model.parameters():
            parameter.data = parameter.data.float() if parameter.ndim < 2 else parameter.data
        return model

    assert done.nats == pytest.approx(own_loss(request, PLAIN, 2, cast), abs=1e-5)
    assert done.loader.skipped == ("line 50: base_model.depth = 2",)
    found = artifact.read(request.out, rules.ARTIFACT_BYTES)
    assert found.members["train_gpt.py"] == request.script.read_bytes()
    assert found.members["final.ptz"] == request.weights.read_bytes()
    assert (found.manifest.form, found.manifest.context) == ("window", 32)


def test_logits_of_a_late_kind(submission: Callable[..., Request]) -> None:
    """Packed source, stubs for GPU packages, attention by torch, a function that loads, a switch after it."""
    packed = base64.b85encode(lzma.compress(LATE.encode())).decode()
    request = submission(f'import lzma as L, base64 as B\nexec(L.decompress(B.b85decode("{packed}")))\n')
    done = import_submission(request, RUNTIME)
    assert done.nats == pytest.approx(own_loss(request, LATE, 3, lambda model: model), abs=1e-5)
    assert done.stubs == ("flash_attn_interface", "triton")
    assert done.evaluations == ("eval_val", "train_and_eval")


def test_a_minified_script_with_a_loss_of_its_own(submission: Callable[..., Request]) -> None:
    """A local of main with the name of a module, the device's name in a constant, a loss without cross_entropy."""
    source = PLAIN.replace("from torch import nn\n", "from torch import nn\nD = 'cuda'\n")
    source = source.replace('open("final_model.ptz", "rb")', 'open(F, "rb")')
    source = source.replace("    blob = zlib", "    F = 'final_model.ptz'\n    blob = zlib")
    logits = "        logits = F.linear"
    source = source.replace(logits, "        with torch.autocast(device_type=D): pass\n" + logits)
    source = source.replace(
        "return F.cross_entropy(logits.float(), target_ids.reshape(-1))",
        "torch.logsumexp(logits[:, :8], dim=-1)  # as a router's loss\n"
        "        lse = torch.logsumexp(logits.float(), dim=-1)\n"
        "        return (lse - logits.gather(1, target_ids.reshape(-1, 1))[:, 0]).mean() + (lse**2).mean()",
    )
    request = submission(source, switches={"depth": "2"})
    plain = import_submission(submission(switches={"depth": "2"}), RUNTIME)
    submission(source)
    assert import_submission(request, RUNTIME).nats == pytest.approx(plain.nats, abs=1e-6)


def test_a_script_without_main(submission: Callable[..., Request]) -> None:
    """What stands under its last line's condition are names that its classes see."""
    before, after = PLAIN.split("def main():\n")
    body, _ = after.split("\nif __name__")
    source = before.replace("self.depth = 1", "self.depth = args.model_dim // 8")
    source += 'if __name__ == "__main__":\n' + body
    plain = import_submission(submission(), RUNTIME)
    assert import_submission(submission(source), RUNTIME).nats == plain.nats


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_weights_with_code_are_refused(submission: Callable[..., Request]) -> None:
    request = submission(weights={"tok_emb.weight": Code()})
    with pytest.raises(Refused, match=r"final.ptz: a pickle that is more than tensors .*print"):
        import_submission(request, RUNTIME)
    assert not request.out.exists()


def test_a_script_that_lies_on_the_wire_is_refused(
    submission: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire.Logits, "decode", Mock(side_effect=wire.WireError("a frame of no known kind")))
    request = submission()
    with pytest.raises(Refused, match="broke the wire protocol: a frame of no known kind"):
        import_submission(request, RUNTIME)
    assert not request.out.exists()


def test_a_tokenizer_of_another_vocabulary(submission: Callable[..., Request]) -> None:
    weights = {"tok_emb.weight": torch.ones(500, 8, dtype=torch.int8), "scale": torch.ones(8)}
    with pytest.raises(UsageError, match=r"the tokenizer has 320 pieces and the model 500;"):
        import_submission(submission(weights=weights, env={"VOCAB_SIZE": "500"}), RUNTIME)


UNGUARDED = PLAIN.replace('if __name__ == "__main__":\n    main()', "main()")


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (UNGUARDED, Refused, "line 63 calls main, so that importing the file runs it"),
        (PLAIN + "\nGPT(1, 1).load_state_dict({})\n", Refused, "line 66 trains or loads when the file is imported"),
        (PLAIN.replace("torch.load", "read"), Refused, "line 60 needs read, which it gets"),
        (PLAIN.replace("    base_model.load_state", "    # "), Refused, "nothing in it hands the result of torch.load"),
        ("class GPT:\n  x = (", Refused, "is not Python"),
        ("x = 1\n", Refused, "defines no model"),
        ('exec(open("other.py").read())\n', Refused, "runs code from elsewhere"),
        (PLAIN.replace("TRAIN_SEQ_LEN", "LENGTH"), UsageError, "neither EVAL_SEQ_LEN nor TRAIN_SEQ_LEN; say --context"),
        (PLAIN.replace('"VOCAB_SIZE"', '"V"'), UsageError, "--env VOCAB_SIZE: train_gpt.py reads no"),
    ],
)
def test_what_cannot_be_imported(
    submission: Callable[..., Request], source: str, error: type[PgolfError], words: str
) -> None:
    """Each with its reason, before anything runs and with nothing written."""
    request = submission(source)
    with pytest.raises(error) as raised:
        import_submission(request, RUNTIME)
    assert words in str(raised.value)
    assert not request.out.exists()


def test_arguments_are_checked(submission: Callable[..., Request], capsys: pytest.CaptureFixture[str]) -> None:
    request = submission()
    plain = ["import", str(request.script), "--weights", str(request.weights), "--tokenizer"]
    assert main([*plain, str(request.script), "-o", str(request.out)]) == UsageError.exit_code
    assert "is no SentencePiece model" in capsys.readouterr().err
    assert main([*plain, "nowhere.model"]) == UsageError.exit_code
    for wrong in ("--env", "NUM LAYERS=9"), ("--env", "X"), ("--set", "depth=f()"):
        with pytest.raises(SystemExit):
            main([*plain, str(request.tokenizer), *wrong])


def test_settings_come_from_the_environment_or_the_default() -> None:
    read = script.parse("a.py", PLAIN.encode())
    assert script.setting(read, "TRAIN_SEQ_LEN", {}) == 32
    assert script.setting(read, "TRAIN_SEQ_LEN", {"TRAIN_SEQ_LEN": "64"}) == 64
    assert script.setting(read, "EVAL_SEQ_LEN", {}) is None
    assert script.unused(["MODEL_DIM", "MODEL"], read) == ["MODEL"]
