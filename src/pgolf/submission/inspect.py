"""Where the bytes of an artifact went: its members, and the tensors of those whose format is known.

What the weights of a submission mean only its own code can say, and that runs in the sandbox or not at all. So every
member gets its bytes and its entropy; .npy, .npz and safetensors are read as the public formats that they are; and an
author whose format is another one hands the same codes over as an .npz beside the artifact (`--tensors`).
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pgolf import artifact, plots, rules
from pgolf.errors import UsageError
from pgolf.files import printable, read_regular
from pgolf.submission import members, tensors
from pgolf.submission.tensors import Array, Group, Tensor

_NAME = 100  # characters of a tensor's name that are shown


@dataclass(frozen=True)
class Member:
    """One file in the artifact."""

    name: str
    role: str
    bytes: int
    compressed: int
    """Bytes that it adds to the file, estimated (`members.compressed`)."""
    entropy: float
    """Zeroth-order empirical entropy of its bytes, in bits per byte."""


@dataclass(frozen=True)
class Weights:
    """The tensors of one source."""

    source: str
    """A member's name, or the file that was given."""
    tensors: tuple[Tensor, ...]
    groups: tuple[Group, ...]
    """By role, and all together."""


@dataclass(frozen=True)
class Inspection:
    """What is in an artifact."""

    sha256: str
    track: str
    size: int
    """Of the file in bytes."""
    left: int
    members: tuple[Member, ...]
    """The largest first."""
    roles: dict[str, int]
    """Estimated bytes in the file by role."""
    weights: tuple[Weights, ...]
    arrays: Mapping[str, Mapping[str, Array]]
    """By source; for the plot."""
    contents: Mapping[str, bytes]
    """The members; for the plot."""


def inspect(path: Path, given: Path | None = None) -> Inspection:
    """Look into the artifact at `path`, and into the tensors in the file `given`.

    Raises UsageError when there is nothing to read, Refused when it is no artifact.
    """
    arrays = {} if given is None else {given.name: _given(given)}
    found = artifact.read(path, rules.ARTIFACT_BYTES)
    sizes = members.compressed(found)
    rows = [
        Member(name, members.role(found, name), len(data), sizes[name], _entropy(data))
        for name, data in found.members.items()
    ]
    for name, data in sorted(found.members.items()):
        if (recognised := tensors.recognise(data)) is not None:
            arrays[name] = recognised
    weights = [(source, tensors.figures(each)) for source, each in arrays.items()]
    return Inspection(
        found.sha256,
        found.manifest.track,
        found.size,
        members.left(found),
        tuple(sorted(rows, key=lambda row: (-row.compressed, row.name))),
        members.by_role(found, sizes),
        tuple(Weights(source, tuple(each), tuple(tensors.groups(each))) for source, each in weights if each),
        arrays,
        found.members,
    )


def _given(path: Path) -> dict[str, Array]:
    try:
        found = tensors.recognise(read_regular(path, rules.UNPACKED_BYTES))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    if found is None:
        raise UsageError(f"{path}: holds no tensors; give an .npy, .npz or .safetensors file of numbers")
    return found


def _entropy(data: bytes) -> float:
    return tensors.entropy(np.frombuffer(data, np.uint8)) if data else 0.0


def as_json(found: Inspection) -> dict[str, Any]:
    """For programs."""
    return {
        "sha256": found.sha256,
        "track": found.track,
        "bytes": found.size,
        "left": found.left,
        "members": [asdict(member) for member in found.members],
        "roles": found.roles,
        "weights": [asdict(weights) for weights in found.weights],
    }


def table(found: Inspection) -> str:
    """For people."""
    total = sum(found.roles.values())
    width = max(len(printable(member.name)) for member in found.members)
    lines = [f"{'member':<{width}}  {'role':<17} {'bytes':>11} {'in the file':>11} {'share':>7}  bits per byte"]
    lines += [
        f"{printable(m.name):<{width}}  {m.role:<17} {m.bytes:>11,} {m.compressed:>11,} "
        f"{m.compressed / total:>7.1%}  {m.entropy:.2f} in {8 * m.compressed / max(1, m.bytes):.2f}"
        for m in found.members
    ]
    lines.append("")
    lines += [f"{kind:<19} {size:>11,} {size / total:>7.1%}" for kind, size in found.roles.items()]
    lines.append(f"{'together, estimated':<19} {total:>11,}")
    lines.append(f"{'the file':<19} {found.size:>11,}")
    lines.append(f"{'left of ' + found.track:<19} {found.left:>11,}")
    for weights in found.weights:
        lines += ["", *_tensor_lines(weights)]
    return "\n".join(lines)


def _tensor_lines(weights: Weights) -> list[str]:
    lines = [
        f"tensors of {printable(weights.source)[:_NAME]}",
        f"{'role':<12} {'tensors':>8} {'weights':>12}  entropy   stored, bits per weight",
    ]
    for group in weights.groups:
        stored = "-" if group.stored is None else f"{group.stored:.3f}"
        lines.append(f"{group.role:<12} {group.tensors:>8,} {group.weights:>12,} {group.entropy:>8.3f} {stored:>8}")
    return lines


