"""What a check can find."""

from dataclasses import dataclass

ERROR, WARNING = "error", "warning"


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
