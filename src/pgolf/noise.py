"""Source code that hides data: noise as text, such as weights in base64, compresses worse than code does."""

from collections.abc import Iterator, Mapping

import zstandard

from pgolf import rules


def noisy(sources: Mapping[str, bytes]) -> Iterator[tuple[str, float]]:
    """Name of each file in which noise begins, and its worst window's compressed size by its size.

    Windows run over names and contents of all files in the order of their names, so data that is spread over small
    ones is found too.
    Noise as a list of numbers compresses like code, and takes four times its bytes.
    """
    names = sorted(sources)
    parts = [name.encode() + b"\n" + sources[name] for name in names]
    text = b"".join(parts)
    compressor, size = zstandard.ZstdCompressor(level=19), rules.NOISE_WINDOW_BYTES
    begin = 0
    for name, part in zip(names, parts, strict=True):
        end = begin + len(part)
        starts = range(begin, min(end, len(text) - size + 1), size // 2)
        worst = max((len(compressor.compress(text[at : at + size])) / size for at in starts), default=0.0)
        if worst > rules.NOISE_RATE:
            yield name, worst
        begin = end
