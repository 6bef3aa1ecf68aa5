"""`pgolf prove`: a score is a code length, shown by compressing the text to that length and getting it back.

The first steps of the schedule that the scorer walked are walked again and coded; then another process, whose
predictor sits in another sandbox, decodes them. It receives only the artifact and the compressed file, so a
predictor that used future tokens while it was scored has none to use.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pgolf import artifact, rules
from pgolf.artifact import Artifact
from pgolf.data.dataset import CanonicalText, Dataset, open_dataset
from pgolf.errors import EnvironmentBroken, Refused, UsageError
from pgolf.files import beside, printable
from pgolf.proof import compression
from pgolf.proof.compression import Packet
from pgolf.proof.decoder import decode_elsewhere
from pgolf.sandbox import lock
from pgolf.sandbox.box import check_hidden
from pgolf.sandbox.probe import isolation
from pgolf.sandbox.wire import Ids
from pgolf.score import record, schedule, tokenization
from pgolf.score.devices import Runtime, one_thread
from pgolf.score.record import Proof, Record, Submission
from pgolf.score.schedule import Targets
from pgolf.score.score import reasons_of_submission, reasons_of_text


@dataclass(frozen=True)
class Amount:
    """How much to prove: all steps, about N bytes of text, or N seconds of coding."""

    everything: bool = False
    bytes: int | None = None
    seconds: float = rules.PROOF_SECONDS


def prove(path: Path, data: Path, amount: Amount, runtime: Runtime) -> Record:
    """Prove the recorded score of the artifact at `path` on the validation text of `data`.

    The record may come from a stranger. What of it can be known is compared, but a proof is about its bits alone: not
    about isolation and the other things that make a score eligible.

    Returns the score's record with the figures in "proof": status "ok" (proven), or "refused" (the submission breaks a
    rule, or its code is longer than its record says) or "failed" (this machine or the data is not fit) with the reason.
    Raises UsageError when there is nothing to prove.
    """
    started = time.monotonic()
    read = artifact.read(path, rules.ARTIFACT_BYTES)
    scored = _read_record(path, read.sha256)
    latest = Proof(bpb=scored.bpb, of_steps=scored.steps, of_bytes=scored.bytes, data=scored.data)
    reason: str | None = None
    try:
        with closing(_stages(latest, scored, read, path, data, amount, runtime)) as stages:
            for proof in stages:
                latest = proof  # which knows more than the one before
        status = "ok"
    except Refused as error:
        status, reason = "refused", str(error)
    except EnvironmentBroken as error:
        status, reason = "failed", str(error)
    seconds = {**latest.seconds, "total": time.monotonic() - started}
    return replace(scored, proof=replace(latest, status=status, reason=reason, seconds=seconds))


def _read_record(path: Path, digest: str) -> Record:
    """The record beside the artifact at `path`. Raises UsageError when it is not of the artifact with this SHA-256."""
    place = beside(path, ".score.json")
    try:
        found = record.read(place)
        if found.artifact.sha256 == digest and found.status == "ok" and found.rules == rules.VERSION:
            return found
    except (OSError, ValueError):
        pass
    raise UsageError(f"{place}: is no record of a score of this artifact; run `pgolf score {path}` first")


def _stages(
    proof: Proof, scored: Record, read: Artifact, path: Path, data: Path, amount: Amount, runtime: Runtime
) -> Generator[Proof]:
    """Yield the proof whenever more of it is known, so that a refusal keeps what was known by then."""
    if read.manifest.form != "step":
        raise UsageError("a score of the window form cannot be proven; only the step form can")
    if fault := record.contradiction(scored):
        raise Refused(f"not proven: no score wrote this record: {fault}")
    assert scored.data  # then it has it
    dataset = open_dataset(data)
    text = dataset.canonical_text()
    texts = text.documents[: scored.documents]
    if text.sha256 != scored.data.sha256 or sum(map(len, texts)) != scored.bytes:
        raise UsageError(f"{data}: is not the text of the record; prove it on {printable(scored.data.name)}")
    _check_eligible(scored, read, dataset, text)
    with lock.hold(), one_thread(runtime.device), compression.judged():
        yield (proof := replace(proof, isolation=isolation().description if runtime.isolated else "none"))
        if runtime.isolated:
            check_hidden(dataset.root, read.manifest.packages)
        encoded = compression.tokenize(read, texts, runtime)
        _check_figures(scored, read, encoded)
        done = compression.encode(read, texts, encoded, runtime, _more(scored, amount), scored.plan)
    packet, code_bits = done.packet, 8 * len(done.packet.code)
    recorded = recorded_bits(scored, packet.steps)
    proof = replace(proof, steps=packet.steps, environment=packet.environment, seconds={"compress": done.seconds})
    yield (proof := replace(proof, code_bits=code_bits, recorded_bits=recorded))
    allowed = recorded * (1 + rules.PROOF_TOLERANCE) + rules.PROOF_TOLERANCE_BITS
    if code_bits > allowed:
        raise Refused(
            f"not proven: {packet.steps:,} steps take {code_bits:,} bits, where the record says {recorded:,.0f}"
        )
    started = time.monotonic()
    back = decode_elsewhere(path, packet, runtime)
    yield (proof := replace(proof, seconds={**proof.seconds, "decompress": time.monotonic() - started}))
    targets = Targets.of(read.manifest, encoded)
    known = coded_positions(read.manifest, targets, packet)
    if not np.array_equal(back, targets.tokens[known]):
        raise Refused("not proven: the decoded tokens differ from those of the text")
    yield (proof := replace(proof, tokens=len(known)))
    with lock.hold(), compression.judged():
        yield replace(proof, bytes=proven_bytes(read, texts, encoded, known, runtime))


def _check_eligible(scored: Record, read: Artifact, dataset: Dataset, text: CanonicalText) -> None:
    """Raises Refused for a record that says of a score that it counts, although artifact or text are against it."""
    assert scored.bytes and scored.documents  # a score has them
    against = [*reasons_of_submission(read.manifest), *reasons_of_text(dataset, scored.bytes)]
    if scored.documents < len(text.documents):
        against.append("only a sample of the documents")
    if scored.eligible and against:
        raise Refused(f"not proven: no score wrote this record: it is eligible, although: {'; '.join(against)}")


def _check_figures(scored: Record, read: Artifact, encoded: Sequence[Ids]) -> None:
    """Raises Refused for a record that says something else than artifact and text do."""
    manifest, lengths = read.manifest, [len(ids) + 1 for ids in encoded]
    known = {
        "form": manifest.form,
        "submission": Submission(manifest.name, manifest.author),
        "tokens": sum(lengths),
        "steps": schedule.length(manifest, lengths),
    }
    for field, value in known.items():
        if (found := getattr(scored, field)) != value:
            raise Refused(
                f"not proven: no score wrote this record: its {field} is {printable(found):.80}, but has to be "
                f"{printable(value):.80}"
            )


def _more(scored: Record, amount: Amount) -> Callable[[int, int, float], bool]:
    """Whether to code another step. Stops only at multiples of `rules.CODE_EVERY`, where the record has the bits."""

    assert scored.tokens and scored.bytes  # a score has them
    tokens_per_byte = scored.tokens / scored.bytes

    def more(steps: int, tokens: int, seconds: float) -> bool:
        if amount.everything or steps == 0 or steps % rules.CODE_EVERY:
            return True
        if amount.bytes is not None:
            return tokens < amount.bytes * tokens_per_byte
        return seconds < amount.seconds

    return more


def recorded_bits(scored: Record, steps: int) -> float:
    """The code length of the first `steps` steps by the record."""
    assert scored.bpb is not None and scored.bytes and scored.code  # a score of the step form has them
    if steps == scored.steps:
        return scored.bpb * scored.bytes
    return scored.code.bits[steps // scored.code.every - 1]


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
    read: Artifact, texts: Sequence[bytes], encoded: Sequence[Ids], known: schedule.Index, runtime: Runtime
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
    decoded = iter(tokenization.decode(read, prefixes, sizes, runtime, nullcontext(compression.coding_deadline(0))))
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


def table(proof: Proof) -> str:
    """The proof for people: a short table, or one line when there is none."""
    if proof.status != "ok":
        return f"{proof.status}: {proof.reason}"
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in record.phases(proof.seconds).items())
    assert proof.data and proof.code_bits is not None and proof.recorded_bits  # a proof has them
    share = proof.code_bits / proof.recorded_bits - 1
    lines = {
        "score": f"{proof.bpb:.6f} bpb, as recorded",
        "text": f"{printable(proof.data.name)}: {proof.bytes:,} of {proof.of_bytes:,} bytes",
        "tokens": f"{proof.tokens:,}",
        "steps": f"the first {proof.steps:,} of {proof.of_steps:,}",
        "recorded": f"{proof.recorded_bits:,.0f} bits",
        "code": f"{proof.code_bits:,} bits ({share:+.3%})",
        "seconds": seconds,
        "isolation": proof.isolation,
        "proven": "another process got these bytes back from the artifact and the code alone",
        "not proven": "that the score is eligible"
        + ("" if proof.steps == proof.of_steps else ", and the bits of the steps that follow"),
    }
    return "\n".join(f"{name:<11} {value}" for name, value in lines.items())