def plot(found: Inspection, path: Path) -> str | None:
    """Bytes by member; then rate and histogram of the tensors, or of the members when there are none.

    Returns as `plots.draw` does.
    """

    def fill(axes: Any) -> None:
        _bars(found, axes[0])
        if found.weights:
            _rates(found.weights[0], axes[1])
            _codes(found.weights[0], found.arrays[found.weights[0].source], axes[2])
        else:
            _member_rates(found, axes[1])
            _byte_histogram(found, axes[2])

    return plots.draw(path, (15, 4.8), fill, columns=3)


def _bars(found: Inspection, axes: Any) -> None:
    shown = found.members[:12]
    total = sum(found.roles.values())
    colors = dict(zip(members.ROLES, plots.COLORS, strict=False))
    for kind in members.ROLES:
        rows = [(y, m) for y, m in enumerate(shown) if m.role == kind]
        label = f"{kind}: {found.roles[kind] / total:.1%}"
        bars = axes.barh([y for y, _ in rows], [m.compressed / 1e3 for _, m in rows], color=colors[kind], label=label)
        axes.bar_label(bars, [f"{m.compressed / total:.1%}" for _, m in rows], padding=3, fontsize=9)
    axes.set_yticks(range(len(shown)), [plots.literal(m.name) for m in shown])
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set(xlabel="bytes in the compressed file, estimated (kB)", title=f"{found.size:,} bytes, {found.left:,} left")
    axes.legend(loc="lower right")


def _rates(weights: Weights, axes: Any) -> None:
    groups = weights.groups
    places = np.arange(len(groups))
    known = all(group.stored is not None for group in groups)
    height = 0.38 if known else 0.6
    series = [("entropy of the values", "tab:blue", [g.entropy for g in groups])]
    if known:
        series.append(("stored", "tab:orange", [g.stored or 0.0 for g in groups]))
    for number, (label, color, values) in enumerate(series):
        at = places + (number - (len(series) - 1) / 2) * height
        bars = axes.barh(at, values, height, color=color, label=label)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
    axes.set_yticks(places, [f"{g.role}\n{g.weights:,}" for g in groups])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set(xlabel="bits per weight", ylabel="role, number of weights", title=plots.literal(weights.source))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _codes(weights: Weights, arrays: Mapping[str, Array], axes: Any) -> None:
    """How often each value occurs, by role; of tensors of whole numbers if there are any."""
    whole = any(arrays[t.name].dtype.kind in "iu" for t in weights.tensors)
    by_role: dict[str, list[Array]] = {}
    for tensor in weights.tensors:
        if (arrays[tensor.name].dtype.kind in "iu") == whole and arrays[tensor.name].dtype.kind in "iuf":
            by_role.setdefault(tensor.role, []).append(arrays[tensor.name].ravel().astype(np.float64))
    values = {kind: np.concatenate(parts) for kind, parts in by_role.items()}
    values = {kind: each[np.isfinite(each)] for kind, each in values.items()}
    everything = np.concatenate(list(values.values())) if values else np.zeros(0)
    if not everything.size:
        return
    low, high = np.quantile(everything, [0.001, 0.999])
    edges = np.arange(np.floor(low), np.ceil(high) + 2) - 0.5 if whole else np.linspace(low, high + 1e-9, 100)
    if len(edges) > 200:
        edges = np.linspace(low, high, 200)
    for color, kind in zip(plots.COLORS, tensors.ROLES, strict=False):
        if kind in values:
            share = np.histogram(values[kind], edges)[0] / len(values[kind])
            axes.stairs(
                np.where(share > 0, share, np.nan), edges, color=color, label=kind, linewidth=1.3, baseline=None
            )
    axes.set_yscale("log")
    axes.set(
        xlabel="stored value (code)" if whole else "weight",
        ylabel="share of the weights of a role",
        title="values from the 0.1 % to the 99.9 % quantile",
    )
    axes.legend()


def _member_rates(found: Inspection, axes: Any) -> None:
    shown = found.members[:12]
    places = np.arange(len(shown))
    rates = [8 * m.compressed / max(1, m.bytes) for m in shown]
    series = (("entropy of single bytes", "tab:blue", [m.entropy for m in shown]), ("in the file", "tab:orange", rates))
    for offset, (label, color, values) in zip((-0.19, 0.19), series, strict=True):
        bars = axes.barh(places + offset, values, 0.38, color=color, label=label)
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(places, [plots.literal(m.name) for m in shown])
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set(xlabel="bits per byte of the member", title="rate against entropy")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)


def _byte_histogram(found: Inspection, axes: Any) -> None:
    largest = [m for m in found.members if m.role == members.OTHER][:3] or list(found.members[:1])
    for color, member in zip(plots.COLORS, largest, strict=False):
        data = np.frombuffer(found.contents[member.name], np.uint8)
        share = np.bincount(data, minlength=256) / max(1, len(data))
        label = plots.literal(member.name)
        axes.stairs(
            np.where(share > 0, share, np.nan), np.arange(257), color=color, label=label, linewidth=1.3, baseline=None
        )
    axes.axhline(1 / 256, color="black", linewidth=1, linestyle=":")
    axes.text(255, 1 / 256, "uniform", ha="right", va="bottom", fontsize=9)
    axes.set_yscale("log")
    axes.set(xlabel="byte value", ylabel="share of the member's bytes", title="histogram of the bytes")
    axes.legend()
