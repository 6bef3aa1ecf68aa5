"""A page that shows documents of a scored text, each token coloured by what it cost. One file, no script.

The texts are data: every character that could mean something to a browser, or is no character to look at, is escaped.
"""

import html
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from pgolf.files import printable
from pgolf.score.tokens import TokenLosses

EDGES = (0.1, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0)  # nats: the colours change here
TOKENS = 3000  # of a document that are shown

_LIGHT = ("#ffffff", "#eef5fb", "#d7e8f5", "#fff3b0", "#fed98e", "#fdae6b", "#f4815f", "#dd4b4b")
_DARK = ("#16181b", "#172532", "#1d3850", "#4d4413", "#6b4a10", "#85430f", "#962f20", "#b3202c")

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ max-width: 60em; margin: 2em auto; padding: 0 1em; font: 16px/1.7 system-ui, sans-serif; }}
p.text {{ white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }}
p.text span, p.legend span {{ border-radius: 2px; }}
p.legend span {{ padding: 0.1em 0.5em; border: 1px solid #8888; }}
{colors}
</style>
</head>
<body>
<h1>{title}</h1>
<p>Each token is coloured by its log-loss in nats (1 nat = 1.443 bits). The pointer over it shows the token, its
log-loss, the probability that it had, and its rank by cost within its document (1 is the most expensive). Tokens that
are parts of one character are shown together. ∎ is the end of a document, which costs too.</p>
<p class="legend">nats per token: {legend}</p>
{documents}
</body>
</html>
"""


def page(found: TokenLosses, numbers: Sequence[int], title: str) -> str:
    """The page with the documents of these numbers, in HTML."""
    legend = " ".join(f'<span class="c{c}">{name}</span>' for c, name in enumerate(_legend()))
    documents = "\n".join(_document(found, number) for number in numbers)
    return _PAGE.format(title=_escape(printable(title)), colors=_colors(), legend=legend, documents=documents)


def _legend() -> Iterator[str]:
    yield f"below {EDGES[0]:g}"
    yield from (f"{low:g} to {high:g}" for low, high in pairwise(EDGES))
    yield f"{EDGES[-1]:g} and more"


def _colors() -> str:
    """The style of both modes; print takes the light one."""
    light = "\n".join(f".c{c} {{ background: {color}; }}" for c, color in enumerate(_LIGHT))
    dark = " ".join(f".c{c} {{ background: {color}; }}" for c, color in enumerate(_DARK))
    both = f"body {{ background: {_LIGHT[0]}; color: #111; print-color-adjust: exact; }}\n{light}\n"
    return both + (
        f"@media screen and (prefers-color-scheme: dark) {{ body {{ background: {_DARK[0]}; color: #eee; }} {dark} }}"
    )


def _document(found: TokenLosses, number: int) -> str:
    start = int(found.lengths[:number].sum())
    count = int(found.lengths[number])
    nats = found.nats[start : start + count].astype(np.float64)
    texts = [found.texts[i] for i in found.text[start : start + count]]
    rank = np.empty(count, dtype=np.int64)
    rank[np.argsort(-nats, kind="stable")] = np.arange(1, count + 1)
    spans = "".join(
        _span(text, float(nats[a:b].sum()), b - a, int(rank[a:b].min())) for a, b, text in _units(texts) if a < TOKENS
    )
    bits = float(nats.sum()) / math.log(2) / max(1, int(found.sizes[number]))
    cut = "" if count <= TOKENS else f"<p>The first {TOKENS:,} of its tokens.</p>"
    heading = (
        f"Document {number:,}: {bits:.3f} bits per byte, {nats.mean():.3f} nats per token; {count:,} tokens, "
        f"{int(found.sizes[number]):,} bytes"
    )
    return f'<h2>{heading}</h2>\n{cut}<p class="text">{spans}</p>'


def _units(texts: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Ranges of tokens that are shown together, with their text: a token, or the parts of a character."""
    starts = [i for i, text in enumerate(texts) if text or i in (0, len(texts) - 1)]
    for a, b in zip(starts, [*starts[1:], len(texts)], strict=True):
        yield a, b, texts[a] if a < len(texts) - 1 else ""


def _span(text: str, nats: float, tokens: int, rank: int) -> str:
    color = int(np.searchsorted(EDGES, nats / tokens, side="right"))
    name = repr(text) if text else "end of document"
    parts = f", {tokens} tokens together" if tokens > 1 else ""
    probability = math.exp(-nats) if nats < 700 else 0.0
    title = (
        f"{name}: {nats:.3f} nats, {nats / math.log(2):.2f} bits, probability {probability:.2g}, rank {rank:,}{parts}"
    )
    return f'<span class="c{color}" title="{_escape(title)}">{_escape(text or "∎")}</span>'


def _escape(text: str) -> str:
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return html.escape(shown, quote=True)
