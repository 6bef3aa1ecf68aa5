"""`pgolf prove`: a score is a code length, shown by compressing the text to that length and getting it back.

The first steps of the schedule that the scorer walked are walked again and coded; then another process, whose
predictor sits in another sandbox, decodes them. It receives only the artifact and the compressed file, so a
predictor that used future tokens while it was scored has none to use.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import artifact, rules
from pgolf.artifact import Artifact
from pgolf.data.dataset import open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.machine import end_with_parent
from pgolf.names import beside
from pgolf.proof import compression
from pgolf.proof.compression import Packet
from pgolf.sandbox import lock
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.probe import isolation
from pgolf.sandbox.wire import Ids
from pgolf.score import record, schedule, tokenization
from pgolf.score.devices import find_device, one_thread
from pgolf.score.schedule import Targets

Proof = dict[str, Any]


@dataclass(frozen=True)
class Amount:
    """How much to prove: all steps, about N bytes of text, or N seconds of coding."""

    everything: bool = False
    bytes: int | None = None
    seconds: float = rules.PROOF_SECONDS


def prove(path: Path, data: Path, amount: Amount, device: str = "auto", isolated: bool = True) -> record.Record:
    """Prove the recorded score of the artifact at `path` on the validation text of `data`.

    Returns the score's record with the figures in "proof": status "ok" (proven), or "refused" (the submission breaks a
    rule, or its code is longer than its record says) or "failed" (this machine or the data is not fit) with the reason.
    Raises UsageError when there is nothing to prove.
    """
    started = time.monotonic()
    read = artifact.read(path, rules.ARTIFACT_BYTES)
    scored = _read_record(path, read.sha256)
    proof: Proof = {
        "status": "failed",
        "reason": None,
        "steps": None,
        "of_steps": scored["steps"],
        "tokens": None,
        "bytes": None,
        "of_bytes": scored["bytes"],
        "recorded_bits": None,
        "code_bits": None,
        "data": scored["data"],
        "isolation": None,
        "environment": None,
        "seconds": {},
    }
    try:
        _prove(proof, scored, read, path, data, amount, find_device(device), isolated)
        proof["status"] = "ok"
    except Refused as error:
        proof.update(status="refused", reason=str(error))
    except EnvironmentBroken as error:
        proof["reason"] = str(error)
    proof["seconds"]["total"] = round(time.monotonic() - started, 3)
    return {**scored, "proof": proof}


def _read_record(path: Path, digest: str) -> record.Record:
    """The record beside the artifact at `path`. Raises UsageError when it is not of the artifact with this SHA-256."""
    place = beside(path, ".score.json")
    try:
        found: record.Record = json.loads(place.read_text(encoding="utf-8"))
        if found["artifact"]["sha256"] == digest and found["status"] == "ok" and found["rules"] == rules.VERSION:
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UsageError(f"{place}: is no record of a score of this artifact; run `pgolf score {path}` first")


def _prove(
    proof: Proof,
    scored: record.Record,
    read: Artifact,
    path: Path,
    data: Path,
    amount: Amount,
    device: str,
    isolated: bool,
) -> None:
    """Fill `proof` step by step, so that a refusal keeps what was known by then."""
    if read.manifest.form != "step":
        raise UsageError("a score of the window form cannot be proven; only the step form can")
    dataset = open_dataset(data)
    text = dataset.canonical_text()
    texts = text.documents[: scored["documents"]]
    if text.sha256 != scored["data"]["sha256"] or sum(map(len, texts)) != scored["bytes"]:
        raise UsageError(f"{data}: is not the text of the record; prove it on {scored['data']['name']}")
    with lock.hold(), one_thread(device), compression.judged():
        proof["isolation"] = isolation().description if isolated else "none"
        if isolated:
            check_hidden(dataset.root)
        limit = nullcontext(time.monotonic() + compression.coding_seconds(0))
        encoded = tokenization.encode(read, texts, isolated, limit)
        tokenization.check_decoding(read, texts, encoded, isolated, limit)
        done = compression.encode(read, texts, encoded, device, isolated, _more(scored, amount), scored["plan"])
    packet, code_bits = done.packet, 8 * len(done.packet.code)
    recorded = recorded_bits(scored, packet.steps)
    proof.update(steps=packet.steps, environment=packet.environment, code_bits=code_bits, recorded_bits=recorded)
    proof["seconds"]["compress"] = round(done.seconds, 3)
    allowed = recorded * (1 + rules.PROOF_TOLERANCE) + rules.PROOF_TOLERANCE_BITS
    if code_bits > allowed:
        raise Refused(
            f"not proven: {packet.steps:,} steps take {code_bits:,} bits, where the record says {recorded:,.0f}"
        )
    started = time.monotonic()
    back = _decode(path, packet, device, isolated)
    proof["seconds"]["decompress"] = round(time.monotonic() - started, 3)
    targets = Targets.of(read.manifest, encoded)
    known = coded_positions(read.manifest, targets, packet)
    if not np.array_equal(back, targets.tokens[known]):
        raise Refused("not proven: the decoded tokens differ from those of the text")
    proof["tokens"] = len(known)
    with lock.hold(), compression.judged():
        proof["bytes"] = proven_bytes(read, texts, encoded, known, isolated)


def _more(scored: record.Record, amount: Amount) -> Callable[[int, int, float], bool]:
    """Whether to code another step. Stops only at multiples of `rules.CODE_EVERY`, where the record has the bits."""

    def more(steps: int, tokens: int, seconds: float) -> bool:
        if amount.everything or steps == 0 or steps % rules.CODE_EVERY:
            return True
        if amount.bytes is not None:
            return tokens < amount.bytes * float(scored["tokens"]) / float(scored["bytes"])
        return seconds < amount.seconds

    return more


def recorded_bits(scored: record.Record, steps: int) -> float:
    """The code length of the first `steps` steps by the record."""
    if steps == scored["steps"]:
        return float(scored["bpb"] * scored["bytes"])
    return float(scored["code"]["bits"][steps // scored["code"]["every"] - 1])


def coded_positions(manifest: artifact.Manifest, targets: Targets, packet: Packet) -> schedule.Index:
    """Where the coded tokens stand in `targets.tokens`: document by document, or part by part."""
    walk = schedule.steps(manifest, schedule.count(manifest, packet.documents, packet.tokens))
    step = schedule.begin(walk)
    found = []
    for _ in range(packet.steps):
        assert step is not None  # the encoder made these very steps
        found.append(targets.at(step))
        step = schedule.advance(walk, targets.tokens[found[-1]])
    return np.sort(np.concatenate(found))


def proven_bytes(
    read: Artifact, texts: Sequence[bytes], encoded: Sequence[Ids], known: schedule.Index, isolated: bool
) -> int:
    """Bytes of the text that the tokens at positions `known` spell, by decoding; whole characters only."""
    ends = np.cumsum([len(ids) + 1 for ids in encoded])
    breaks = np.flatnonzero(np.diff(known) > 1) + 1
    cuts: list[tuple[int, int]] = []  # document and number of its tokens, at the start and the end of each run
    for run in np.split(known, breaks):
        for position in (int(run[0]), int(run[-1]) + 1):
            document = int(np.searchsorted(ends, position, side="right"))
            begin = int(ends[document - 1]) if document else 0
            cuts.append((document, position - begin))
    inside = [(document, n) for document, n in cuts if document < len(encoded)]
    sizes = [len(texts[document]) for document, _ in inside]
    prefixes = [encoded[document][:n] for document, n in inside]
    limit = nullcontext(time.monotonic() + compression.coding_seconds(0))
    decoded = iter(tokenization.decode(read, prefixes, sizes, isolated, limit))
    before = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    places = [
        int(before[document]) + (_agreeing(next(decoded), texts[document]) if document < len(encoded) else 0)
        for document, _ in cuts
    ]
    return sum(max(0, end - start) for start, end in zip(places[::2], places[1::2], strict=True))


def _agreeing(decoded: bytes, text: bytes) -> int:
    """How many first bytes agree, whole characters only."""
    unequal = (i for i, (a, b) in enumerate(zip(decoded, text, strict=False)) if a != b)
    count = next(unequal, min(len(decoded), len(text)))
    while count < len(text) and text[count] & 0xC0 == 0x80:  # inside a character
        count -= 1
    return count


def _decode(path: Path, packet: Packet, device: str, isolated: bool) -> Ids:
    """The tokens that another process decodes, in the order of `coded_positions`."""
    command = [sys.executable, "-m", "pgolf.proof.decoder", str(path.resolve()), device, str(int(isolated))]
    done = subprocess.run(
        command, input=packet.encode(), capture_output=True, cwd="/", preexec_fn=end_with_parent, check=False
    )
    if done.returncode == 0 and len(done.stdout) % 4 == 0:
        return np.frombuffer(done.stdout, dtype="<i4").astype(np.int32)
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
    if done.returncode == Refused.exit_code:
        raise Refused(f"not proven: {lines[-1]}")
    raise EnvironmentBroken(f"decoding failed: {lines[-1]}")


def table(proof: Proof) -> str:
    """The proof for people: a short table, or one line when there is none."""
    if proof["status"] != "ok":
        return f"{proof['status']}: {proof['reason']}"
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in proof["seconds"].items() if name != "total")
    share = proof["code_bits"] / proof["recorded_bits"] - 1
    lines = {
        "text": f"{proof['data']['name']}: {proof['bytes']:,} of {proof['of_bytes']:,} bytes",
        "tokens": f"{proof['tokens']:,}",
        "steps": f"the first {proof['steps']:,} of {proof['of_steps']:,}",
        "recorded": f"{proof['recorded_bits']:,.0f} bits",
        "code": f"{proof['code_bits']:,} bits ({share:+.3%})",
        "seconds": seconds,
        "isolation": proof["isolation"],
        "proven": "another process got these bytes back from the artifact and the code alone",
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())
