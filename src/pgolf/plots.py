"""Plots, drawn after the results are written: a plot that fails loses nothing else."""

import io
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pgolf.files import printable, write_atomically

COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red", "tab:brown", "tab:pink", "tab:gray")


def draw(
    path: Path, size: tuple[float, float], fill: Callable[[Any], None], rows: int = 1, columns: int = 1
) -> str | None:
    """Let `fill` draw on matplotlib's axes, or on a list of them, and write a PNG of `size` inches atomically.

    The background is white, on paper and on a dark page. Returns None, or in one line why there is no picture:
    matplotlib may be missing or broken, the disk full.
    """
    try:
        # A notebook sets a backend that only pyplot could use, and outside it that name alone breaks the import.
        os.environ["MPLBACKEND"] = "agg"
        from matplotlib.figure import Figure

        figure, png = Figure(figsize=size, layout="constrained"), io.BytesIO()
        axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for each in axes:
            each.grid(alpha=0.3)
            each.set_axisbelow(True)
        fill(axes if len(axes) > 1 else axes[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters that the font lacks
            figure.savefig(png, format="png", dpi=120, facecolor="white")
        write_atomically(path, png.getvalue())
    except Exception as error:  # whatever it is, the results stand
        return f"{path}: no picture ({str(error).strip().partition(chr(10))[0][:200] or type(error).__name__})"
    return None


def literal(text: str) -> str:
    """Text from outside for a title or a label: no mathematics, one line, not too long."""
    return printable(text).replace("$", r"\$")[:60]


def labels(paths: Sequence[str]) -> list[str]:
    """For a legend: the file names, with as much of their folders as tells them apart."""
    parts = [Path(path).parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        shown = ["/".join(each[-depth:]) for each in parts]
        if len(set(shown)) == len(shown):
            break
    return [literal(name) for name in shown]


def draw_effects(rows: Sequence[dict[str, Any]], path: Path) -> str | None:
    """Effects with their intervals; to the right of zero a variant is worse than the base. Returns as `draw` does."""
    variants = sorted((r for r in rows if r["variant"] != "base"), key=lambda r: r["effect"])

    def fill(axes: Any) -> None:
        for y, r in enumerate(variants):
            axes.errorbar(r["effect"], y, xerr=r["half_interval"] or 0, fmt="o", capsize=3, color="tab:blue")
        axes.axvline(0, color="black", linewidth=1)
        axes.set_yticks(range(len(variants)), [r["variant"] for r in variants])
        axes.set(xlabel=f"bpb minus the base's ({rows[0]['mean']:.4f}); 95 % interval over {len(rows[0]['bpb'])} seeds")

    return draw(path, (8, 1.5 + 0.35 * len(variants)), fill)


def draw_vocabularies(rows: Sequence[dict[str, Any]], path: Path) -> str | None:
    """Bytes per token over the size of the vocabulary, hollow where text is lost. Returns as `draw` does."""

    def fill(axes: Any) -> None:
        axes.set_xscale("log", base=2)
        for r, marker in zip(rows, itertools.cycle("osD^vPX*"), strict=False):
            label = f"{Path(r['name']).stem}, {r['compressed_bytes'] / 1000:.0f} kB{', lossy' if r['changed'] else ''}"
            style = "none" if r["changed"] else "full"
            axes.plot(
                r["vocab_size"], r["bytes_per_token"], marker, markersize=9, fillstyle=style, label=label, alpha=0.9
            )
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.margins(0.1)
        axes.set(xlabel="vocabulary (tokens)", ylabel="bytes per token", ylim=(0, None))
        axes.legend(title="tokenizer, compressed model", loc="lower right", fontsize=9)

    return draw(path, (8, 5), fill)
