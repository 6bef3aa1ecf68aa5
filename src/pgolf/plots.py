"""Pictures, drawn after the results that they show: one that fails costs nothing but itself."""

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgolf.files import write_atomically


def draw(path: Path, size: tuple[float, float], fill: Callable[[Any], None]) -> str | None:
    """Let `fill` draw on matplotlib's axes and write a PNG of `size` inches atomically.

    Returns None, or in one line why there is no picture: matplotlib may be missing or broken, the disk full.
    """
    try:
        # A notebook sets a backend that only pyplot could use, and outside it that name alone breaks the import.
        os.environ["MPLBACKEND"] = "agg"
        from matplotlib.figure import Figure

        figure, png = Figure(figsize=size, layout="constrained"), io.BytesIO()
        axes = figure.subplots()
        axes.grid(alpha=0.3)
        fill(axes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters that the font lacks
            figure.savefig(png, format="png", dpi=120)
        write_atomically(path, png.getvalue())
    except Exception as error:  # whatever it is, the results stand
        return f"{path}: no picture ({str(error).strip().partition(chr(10))[0][:200] or type(error).__name__})"
    return None
