"""The rules in numbers. Limits appear here and nowhere else."""

from dataclasses import dataclass

from pgolf.errors import UsageError


@dataclass(frozen=True)
class Track:
    """One competition: what an artifact may weigh and how long it may take."""

    name: str
    artifact_bytes: int
    """Largest size of the artifact on disk, in bytes (decimal megabytes, not MiB)."""
    prepare_seconds: float
    """Wall clock from the start of train.py to the hand-over of the data: imports, compilation, warm-up."""
    train_seconds: float | None
    """Wall clock from the hand-over of the data to that of the artifact; None: no limit."""
    eval_seconds: float
    """Wall clock of what the submission causes while it is scored: encode, decode, load, every step."""
    hardware: str
    interval_bpb: float = 0.005
    """A re-run whose 95 % interval has a larger half-width decides nothing about a claim."""
    source_bytes: int = 200_000
    """Most bytes of an author that a trainer can read: what was learned before the clock could lie in them."""


TRACKS = {
    track.name: track
    for track in (
        Track("main", 16_000_000, 300.0, 600.0, 600.0, "8xH100 SXM"),
        Track("unlimited", 16_000_000, 300.0, None, 600.0, "8xH100 SXM"),
        Track("laptop", 1_000_000, 120.0, 60.0, 120.0, "CPU", 0.02, 128_000),
    )
}

ARTIFACT_BYTES = max(track.artifact_bytes for track in TRACKS.values())  # while its track is not known
SOURCE_BYTES = max(track.source_bytes for track in TRACKS.values())  # likewise

VERSION = 2
"""Of the rules: stands in every record. Scores under different versions are not compared."""
ELIGIBLE_TEXT_BYTES = 2_000_000
"""What a sandbox can know of the machine's global counters is worth tens of bits: nothing, in a text of this size."""

# Bounds on what a submission declares or sends, each checked before it costs the scorer memory or time. With them the
# scorer needs at most 4 GiB and 20 bytes for each byte of the text.
UNPACKED_BYTES = 256 * 1024 * 1024
MEMBERS = 256
MANIFEST_BYTES = 64 * 1024
ZSTD_WINDOW_BYTES = 128 * 1024 * 1024  # what zstd's highest level asks for
VOCAB_SIZE = 1 << 20
LANES = 4096
CONTEXT = 1 << 14
LOGITS = 1 << 26  # vocab_size times lanes, or times context: what is in memory at once
TOKENS_PER_BYTE = 4  # a tokenizer may not flood the scorer; plain bytes need 1

# A submission's folder.
ENTRY_FILES = 500  # folders count
ENTRY_BYTES = 200_000_000
ENTRY_SEEDS = 100

# What a worker may use while it is scored.
WORKER_MEMORY_BYTES = 16 * 1024**3
WORKER_PROCESSES = 512  # threads count
WORKER_DISK_BYTES = 1024**3
WORKER_OUTPUT_BYTES = 1024 * 1024  # stdout and stderr together

# What train.py may be, use and hand over where an organizer runs it again.
NOISE_WINDOW_BYTES = 8192  # of code, compressed alone
NOISE_RATE = 0.5  # of its size after that, at most: real code has under 0.5, noise in hexadecimal 0.51, in base64 0.76
TOKENIZER_PIECE_BYTES = 10  # text of a piece, on average, that is no source: real vocabularies have 4 to 8.5 ...
TOKENIZER_TEXT_BYTES = 400_000  # ... and of all pieces: 50,000 of a real vocabulary
TOKENIZER_OTHER_BYTES = 8192  # of a tokenizer besides pieces and standard normalisation rules: real ones have 2,200
TRAIN_MEMORY = 0.75  # of the machine's
TRAIN_PROCESSES = 8192  # threads count
TRAIN_DISK_BYTES = 8 * 1024**3
TRAIN_OUTPUT_BYTES = 64 * 1024 * 1024
TRAIN_LOG_BYTES = 16 * 1024 * 1024

# The record's cumulative code length, the spot check of the window form, compression and proof.
CODE_EVERY = 64  # steps
SPOT_CHECK_TOKENS = 1000
SPOT_CHECK_NATS = 0.1  # beyond what bf16 rounds (docs/security.md)
CODED_TOKENS = 1 << 28  # most tokens in one file, so that a hostile one ends
CODING_SECONDS = 600.0  # time limit of compressing or decompressing: a fixed part
CODING_TOKEN_SECONDS = 0.1  # and a part per token
PROOF_SECONDS = 60.0  # what `pgolf prove` spends on compressing
PROOF_TOLERANCE = 1e-3  # allowed excess over the recorded code length: relative
PROOF_TOLERANCE_BITS = 64  # and in bits

# The verdict of a re-run (see docs/organizers.md).
CLAIM_BPB = 0.002  # how far the interval may lie above the claim: twice the largest seed deviation of good entries
SLOWER = 0.05  # a machine slower than this part excuses a score above the claim: it costs about CLAIM_BPB
SLOWEST = 0.5  # slower than this part of the claim's speed is more than machines of one kind differ by
STRETCH_DOCUMENT_BYTES = 1000  # smallest document that may stand out
STRETCH_RATE = 0.5  # by a log-loss under this part of the text's mean; naive's least is 0.75
STRETCH_BPB = 0.001  # what documents that stand out may save, over the whole text
SLICE_RATE = 0.05  # two slices of one text may differ in difficulty by this part; naive's quarters: 0.03


# The sandbox (see `sandbox`).
LOCK_SECONDS = 900.0  # most that a scorer waits for another one on the machine
START_SECONDS = 120.0  # most that a worker's own imports take
SPARE_MEMORY_BYTES = 256 * 1024**2  # what a machine keeps free while the kernel enforces no limit


def track(name: str) -> Track:
    """The track called `name`. Raises UsageError when there is none."""
    if name not in TRACKS:
        raise UsageError(f"there is no track {name!r}; choose one of {', '.join(TRACKS)}")
    return TRACKS[name]
