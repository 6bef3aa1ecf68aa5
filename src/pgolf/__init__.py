"""pgolf: train under a clock, pack under a byte limit, and get a score that cannot be faked."""

__version__ = "0.1.0"
