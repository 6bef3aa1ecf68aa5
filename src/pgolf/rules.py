"""The rules in numbers. Limits appear here and nowhere else."""

from dataclasses import dataclass

from pgolf.errors import UsageError


@dataclass(frozen=True)
class Track:
    """One competition: what an artifact may weigh and how long it may take."""

    name: str
    artifact_bytes: int
    """Largest size of the artifact on disk, in bytes (decimal megabytes, not MiB)."""
    train_seconds: float | None
    """Wall clock from the first training token to the finished artifact; None: no limit."""
    eval_seconds: float
    """Wall clock of everything the submission does while it is scored: encode, predict, decode."""
    hardware: str


TRACKS = {
    track.name: track
    for track in (
        Track("main", 16_000_000, 600.0, 600.0, "8xH100 SXM"),
        Track("unlimited", 16_000_000, None, 600.0, "8xH100 SXM"),
        Track("laptop", 1_000_000, 60.0, 120.0, "CPU"),
    )
}

ARTIFACT_BYTES = max(track.artifact_bytes for track in TRACKS.values())  # while its track is not known

# What an artifact may unpack to. Generous for honest entries, small enough that none can harm the scorer.
UNPACKED_BYTES = 256 * 1024 * 1024
MEMBERS = 256
ZSTD_WINDOW_BYTES = 128 * 1024 * 1024  # what zstd's highest level asks for

# What a worker may use while it is scored.
WORKER_MEMORY_BYTES = 16 * 1024**3
WORKER_PROCESSES = 512  # threads count
WORKER_DISK_BYTES = 1024**3
WORKER_OUTPUT_BYTES = 1024 * 1024  # stdout and stderr together
VOCAB_SIZE = 1 << 20
CONTEXT = 1 << 14  # the audit of a row costs the window before it: of longer ones it could afford too few
WINDOW_LOGITS = 1 << 28  # vocab_size times context: one window's logits
ROUND = (64, CONTEXT)  # fewest and most tokens that a streaming predictor may ask for in a round
TOKENS_PER_BYTE = 4  # a tokenizer may not flood the scorer; plain bytes need 1

# The blind audit (see `audit` for what these mean, docs/security.md for what they detect).
AUDIT_SHARE = 0.09  # tokens that the audit hands over, per token that scoring did
AUDIT_TOKENS = 1 << 16  # but at least so many: a small validation set is audited more closely
AUDIT_TOLERANCE = 5e-4  # nats per token that a peek may be worth, as far as the audit can tell,
AUDIT_BYTES = 2.0  # for tokens of so many bytes or more; less in proportion for shorter ones
AUDIT_NOISE = 0.05  # nats by which a token may differ when it is scored again, root mean square
AUDIT_CONFIDENCE = 0.99
AUDIT_LEAST = 100  # audited tokens; a score with fewer does not count, for its verdict means little,
AUDIT_PRECISION = 2e-3  # nor one whose interval reaches further than so many nats from the mean
AUDIT_SECONDS = 30.0  # time for the audit: what predicting took and this

# Compression (see `codec`).
CODED_TOKENS = 1 << 24  # most tokens in one file, so that a hostile one ends
CODING_SECONDS = 600.0  # most that one answer takes: loading, one batch of rows, the tokenizer, scoring the text
PROOF_BYTES = 20_000  # text that a proof compresses
PROOF_TOLERANCE = 0.01  # how much longer than the scored code length the code may be


# The sandbox (see `sandbox`).
LOCK_SECONDS = 900.0  # most that a scorer waits for another one on the machine
START_SECONDS = 120.0  # most that a worker's own imports take
SPARE_MEMORY_BYTES = 256 * 1024**2  # what a machine keeps free while the kernel enforces no limit


def track(name: str) -> Track:
    """The track called `name`. Raises UsageError when there is none."""
    if name not in TRACKS:
        raise UsageError(f"there is no track {name!r}; choose one of {', '.join(TRACKS)}")
    return TRACKS[name]
