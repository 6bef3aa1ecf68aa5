"""What a check can find."""

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"
LATE = 0.8  # of a limit of time, where a warning begins: other machines, and busy ones, are slower


@dataclass(frozen=True)
class Finding:
    """Something to mend."""

    rule: str
    """A short name that programs can rely on."""
    severity: str
    """"error": the submission will be refused; "warning": look at it."""
    file: str | None
    line: int | None
    what: str
    remedy: str
