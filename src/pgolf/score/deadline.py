"""The evaluation clock: it runs while the submission works, and one limit holds for all of it."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from pgolf.errors import Refused


@dataclass
class Clock:
    """Seconds per phase. What is between phases (copying the environment, starting a sandbox) is not charged."""

    limit: float = math.inf
    seconds: dict[str, float] = field(default_factory=dict)

    def margin(self) -> float:
        """Seconds of the limit that are left."""
        return self.limit - sum(self.seconds.values())

    @contextmanager
    def phase(self, name: str) -> Iterator[float]:
        """Time a phase; gives its deadline, a value of time.monotonic(). Raises Refused in place of TimeoutError."""
        start = time.monotonic()
        try:
            yield start + self.margin()
        except TimeoutError:
            raise Refused(f"the evaluation took longer than its {self.limit:g} s (ended during {name})") from None
        finally:
            self.seconds[name] = time.monotonic() - start
        if self.margin() < 0:
            raise Refused(f"the evaluation took longer than its {self.limit:g} s (ended during {name})")

    def split(self, name: str, parts: Mapping[str, float], rest: str) -> None:
        """Replace a phase by its parts; what they leave of it is called `rest`."""
        whole = self.seconds.pop(name)
        self.seconds |= {**parts, rest: whole - sum(parts.values())}
