"""The texts that attacks are scored on."""

import random
from collections.abc import Callable
from pydoc_data.topics import topics

FIRST = "This text is the first document of the attack suite. Whoever finds it in memory has found the text."
FANCY = "\ufb01rst, \ufb02ight and o\ufb03ce: " * 8 + "\u2460\u2461\u2462 \u00bd \uff46\uff55\uff4c\uff4c " * 8


def documents(begin: int, most: int) -> list[str]:
    """Plain English of about `most` bytes: every second paragraph group of Python's own help."""
    pieces = [piece for _, topic in sorted(topics.items()) for piece in topic.split("\n\n\n")]
    found: list[str] = []
    for piece in pieces[begin::2]:
        if sum(map(len, found)) < most:
            found.append(piece[:320].encode("ascii", "ignore").decode().replace("\0", ""))
    return found


def english() -> list[str]:
    """About 20 kB with a first document that is easy to find, a last one, and characters that have look-alikes."""
    return [FIRST, *documents(0, 18_000), FANCY, FANCY, "And this is the LAST"]


def random_documents(seed: int | None = None) -> list[str]:
    """20 kB of fresh ASCII, 7 bits a byte."""
    source = random.SystemRandom() if seed is None else random.Random(seed)
    return ["".join(map(chr, source.choices(range(128), k=312))) for _ in range(64)]


TEXTS: dict[str, Callable[[], list[str]]] = {
    "english": english,
    "demo": english,
    "random": random_documents,
    "lengths": lambda: [text[: 10 + 37 * n % 101] for n, text in enumerate(3 * random_documents(1))],
    "twins": lambda: [text for text in random_documents(1)[:6] for _ in range(2)],
    "staggered": lambda: [start + text for text in random_documents(1)[:6] for start in ("", "x")],
}
