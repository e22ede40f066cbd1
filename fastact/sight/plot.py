"""The figure of a report: six panels in one file."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastact.sight import figures
from fastact.sight.figures import Figure, Numbers
from fastact.sight.history import LOWEST, OCTAVES, PARTS, Layer, Side
from fastact.sight.report import Report, shortened

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator, NullLocator
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "matplotlib":
        raise
    message = "figures need matplotlib, which is missing: pip install 'fastact[sight]'"
    raise ModuleNotFoundError(message, name="matplotlib") from None

# Hues of Okabe and Ito, told apart in every common kind of colour blindness.
LOW, HIGH, ZERO, DEAD = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
ACTIVE, INACTIVE, UNSEEN, DOUBTFUL = "#DCE9F2", "#1B3A57", "#B8B8B8", "#F3CDB6"
INK, PALE = "#333333", "#E3E3E3"

# Of the first panel: colours and what the key says.
BAR_STYLES = {
    "saturated_low": (LOW, "saturated low"),
    "saturated_high": (HIGH, "saturated high"),
    "zeros": (ZERO, "exact zeros"),
    "dead_share": (DEAD, "dead units"),
}
BARS = list(BAR_STYLES)
BAD = {"nan": "NaN", "infinite": "infinite"}  # figures, and what is said of a layer that has some
NAMED: dict[str, Any] = {"parse_math": False}  # of texts with a path, in which $ is a letter
KEY: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 8.5, "handlelength": 1.2, "borderaxespad": 0}

NAME = 34  # characters of a path beside an axis
CROWDED = 60  # layers: more of them have thinner lines
MOST_LINES = 24  # densities that one can tell apart in one panel
COLUMNS = 240  # of a panel that has a row for each of more layers
MOST_UNITS, MOST_STEPS = 300, 120  # cells of the map that one can still see
SUBOCTAVES = 4  # points of a gradient density per octave
INSIDE = 0.999  # share of a layer's outputs that the axis of the densities makes room for


def canvas(width: float, height: float) -> Canvas:
    """A figure that belongs to nobody else: no pyplot, no state that the caller could see."""
    figure = Canvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot(report: Report, path: str | PathLike[str]) -> None:
    """Draws the panels of `Report.plot`."""
    draw(report).savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.2)


def draw(report: Report) -> Canvas:
    layers, summary = report.history.layers, report.figures
    by_layer = 1.1 + _inches(len(layers))
    figure = canvas(13, by_layer + 7.6)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    figure.suptitle(f"Activations, and the gradient that passes them\n{_found(report)}", fontsize=13, color=INK, **NAMED)
    foot = textwrap.fill(report.looked_at(), 150)
    figure.text(0.5, 0.0, foot, ha="center", va="top", fontsize=9, color=INK, **NAMED)
    panels = figure.subplots(3, 2, height_ratios=[by_layer, 3.3, 3.6], gridspec_kw={"width_ratios": [1, 1]})
    colours = layer_colours(len(layers))
    _bars(panels[0, 0], summary, colours)
    _depth(panels[0, 1], summary, colours)
    _densities(panels[1, 0], layers, colours)
    _gradient_densities(panels[1, 1], layers, colours)
    _over_steps(panels[2, 0], layers, colours)
    _map(panels[2, 1], layers, summary)
    return figure


def _found(report: Report) -> str:
    found: dict[str, list[str]] = {}
    for verdict in report.verdicts:
        found.setdefault(verdict.kind, []).append(verdict.layer)
    said = [f"{kind}: {shortened(at[0], NAME) if len(at) == 1 else f'{len(at)} layers'}" for kind, at in found.items()]
    return textwrap.fill("; ".join(said) or "no trouble found", 110)


def layer_colours(n: int) -> list[Any]:
    """From the input to the output, without the lightest part of viridis, which is lost on white."""
    return [colormaps["viridis"](x) for x in ([0.3] if n == 1 else np.linspace(0, 0.88, n))]


def _bars(axes: Axes, summary: Sequence[Figure], colours: Sequence[Any]) -> None:
    # Only what some layer has takes room: low and high in one bar, zeros, dead units.
    place = np.arange(len(summary), dtype=np.float64)
    shares = {name: np.nan_to_num([f[name] for f in summary]) for name in BARS}
    bars = [names for names in (BARS[:2], BARS[2:3], BARS[3:]) if any(shares[name].any() for name in names)]
    thickness = 0.8 / max(len(bars), 2)
    for j, names in enumerate(bars):
        left = np.zeros(len(summary))
        for name in names:
            middle = place + (j - (len(bars) - 1) / 2) * thickness
            axes.barh(middle, shares[name], thickness * 0.92, left=left, color=BAR_STYLES[name][0])
            left += shares[name]
    for i, f in enumerate(summary):
        if bad := next((said for name, said in BAD.items() if f[name]), ""):
            axes.text(1.01, i, bad, color=DEAD, fontsize=8, va="center", weight="bold")
    _by_layer(axes, summary, colours, "Share of the outputs (dead: of the units)")
    names = [shortened(f["layer"], NAME) for f in summary]
    axes.set_yticks(range(len(names)), names, fontsize=8.5 if len(names) <= CROWDED else 6, **NAMED)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    key = [Patch(color=colour, label=label) for colour, label in BAR_STYLES.values()]
    axes.legend(handles=key, loc="upper center", bbox_to_anchor=(0.4, -0.32 / _inches(len(summary))), ncols=4, **KEY)


def _depth(axes: Axes, summary: Sequence[Figure], colours: Sequence[Any]) -> None:
    into = np.array([f["gradient_in_rms"] for f in summary])
    out = np.array([f["gradient_out_rms"] for f in summary])
    place = np.arange(len(summary))
    drawn = out > 0
    axes.plot(out[drawn], place[drawn], color=INK, linewidth=1, zorder=1)
    axes.scatter(into, place, s=42, facecolors="white", edgecolors=list(colours), linewidths=1.4, zorder=2)
    axes.scatter(out[drawn], place[drawn], s=34, c=[colours[i] for i in place[drawn]], zorder=3)
    for i, (f, rms) in enumerate(zip(summary, out, strict=True)):
        bad = next((said for name, said in BAD.items() if f[f"gradient_out_{name}"] or f[f"gradient_in_{name}"]), "")
        said = bad or ("0" if rms == 0 else "no gradient seen" if math.isnan(rms) else "")
        if said:
            axes.annotate(
                said,
                (1.01 if bad else 0.02, i),
                xycoords=("axes fraction", "data"),
                color=DEAD if bad else INK,
                weight="bold" if bad else "normal",
                fontsize=8,
                va="center",
            )
    _by_layer(axes, summary, colours, "RMS of the gradient, from the output (bottom) to the input (top)")
    values = np.concatenate((into, out))
    values = values[values > 0]
    axes.set_xscale("log")
    # At least two decades, so that a healthy network looks flat.
    low, high = (values.min(), values.max()) if len(values) else (0.1, 1)
    room = max(1.2, math.sqrt(max(100 / (high / low), 1)))
    axes.set_xlim(low / room, high * room)
    hollow: dict[str, Any] = {"linestyle": "", "marker": "o", "color": INK}
    key = [
        Line2D([], [], markerfacecolor="white", label="comes in from the loss", **hollow),
        Line2D([], [], label="goes out to the input", **hollow),
    ]
    axes.legend(handles=key, loc="upper center", bbox_to_anchor=(0.5, -0.32 / _inches(len(summary))), ncols=2, **KEY)


def _inches(layers: int) -> float:
    """The height of a panel with a line per layer."""
    return max(layers, 3) * (0.24 if layers <= CROWDED else 0.15)


def _by_layer(axes: Axes, summary: Sequence[Figure], colours: Sequence[Any], title: str) -> None:
    _style(axes, title)
    axes.set_ylim(max(len(summary), 1) - 0.4, -0.6)
    axes.set_yticks([])
    axes.tick_params(axis="y", pad=12)
    axes.grid(axis="y", visible=False)
    # The key to the colours of all panels.
    dots = axes.get_yaxis_transform()
    axes.scatter([-0.015] * len(summary), range(len(summary)), s=22, c=list(colours), transform=dots, clip_on=False)


def _without_zeros(side: Side) -> tuple[Numbers, Numbers]:
    """Without the bin that zeros are counted in, and with them only what is as good as 0."""
    fine = side.histogram.copy()
    fine[0, 0] = 0
    counts, edges = figures.histogram(replace(side, histogram=fine))
    return counts.astype(np.float64), edges


def _densities(axes: Axes, layers: Sequence[Layer], colours: Sequence[Any]) -> None:
    found, extents = [], []
    for layer in layers:
        density, edges = _without_zeros(layer.output)
        found.append((density / max(density.max(), 1), edges))
        if density.any():
            within = np.cumsum(density) / density.sum()
            low, high = np.searchsorted(within, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
            extents.append((edges[low], edges[min(high + 1, len(edges) - 1)]))
    left, right = 0.0, 1.0
    if extents:
        # One layer with far larger outputs does not press all others into a line.
        lows, highs = np.array(extents).T
        left = max(lows.min(), 3 * np.median(lows)) if np.median(lows) < 0 else lows.min()
        right = min(highs.max(), 3 * np.median(highs)) if np.median(highs) > 0 else highs.max()
        left, right = left - 0.03 * (right - left), right + 0.03 * (right - left)
    if len(layers) > MOST_LINES:
        borders = np.linspace(left, right, COLUMNS + 1)
        # Of a bin that lies in several columns, each has its share.
        rows = [np.diff(np.interp(borders, edges, np.append(0, np.cumsum(density)))) for density, edges in found]
        _rows(axes, borders, rows, colours)
    else:
        for (density, edges), colour in zip(found, colours, strict=True):
            if density.any():
                centres = (edges[:-1] + edges[1:]) / 2
                first, *_, last = [*np.flatnonzero(density)] * 2
                x = [edges[first], *centres[first : last + 1], edges[last + 1]]
                axes.plot(x, [0, *density[first : last + 1], 0], color=colour, linewidth=1.3)
        axes.set_ylim(0, 1.05)
    _style(axes, f"Density of the outputs, by layer {_peak(layers)}")
    axes.set_xlabel("output, without exact zeros", color=INK, fontsize=9)
    axes.set_xlim(left, right)
    if not extents:
        _nothing(axes, "no finite output other than 0 was seen")


def _gradient_densities(axes: Axes, layers: Sequence[Layer], colours: Sequence[Any]) -> None:
    octaves = np.arange(OCTAVES)[:, None] + LOWEST
    borders = (2.0**octaves * (1 + np.arange(SUBOCTAVES) / SUBOCTAVES)).reshape(-1)
    borders = np.append(borders, 2.0 ** (OCTAVES + LOWEST))
    widths = np.diff(np.log2(borders))
    found, seen = [], []
    for layer in layers:
        counts = layer.gradient_out.histogram.sum(axis=0).astype(np.float64)
        counts[: PARTS // SUBOCTAVES] = 0  # among them zeros and all that is smaller still
        density = counts.reshape(-1, PARTS // SUBOCTAVES).sum(axis=1) / widths
        found.append(density / max(density.max(), 1))
        shown = np.flatnonzero(found[-1] > 1e-3)
        if len(shown):
            seen.append((shown[0], shown[-1]))
    if len(layers) > MOST_LINES:
        _rows(axes, borders, found, colours)
    else:
        for density, colour in zip(found, colours, strict=True):
            shown = np.flatnonzero(density > 1e-3)
            if len(shown):
                cut = slice(max(shown[0] - 1, 0), shown[-1] + 2)
                axes.plot(np.sqrt(borders[:-1] * borders[1:])[cut], density[cut], color=colour, linewidth=1.3)
        axes.set_ylim(0, 1.05)
    _style(axes, f"Density of the gradients that go out to the input {_peak(layers)}")
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"magnitude (above {borders[1]:.0e})", color=INK, fontsize=9)
    if seen:
        axes.set_xlim(borders[min(first for first, _ in seen)] / 2, borders[max(last for _, last in seen) + 1] * 2)
    else:
        axes.set_xlim(1e-6, 1)
        _nothing(axes, "no finite gradient other than 0 was seen")


def _peak(layers: Sequence[Layer]) -> str:
    return "(peak at 1)" if len(layers) <= MOST_LINES else "(peak black)"


def _rows(axes: Axes, borders: Numbers, rows: Sequence[Numbers], colours: Sequence[Any]) -> None:
    """Densities, a row for each layer in the order of the first panels."""
    place = np.arange(len(rows) + 1) - 0.5
    cells = np.array([row / (row.max() or 1) for row in rows])
    axes.pcolormesh(borders, place, cells, cmap="Greys", vmin=0, vmax=1, rasterized=True)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.scatter(
        [-0.015] * len(rows), range(len(rows)), s=8, c=list(colours), transform=axes.get_yaxis_transform(), clip_on=False
    )


def _over_steps(axes: Axes, layers: Sequence[Layer], colours: Sequence[Any]) -> None:
    bad: list[int] = []
    for layer, colour in zip(layers, colours, strict=True):
        where = figures.chosen(layer)
        if layer.squashing:  # for relu6 and hardsigmoid zeros are among these
            share = figures.saturated_low(layer.output) + figures.saturated_high(layer.output)
        else:
            share = figures.zeros(layer.output)
        marker = "o" if where.sum() <= 20 else None
        axes.plot(layer.steps[where], share[where], color=colour, linewidth=1.3, marker=marker, markersize=3)
        bad += layer.steps[where & (layer.output.nan > 0)].tolist()
    if bad:
        axes.axvline(min(bad), color=DEAD, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
        axes.annotate("NaN", (min(bad), 1.0), color=DEAD, fontsize=8, xytext=(3, -9), textcoords="offset points")
    _style(axes, "Saturated outputs, or exact zeros, over the steps")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step
        axes.set_xlim(left - 0.5, right + 0.5)
    axes.set_xlabel("step", color=INK, fontsize=9)


def _map(axes: Axes, layers: Sequence[Layer], summary: Sequence[Figure]) -> None:
    with_units = [i for i, layer in enumerate(layers) if layer.units is not None and figures.chosen(layer).any()]
    if not with_units:
        _style(axes, "Units over the steps")
        axes.set_xticks([])
        axes.set_yticks([])
        _nothing(axes, "no layer with units was seen")
        return
    i = max(with_units, key=lambda i: (summary[i]["dead_units"], summary[i]["nan"] > 0, -i))
    layer, f = layers[i], summary[i]
    assert layer.units is not None
    where = figures.chosen(layer)
    seen, active = layer.units.seen[where], layer.units.active[where]
    dead = np.flatnonzero(seen.any(axis=0) & ~active.any(axis=0))

    shown = np.arange(seen.shape[1])
    if len(shown) > MOST_UNITS:  # those active in the fewest steps, in their order
        shown = np.sort(np.argsort(active.sum(axis=0), kind="stable")[:MOST_UNITS])
    blocks = np.array_split(np.arange(len(seen)), min(len(seen), MOST_STEPS))
    bad = layer.output.nan[where] > 0
    cells: NDArray[np.int64] = np.array(
        [
            np.where(active[b][:, shown].any(axis=0), 3 if bad[b].any() else 2, np.where(seen[b][:, shown].any(axis=0), 1, 0))
            for b in blocks
        ]
    )
    steps = layer.steps[where]
    axes.imshow(
        cells,
        cmap=ListedColormap([UNSEEN, INACTIVE, ACTIVE, DOUBTFUL]),
        vmin=0,
        vmax=3,
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, len(shown) - 0.5, len(blocks) - 0.5, -0.5),
    )
    # White lines between columns, where there is room for them.
    if len(shown) <= 100:
        axes.vlines(np.arange(len(shown) - 1) + 0.5, -0.5, len(blocks) - 0.5, color="white", linewidth=0.6)
    marked = np.flatnonzero(np.isin(shown, dead))
    above = axes.get_xaxis_transform()
    axes.scatter(marked, [1.03] * len(marked), s=22, marker="v", color=DEAD, transform=above, clip_on=False)
    name = shortened(layer.name, NAME)
    some = f", {len(shown)} least active" if len(shown) < seen.shape[1] else ""
    _style(axes, f"{name}: {f['dead_units']} dead of {f['units']} units{some}", pad=12)
    axes.grid(visible=False)
    axes.set_ylabel("step", color=INK, fontsize=9)
    marks = np.intersect1d(MaxNLocator(6, integer=True).tick_values(steps[0], steps[-1]), steps)
    if len(marks) < 3:  # no round numbers among them
        marks = steps[np.unique(np.linspace(0, len(steps) - 1, 6).astype(int))]
    axes.set_yticks(np.searchsorted([steps[b[-1]] for b in blocks], marks), [f"{step:.0f}" for step in marks])
    if some:
        ticks = np.unique(np.linspace(0, len(shown) - 1, 6).astype(int))
        axes.set_xticks(ticks, [str(shown[t]) for t in ticks])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("unit", color=INK, fontsize=9)
    key: list[Any] = [Patch(color=ACTIVE, label="active"), Patch(color=INACTIVE, label="0 at every look")]
    if (cells == 3).any():  # a NaN counts as active, and of which unit it is nobody knows
        key.insert(1, Patch(color=DOUBTFUL, label="not 0, or NaN"))
    if (cells == 0).any():
        key.append(Patch(color=UNSEEN, label="not looked at"))
    key.append(Line2D([], [], marker="v", linestyle="", color=DEAD, label="dead"))
    axes.legend(handles=key, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=5, **KEY)


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK)


def _style(axes: Axes, title: str, pad: float = 6) -> None:
    axes.set_title(title, fontsize=10.5, color=INK, pad=pad, **NAMED)
    axes.grid(color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8.5, length=0)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
