"""`pgolf prove`: a score is a code length, shown by compressing text to that length and getting it back.

Documents of the validation text are drawn, scored as ever, compressed, and decompressed by another process whose
predictor sits in a box of its own. That process is told nothing but the artifact and the compressed file, so a
predictor that looked at the future while it was scored has nothing to look at.
"""

import ctypes
import json
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import artifact, rules
from pgolf.artifact import Artifact
from pgolf.data.dataset import CanonicalText, file_digest, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.proof import compression as codec
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.probe import isolation
from pgolf.score import record
from pgolf.score.score import find_devices

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_END_BYTES = 8  # a range coder ends on whole words of 32 bits, two at most

Proof = dict[str, Any]


def draw(text: CanonicalText, size: int, rng: np.random.Generator) -> list[int]:
    """Numbers of documents, ascending, of at least `size` bytes together.

    They are drawn without replacement from the whole text, those longer than a quarter of `size` only when the others
    are used up: a token costs a run of the model over the tokens before it, and what documents side by side share in
    one batch, a long one pays alone. Raises UsageError where the text is too short.
    """
    if text.bytes < size:
        raise UsageError(f"the validation text has only {text.bytes:,} bytes; --bytes asks for {size:,}")
    order = rng.permutation(len(text.documents)).tolist()
    order.sort(key=lambda number: max(len(text.documents[number]), size // 4))
    lengths = np.cumsum([len(text.documents[number]) for number in order])
    return sorted(order[: int(np.searchsorted(lengths, size)) + 1])


def prove(
    path: Path,
    data: Path,
    size: int = rules.PROOF_BYTES,
    seed: int | None = None,
    device: str = "auto",
    isolated: bool = True,
) -> Proof:
    """Prove the score of the artifact at `path` on `size` bytes of the validation text of `data`.

    `seed` draws the documents; None: a secret one. Returns the figures: status "ok" (proven), or "refused" (the
    submission breaks a rule, or its code is longer than its score says) or "failed" (this machine or the data is
    not fit) with the reason. Raises UsageError when there is nothing to prove.
    """
    started = time.monotonic()
    seed = secrets.randbits(63) if seed is None else seed
    proof: Proof = {
        "status": "failed",
        "reason": None,
        "seed": seed,
        "documents": None,
        "bytes": None,
        "tokens": None,
        "scored_bytes": None,
        "code_bytes": None,
        "file_bytes": None,
        "ratio": None,
        "tolerance": rules.PROOF_TOLERANCE,
        "data": None,
        "isolation": None,
        "environment": None,
        "seconds": {},
    }
    try:
        read = artifact.read(path, rules.ARTIFACT_BYTES)
        device = find_devices(device)[0]
        proof["isolation"] = isolation().description if isolated else "none"
        dataset = open_dataset(data)
        if isolated:
            check_hidden(dataset.root)
        text = dataset.canonical_text()
        proof["data"] = {"name": dataset.name, "sha256": text.sha256}
        texts = [text.documents[number] for number in draw(text, size, np.random.default_rng(seed))]
        _prove(proof, read, path, texts, device, isolated)
        proof["status"] = "ok"
    except Refused as error:
        proof.update(status="refused", reason=str(error))
    except EnvironmentBroken as error:
        proof["reason"] = str(error)
    proof["seconds"]["total"] = round(time.monotonic() - started, 3)
    return proof


def _prove(proof: Proof, read: Artifact, path: Path, texts: list[bytes], device: str, isolated: bool) -> None:
    """Fill `proof` step by step, so that a refusal keeps what was known by then."""
    proof.update(documents=len(texts), bytes=sum(map(len, texts)))
    done = codec.compress(read, texts, device, isolated)
    packet = done.packet
    file = packet.encode()
    scored, code = done.scored_bits / 8, len(packet.code)
    proof.update(tokens=packet.tokens, environment=packet.environment)
    ratio = code / scored if scored else 1.0
    proof.update(scored_bytes=round(scored, 3), code_bytes=code, file_bytes=len(file), ratio=round(ratio, 6))
    proof["seconds"].update(done.seconds)
    if code > (1 + rules.PROOF_TOLERANCE) * scored + _END_BYTES:
        raise Refused(
            f"not proven: the text takes {code:,} bytes, {code - scored:,.1f} more than its scored code length of "
            f"{scored:,.1f}, where {rules.PROOF_TOLERANCE:.0%} is allowed"
        )
    started = time.monotonic()
    back = _decompress(path, file, device, isolated)
    proof["seconds"]["decompress"] = round(time.monotonic() - started, 3)
    if back != codec.text_file(texts):
        raise Refused("not proven: the decompressed text differs from the one that was compressed")


def _decompress(path: Path, file: bytes, device: str, isolated: bool) -> bytes:
    """What `pgolf decompress` makes of the bytes of a .pgz file, in a process of its own."""
    command = [sys.executable, "-m", "pgolf.cli", "decompress", str(path.resolve()), "-", "-o", "-"]
    command += ["--device", device, *([] if isolated else ["--no-sandbox"])]
    done = subprocess.run(command, input=file, capture_output=True, cwd="/", preexec_fn=_end_with_parent, check=False)
    if done.returncode == 0:
        return done.stdout
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
    reason = lines[-1].removeprefix("pgolf: ")
    if done.returncode == Refused.exit_code:
        raise Refused(f"not proven: {reason}")
    raise EnvironmentBroken(f"decompressing failed: {reason}")


def _end_with_parent() -> None:
    """In the child: let the kernel end it with its parent, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def find_record(path: Path) -> tuple[Path, record.Record]:
    """Where a proof of the artifact at `path` belongs, and what stands there: its score record, or a file of its own.

    artifact.score.json takes it where that is about this very artifact, otherwise artifact.proof.json is written.
    """
    digest, size = file_digest(path), path.stat().st_size
    scored = path.with_suffix(".score.json")
    try:
        found = json.loads(scored.read_text(encoding="utf-8"))
        if found["artifact"]["sha256"] == digest:
            return scored, found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return path.with_suffix(".proof.json"), {"artifact": {"sha256": digest, "bytes": size}}


def table(proof: Proof) -> str:
    """The proof for people: a short table, or one line when there is none."""
    if proof["status"] != "ok":
        return f"{proof['status']}: {proof['reason']}"
    bits = 8 / proof["bytes"]
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in proof["seconds"].items() if name != "total")
    lines = {
        "text": f"{proof['data']['name']}: {proof['documents']:,} documents, {proof['bytes']:,} bytes, "
        f"{proof['tokens']:,} tokens",
        "scored": f"{proof['scored_bytes']:,.1f} bytes, {bits * proof['scored_bytes']:.6f} bits per byte",
        "code": f"{proof['code_bytes']:,} bytes, {bits * proof['code_bytes']:.6f} bits per byte "
        f"({proof['ratio'] - 1:+.3%}; {proof['tolerance']:+.0%} allowed)",
        "file": f"{proof['file_bytes']:,} bytes with its header",
        "seconds": seconds,
        "isolation": proof["isolation"],
        "proven": "another process got the text back, byte for byte",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())
