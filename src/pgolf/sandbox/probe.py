from dataclasses import dataclass

from pgolf.sandbox import box


@dataclass(frozen=True)
class Isolation:
    description: str

    def reasons(self, fresh: bool) -> list[str]:
        return []


def check_isolation(device: str) -> Isolation:
    return Isolation(box.check_isolation())
