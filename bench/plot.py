"""A picture of a run: how many times faster than torch each case is, on a logarithmic axis."""

import math
from collections.abc import Sequence
from pathlib import Path

from .ceilings import name
from .run import Result

# Color only repeats what the side of the line and the number beside the bar say.
FASTER, SLOWER, INK, GRID = "#2a78d6", "#c9603b", "#333333", "#dddddd"


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """Write a PNG with a bar per case: torch's time over ours, quartiles as whiskers, a line at 1.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no case has a torch call beside it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rows = [(r, r.ratio("torch")) for r in results if r.verdict.ok]
    rows = [(r, q) for r, q in rows if q is not None]
    if not rows:
        raise ValueError("bench: expected a case that torch can run too; got none to plot")
    several = len({r.place for r, _ in rows}) > 1
    labels = [_label(r, several) for r, _ in rows]
    medians = [q[1] for _, q in rows]

    figure = Figure(figsize=(10, 1.4 + 0.32 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    whiskers = [[q[1] - q[0] for _, q in rows], [q[2] - q[1] for _, q in rows]]
    colors = [FASTER if m >= 1 else SLOWER for m in medians]
    # bars start at the line, so that their length is the gain or the loss
    axes.barh(labels, [m - 1 for m in medians], left=1, color=colors, height=0.66, zorder=2)
    axes.errorbar(
        medians,
        range(len(rows)),
        xerr=whiskers,
        fmt="none",
        ecolor=INK,
        elinewidth=1,
        capsize=2,
        zorder=3,
    )
    low, high = min(1.0, *(q[0] for _, q in rows)), max(1.0, *(q[2] for _, q in rows))
    span = math.log2(high / low) + 0.5
    axes.set_xlim(low * 2 ** (-0.12 * span), high * 2 ** (0.12 * span))
    for y, (_, q) in enumerate(rows):
        outside = q[2] if q[1] >= 1 else q[0]
        axes.annotate(
            f"{q[1]:.2f}" if q[1] >= 0.1 else f"{q[1]:.1g}",
            (outside, y),
            xytext=(5 if q[1] >= 1 else -5, 0),
            textcoords="offset points",
            ha="left" if q[1] >= 1 else "right",
            va="center",
            fontsize=8,
            color=INK,
        )
    axes.axvline(1, color=INK, linewidth=1.2, zorder=4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.invert_yaxis()
    axes.set_xlabel(
        "time of torch SDPA / time of attn_ext (right of the line: attn_ext is faster)", fontsize=9
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, format="png")


def _label(result: Result, several_places: bool) -> str:
    words = [result.case.name, name(result.dtype)]
    if several_places:
        words.append(f"{result.place.target} x{result.place.threads}")
    return "  ".join(words)
