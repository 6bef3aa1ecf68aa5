"""What looks implausible in a re-run. It refuses nothing: a person looks at it before it is ranked."""

from collections.abc import Iterator, Mapping

import numpy as np
import zstandard

from pgolf import rules
from pgolf.contest.rerun_record import Calibration, Declared
from pgolf.contest.verdict import Speed
from pgolf.files import printable
from pgolf.noise import noisy
from pgolf.score.losses import Losses

_FLOPS = 6  # per parameter and token, forward and backward (Kaplan et al. 2020, section 2.1)


def sources(given: Mapping[str, bytes]) -> Iterator[str]:
    """Files given to the trainer that hold something that compresses like noise: weights or text as literals."""
    for name, rate in noisy(given):
        yield (
            f"{printable(name)}: {rules.NOISE_WINDOW_BYTES:,} bytes of it compress to {rate:.0%}, "
            f"code to less than {rules.NOISE_RATE:.0%}"
        )


def operations(declared: Declared, seconds: float, calibration: Calibration, devices: int) -> Iterator[str]:
    """More arithmetic than the machine can do: what is declared of a run that took `seconds` under the clock."""
    needed = _FLOPS * declared.parameters * declared.tokens / max(seconds, 1e-3)
    peak = max(calibration.fp32_tflops, calibration.bf16_tflops or 0.0) * 1e12 * devices
    if needed > peak:
        yield (
            f"{declared.tokens:,} declared tokens through {declared.parameters:,} parameters in {seconds:.1f} s are "
            f"{needed / 1e12:.2f} TFLOP/s; the machine's peak is {peak / 1e12:.2f}"
        )


def stretch(losses: Losses) -> Iterator[str]:
    """Documents that are coded in so few bits that they stand out, if they lower the score noticeably."""
    bits, sizes = losses.bits, losses.sizes
    mean = float(bits.sum() / sizes.sum())
    low = (sizes >= rules.STRETCH_DOCUMENT_BYTES) & (bits < rules.STRETCH_RATE * mean * sizes)
    saved = float((mean * sizes[low] - bits[low]).sum() / sizes.sum())
    if saved > rules.STRETCH_BPB:
        first = int(np.flatnonzero(low)[0])
        yield (
            f"{int(low.sum()):,} documents, the first is number {first:,}, take less than half the mean bits per byte "
            f"and lower the score by {saved:.4f} bpb"
        )


def slices(public: tuple[float, int], secret: float, given: Mapping[str, bytes]) -> Iterator[str]:
    """A public text that is coded better than a secret one by more than source and chance explain.

    `public` is the score in bits per byte and the text's bytes, `secret` the other score. The trainer got these
    files and nothing else of the submission, so they are all that can have carried the public text.
    """
    bpb, size = public
    gap = (secret - bpb) * size
    packed = len(
        zstandard.ZstdCompressor(level=19).compress(
            b"".join(name.encode() + data for name, data in sorted(given.items()))
        )
    )
    if gap > 8 * packed + rules.SLICE_RATE * bpb * size:
        yield (
            f"the public text is coded in {gap:,.0f} bits less than its bytes would take at the secret text's rate; "
            f"the sources and the vocabulary compress to {8 * packed:,} bits"
        )


def speed(found: Speed) -> Iterator[str]:
    """A claim from a machine that is faster than machines differ by."""
    if found.ratio < rules.SLOWEST:
        yield (
            f"by {found.basis} this machine has {found.ratio:.2f} of the speed behind the claim, "
            f"and machines of one kind differ by less"
        )
