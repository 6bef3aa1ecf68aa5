"""What the tokens of a scored text cost: by position, by length of the document, by class of token, by document.

From the file that `pgolf score --per-token` writes beside a record. Log-loss in nats per token does not compare between
tokenizers; bits per byte do, and those of all classes together are the score.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import plots
from pgolf.errors import UsageError
from pgolf.files import printable
from pgolf.score import record, tokens
from pgolf.score.likelihood import Floats
from pgolf.score.schedule import Index
from pgolf.score.tokens import TokenLosses

END, PART = "end of document", "non-ASCII"
CLASSES = ("word start", "continuation", "digits", "punctuation", "whitespace", PART, END)
EXTREMES = 5  # of the most and of the least expensive documents
_BEGINNING = 60  # characters of a document that a table shows
_SMALLEST = 200  # bytes of a document that is called expensive or cheap


@dataclass(frozen=True)
class Row:
    """Some tokens, or the documents of some lengths."""

    name: str
    low: int
    """Of positions and lengths: the first one that belongs to it."""
    tokens: int
    nats_per_token: float
    bits_per_byte: float
    """Of positions and classes: per byte of the whole text, so that they add up to the score; of documents: per byte
    of theirs."""


@dataclass(frozen=True)
class Document:
    """One document."""

    number: int
    bytes: int
    bits_per_byte: float
    beginning: str


@dataclass(frozen=True)
class Costs:
    """Of one score."""

    path: str
    bpb: float
    positions: tuple[Row, ...]
    """By tokens known of the document."""
    lengths: tuple[Row, ...]
    """By UTF-8 bytes of the document."""
    classes: tuple[Row, ...]
    expensive: tuple[Document, ...]
    cheap: tuple[Document, ...]


def read(paths: Sequence[Path]) -> list[TokenLosses]:
    """The tokens of records of one text. Raises UsageError for anything else."""
    found = [_read(path) for path in paths]
    for path, each in zip(paths, found, strict=True):
        if (each.data, len(each.sizes)) != (found[0].data, len(found[0].sizes)):
            raise UsageError(
                f"{paths[0]} and {path} are scores of different texts; score both with the same --data and --documents"
            )
    return found


def _read(path: Path) -> TokenLosses:
    other = "neither a record of `pgolf score` nor a log of training"
    scored = record.read_scored(path, "no such record or log", other)
    found = tokens.read(tokens.path(path))
    if found.artifact != scored.artifact.sha256:
        raise UsageError(f"{tokens.path(path)}: of another artifact than {path}; score it again")
    return found


def costs(path: Path, found: TokenLosses) -> Costs:
    """Everything that is printed and drawn of one score."""
    nats, total = found.nats.astype(np.float64), max(1, int(found.sizes.sum()))
    starts = np.cumsum(found.lengths) - found.lengths
    by_document = np.add.reduceat(nats, starts)
    position = np.arange(len(nats)) - np.repeat(starts, found.lengths)

    edges = _edges(position)
    positions = _rows([f"{e:,}" for e in edges], edges, np.searchsorted(edges, position, "right") - 1, nats, total)
    kind = classes(found)
    by_class = _rows(CLASSES, np.zeros(len(CLASSES), np.int64), kind, nats, total)

    edges = _edges(found.sizes)
    bin_of = np.searchsorted(edges, found.sizes, "right") - 1
    by_length = _rows([f"{e:,}" for e in edges], edges, np.repeat(bin_of, found.lengths), nats, 1)
    sizes = {int(low): int(found.sizes[bin_of == number].sum()) for number, low in enumerate(edges)}
    lengths = [
        Row(r.name, r.low, r.tokens, r.nats_per_token, r.bits_per_byte / max(1, sizes[r.low])) for r in by_length
    ]

    rate = by_document / math.log(2) / np.maximum(1, found.sizes)
    order = np.argsort(-rate, kind="stable")
    order = order[found.sizes[order] >= _SMALLEST]
    documents = [Document(int(n), int(found.sizes[n]), float(rate[n]), beginning(found, int(n))) for n in order]
    bpb = float(nats.sum() / math.log(2) / total)
    cheap = tuple(documents[: -EXTREMES - 1 : -1])
    return Costs(str(path), bpb, tuple(positions), tuple(lengths), tuple(by_class), tuple(documents[:EXTREMES]), cheap)


def _edges(values: Index) -> Index:
    """0, 1, 2, 4, 8, ... up to the largest of values (N,)."""
    return np.concatenate([[0], 1 << np.arange(max(1, int(values.max())).bit_length())]).astype(np.int64)


def _rows(names: Sequence[str], lows: Index, bin_of: Index, nats: Floats, total: int) -> list[Row]:
    """Of each bin that has tokens; `bin_of` (N,) is the bin of each."""
    count = np.bincount(bin_of, minlength=len(names))
    spent = np.bincount(bin_of, nats, len(names))
    return [
        Row(name, int(low), int(n), float(s / n), float(s / math.log(2) / total))
        for name, low, n, s in zip(names, lows, count, spent, strict=True)
        if n
    ]


def classes(found: TokenLosses) -> Index:
    """The class (N,) of each token, as its number in `CLASSES`."""
    of_text = np.array([CLASSES.index(class_of(text)) for text in found.texts], dtype=np.int64)
    kind = of_text[found.text]
    kind[np.cumsum(found.lengths) - 1] = CLASSES.index(END)
    return kind


def class_of(text: str) -> str:
    """The class of a token by what it spells; a token without text is a later part of a character."""
    if not text or not text.isascii():
        return PART
    if text.isspace():
        return "whitespace"
    if any(c.isalpha() for c in text):
        return "continuation" if text[0].isalnum() or text[0] == "'" else "word start"
    return "digits" if any(c.isdigit() for c in text) else "punctuation"


def beginning(found: TokenLosses, number: int) -> str:
    """The first characters of a document, on one line."""
    start = int(found.lengths[:number].sum())
    texts = (found.texts[i] for i in found.text[start : start + min(_BEGINNING, int(found.lengths[number]))])
    return printable(" ".join("".join(texts)[: 2 * _BEGINNING].split()))[:_BEGINNING]


def as_json(found: Sequence[Costs]) -> list[dict[str, Any]]:
    """For programs."""
    return [asdict(each) for each in found]


def table(found: Sequence[Costs]) -> str:
    """For people."""
    return "\n\n".join(_table(each) for each in found)


def _table(found: Costs) -> str:
    lines = [f"{printable(found.path)}: {found.bpb:.4f} bits per byte"]
    titles = {
        "token class": (found.classes, "share of the score"),
        "position in document": (found.positions, "share of the score"),
        "bytes of document": (found.lengths, "bits per byte"),
    }
    for title, (rows, last) in titles.items():
        lines += ["", f"{title:<20} {'tokens':>12}  nats per token  {last}"]
        for row in rows:
            value = f"{row.bits_per_byte / found.bpb:.1%}" if rows is not found.lengths else f"{row.bits_per_byte:.3f}"
            name = row.name if rows is found.classes else f"from {row.name}"
            lines.append(f"{name:<20} {row.tokens:>12,}  {row.nats_per_token:>14.3f}  {value:>{len(last)}}")
    for title, documents in (("most expensive", found.expensive), ("least expensive", found.cheap)):
        lines += ["", f"{title + ' documents':<26} {'bytes':>9}  bits per byte"]
        lines += [f"{d.number:>26,} {d.bytes:>9,}  {d.bits_per_byte:>13.3f}  {d.beginning}" for d in documents]
    return "\n".join(lines)


def plot(found: Sequence[Costs], path: Path) -> str | None:
    """Four panels: position, length, class, and what the classes contribute. Returns as `plots.draw` does."""
    labels = [
        f"{name}: {each.bpb:.4f} bpb" for name, each in zip(plots.labels([c.path for c in found]), found, strict=True)
    ]

    def fill(axes: Any) -> None:
        for number, (each, label) in enumerate(zip(found, labels, strict=True)):
            color = plots.COLORS[number % len(plots.COLORS)]
            axes[0].plot(
                *_middles(each.positions), [r.nats_per_token for r in each.positions], "o-", color=color, label=label
            )
            axes[1].plot(
                *_middles(each.lengths), [r.bits_per_byte for r in each.lengths], "o-", color=color, label=label
            )
            _bars(axes[2], each.classes, [r.nats_per_token for r in each.classes], number, len(found), color, "{:.2f}")
            _bars(axes[3], each.classes, [r.bits_per_byte for r in each.classes], number, len(found), color, "{:.3f}")
        for each in axes[:2]:
            each.set_xscale("symlog", base=2, linthresh=1)
            ticks = [
                tick for tick in (0, *(4**n for n in range(16))) if each.get_xlim()[0] <= tick <= each.get_xlim()[1]
            ]
            each.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=9)
        axes[0].set(xlabel="position in the document (tokens known before)", ylabel="log-loss (nats per token)")
        axes[1].set(xlabel="length of the document (UTF-8 bytes)", ylabel="code length (bits per byte)")
        axes[2].set(xlabel="log-loss (nats per token)")
        axes[3].set(xlabel="share of the score (bits per byte of the whole text)")
        for each in axes[2:]:
            each.set_yticks(range(len(CLASSES)), CLASSES)
            each.invert_yaxis()
            each.margins(x=0.12)
        axes[0].legend(fontsize=9)

    return plots.draw(path, (13, 9), fill, rows=2, columns=2)


def _middles(rows: Sequence[Row]) -> tuple[list[float]]:
    """The geometric middle of each bin, which reaches from its first value to below the double of it."""
    return ([row.low * math.sqrt(2) if row.low > 1 else float(row.low) for row in rows],)


def _bars(
    axes: Any, rows: Sequence[Row], values: Sequence[float], number: int, count: int, color: str, form: str
) -> None:
    height = 0.8 / count
    places = [CLASSES.index(row.name) + (number - (count - 1) / 2) * height for row in rows]
    bars = axes.barh(places, values, height, color=color)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
