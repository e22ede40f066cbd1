"""The figure: how many times as fast as torch eager, over the size of the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from fastact.bench.measure import Measurement
from fastact.bench.report import Report

# Hues of Okabe and Ito, told apart in every common kind of colour blindness, as are the markers.
STYLES = {
    "float32": ("#0072B2", "o"),
    "bfloat16": ("#D55E00", "s"),
    "float16": ("#009E73", "^"),
    "float64": ("#CC79A7", "D"),
}
DASHES: dict[str, Any] = {"forward": {"linestyle": "-"}, "backward": {"linestyle": (0, (3, 1.5))}}
SIZE_TICKS = {1: "1", 100: "100", 10**4: "10k", 10**6: "1M", 10**8: "100M"}
COLUMNS = 3
INK, PALE = "#333333", "#E3E3E3"


def plot(report: Report, path: Path) -> None:
    draw(report).savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.2)


def draw(report: Report) -> Figure:
    rows = [row for row in report.rows if row.direction in DASHES]
    dtypes = [dtype for dtype in STYLES if any(row.dtype == dtype for row in rows)]
    curves = [row for row in rows if row.dim is None]
    bars: dict[str, list[Measurement]] = {}  # by op
    for row in rows:
        if row.dim is not None:
            bars.setdefault(row.op, []).append(row)

    # Inches: a line of panels, and a bar with its share of the space between groups.
    heights = []
    if curves:
        heights.append(0.4 + 2.5 * -(-len({row.op for row in curves}) // COLUMNS))
    for of_op in bars.values():
        heights.append(0.8 + len({row.label for row in of_op}) * (0.2 + 0.1 * len(dtypes)))
    heights.append(0.7)  # the key and where this was measured
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("fastact: times as fast as torch eager", fontsize=14, color=INK)
    *parts, foot = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights).flat
    if curves:
        _curves(parts[0], curves, dtypes)
    for part, of_op in zip(parts[-len(bars) :], bars.values(), strict=False):
        _bars(part, of_op, dtypes)
    keys = [Line2D([], [], color=STYLES[d][0], marker=STYLES[d][1], label=d) for d in dtypes]
    keys += [Line2D([], [], color=INK, label=d, **DASHES[d]) for d in DASHES]
    foot.legend(handles=keys, loc="upper center", ncols=6, frameon=False, labelcolor=INK)
    foot.text(0.5, 0.12, report.title(), ha="center", fontsize=8.5, color=INK)
    return figure


def _curves(part: SubFigure, rows: list[Measurement], dtypes: list[str]) -> None:
    ops = list(dict.fromkeys(row.op for row in rows))
    lines = -(-len(ops) // COLUMNS)
    panels = part.subplots(lines, COLUMNS, sharex=True, sharey=True, squeeze=False).flat
    for i, (op, axes) in enumerate(zip(ops, panels, strict=False)):
        for dtype in dtypes:
            for direction, dashes in DASHES.items():
                key = (op, dtype, direction)
                of_key = [r for r in rows if (r.op, r.dtype, r.direction) == key]
                of_key.sort(key=lambda row: row.elements)
                x, y = [r.elements for r in of_key], [r.ratio_eager for r in of_key]
                colour, marker = STYLES[dtype]
                axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, **dashes)
        axes.axhline(1, color=INK, linewidth=2.2, zorder=1)
        axes.set_xscale("log")
        if i + COLUMNS >= len(ops):  # nothing below it
            axes.set_xlabel("elements", color=INK)
            axes.tick_params(labelbottom=True)
        sizes = [row.elements for row in rows]
        ticks = {t: n for t, n in SIZE_TICKS.items() if min(sizes) / 2 <= t <= max(sizes) * 2}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.xaxis.set_minor_locator(NullLocator())
        _style(axes, axes.yaxis, op, rows)
    for axes in panels:  # what the last line has left
        axes.set_visible(False)


def _bars(part: SubFigure, rows: list[Measurement], dtypes: list[str]) -> None:
    shapes = {row.label: f"{row.label}\n{tuple(row.shape)}, dim {row.dim}" for row in rows}
    labels = list(shapes)
    thickness = 0.8 / len(dtypes)
    panels = part.subplots(1, len(DASHES), sharey=True)
    for direction, axes in zip(DASHES, panels, strict=True):
        for row in rows:
            if row.direction == direction:
                offset = (dtypes.index(row.dtype) - (len(dtypes) - 1) / 2) * thickness
                # From the line at 1: a bar to the right is faster, to the left slower.
                axes.barh(
                    labels.index(row.label) + offset,
                    width=row.ratio_eager - 1,
                    left=1,
                    height=thickness * 0.85,
                    color=STYLES[row.dtype][0],
                )
        axes.axvline(1, color=INK, linewidth=2.2)
        axes.set_yticks(range(len(labels)), list(shapes.values()))
        _style(axes, axes.xaxis, f"{rows[0].op}, {direction}", rows)
    panels[0].invert_yaxis()


def _style(axes: Axes, ratios: Axis, title: str, rows: list[Measurement]) -> None:
    """The look of all panels, and their logarithmic axis of ratios: 0.5 to 8, or wider."""
    values = [row.ratio_eager for row in rows]
    low, high = min(0.5, *values) / 1.1, max(8, *values) * 1.1
    ticks = [2.0**p for p in range(-20, 21) if low <= 2.0**p <= high]
    horizontal = ratios is axes.xaxis
    axes.set(**{"xscale" if horizontal else "yscale": "log"})
    axes.set(**{"xlim" if horizontal else "ylim": (low, high)})
    ratios.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    ratios.set_minor_locator(NullLocator())
    axes.set_title(title, fontsize=11, color=INK)
    axes.grid(axis="x" if horizontal else "both", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
