"""Source code that hides data: noise as text, such as weights in base64, compresses worse than code does."""

from collections.abc import Iterator, Mapping

import zstandard

from pgolf import rules


def noisy(sources: Mapping[str, bytes]) -> Iterator[tuple[str, float]]:
    """Name of each file in which noise begins, and its worst window's compressed size by its size.

    Windows run over all files in the order of their names, so data that is spread over small ones is found too.
    Noise as a list of numbers compresses like code, and takes four times its bytes.
    """
    names = sorted(sources)
    text = b"".join(sources[name] for name in names)
    compressor, size = zstandard.ZstdCompressor(level=19), rules.NOISE_WINDOW_BYTES
    begin = 0
    for name in names:
        end = begin + len(sources[name])
        starts = range(begin, min(end, len(text) - size + 1), size // 2)
        worst = max((len(compressor.compress(text[at : at + size])) / size for at in starts), default=0.0)
        if worst > rules.NOISE_RATE:
            yield name, worst
        begin = end
