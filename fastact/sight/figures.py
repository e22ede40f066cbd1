"""The figures of a layer, each one a formula over what a monitor has counted.

n is the number of elements that were looked at, and m = n - NaN - infinities that of the finite ones. What is not defined (a
mean of nothing, the saturation of a function that is not bounded on both sides) is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastact.sight.history import LOWEST, OCTAVES, PARTS, History, Layer, Rows, Side, Units

Numbers = NDArray[np.float64]
Figure = dict[str, Any]  # of one layer, over one step or several: by the names in `NAMES`

HALF = 32  # bins of a histogram for either sign


def _divide(numerator: Numbers, denominator: Numbers) -> Numbers:
    """0 / 0 is NaN: nothing was looked at."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return numerator / denominator


def _finite(side: Side) -> Numbers:
    return side.count - side.nan - side.infinite


def elements(side: Side) -> Numbers:
    """n: elements looked at."""
    return side.count


def saturated_low(side: Side) -> Numbers:
    """low / n: share of the outputs on the low side of a squashing function, where its local derivative is below the saturation
    limit, a small share of its maximum."""
    return _divide(side.low, side.count)


def saturated_high(side: Side) -> Numbers:
    """high / n: the same on the high side."""
    return _divide(side.high, side.count)


def zeros(side: Side) -> Numbers:
    """Number of exact zeros (0.0 and -0.0) / n."""
    return _divide(side.zeros, side.count)


def mean(side: Side) -> Numbers:
    """sum(x) / m over the finite elements."""
    return _divide(side.total, _finite(side))


def rms(side: Side) -> Numbers:
    """Root mean square, sqrt(sum(x^2) / m), over the finite elements."""
    return np.sqrt(_divide(side.squares, _finite(side)))


def minimum(side: Side) -> Numbers:
    """min(x) over the finite elements."""
    return np.where(np.isfinite(side.minimum), side.minimum, np.nan)


def maximum(side: Side) -> Numbers:
    """max(x) over the finite elements."""
    return np.where(np.isfinite(side.maximum), side.maximum, np.nan)


def nan(side: Side) -> Numbers:
    """Number of NaN."""
    return side.nan


def infinite(side: Side) -> Numbers:
    """Number of +inf and -inf."""
    return side.infinite


def units(layer: Layer) -> Numbers:
    """Number of units of which at least one element was looked at."""
    return _of_units(layer, lambda u: u.seen)


def dead_units(layer: Layer) -> Numbers:
    """Number of units that were looked at and 0 at every look: sum over u of [seen(u) and not active(u)], where seen and active
    hold for a unit if they do in any step of the row."""
    return _of_units(layer, lambda u: u.seen & ~u.active)


def dead_share(layer: Layer) -> Numbers:
    """dead_units / units."""
    return _divide(dead_units(layer), units(layer))


def _of_units(layer: Layer, which: Callable[[Units], NDArray[np.bool_]]) -> Numbers:
    if layer.units is None:
        return np.full(len(layer.steps), np.nan)
    number: Numbers = np.count_nonzero(which(layer.units), axis=1).astype(np.float64)
    return number


def rows_seen(layer: Layer) -> Numbers:
    """Rows of a softmax looked at: a row holds the probabilities that add up to 1."""
    return layer.rows.count if layer.rows else np.full(len(layer.steps), np.nan)


def sure_rows(layer: Layer) -> Numbers:
    """Share of the rows of a softmax with max(p) > 0.99."""
    return _divide(layer.rows.sure, layer.rows.count) if layer.rows else np.full(len(layer.steps), np.nan)


def entropy(layer: Layer) -> Numbers:
    """Mean over the rows without NaN of -sum(p log p) / log n for n probabilities: 0 where one of them is 1, 1 where all are
    equal."""
    return _divide(layer.rows.entropy, layer.rows.count - layer.rows.nan) if layer.rows else np.full(len(layer.steps), np.nan)


def nan_rows(layer: Layer) -> Numbers:
    """Rows of a softmax with a NaN."""
    return layer.rows.nan if layer.rows else np.full(len(layer.steps), np.nan)


def ratio(layer: Layer) -> Numbers:
    """rms(gradient_out) / rms(gradient_in): what the layer multiplies the gradient by on its way from the loss. NaN where no
    gradient came, or only zeros."""
    into = rms(layer.gradient_in)
    return _divide(rms(layer.gradient_out), np.where(into > 0, into, np.nan))


def products(ratios: Numbers) -> Numbers:
    """For layer i: the product of ratio(j) over all layers j >= i, from the loss (the last layer) down to this one.

    `ratios` are [layers, ...]; a layer with NaN is left out of the product and has none. So are softmax and log_softmax, whose
    gradient depends on the loss behind them, and layers that no gradient passed.
    """
    known = ~np.isnan(ratios)
    down = np.cumprod(np.where(known, ratios, 1.0)[::-1], axis=0)[::-1]
    return np.where(known, down, np.nan)


def histogram(side: Side) -> tuple[NDArray[np.int64], Numbers]:
    """Counts in 64 equal bins, and their 65 edges, of all recorded steps together.

    The bins divide [-2^e, 2^e], where e is the smallest integer with |x| <= 2^e for all x that were counted: 32 for either
    sign, of width w = 2^(e - 5). Bin 32 + j counts x in (j w, (j + 1) w] for j = 0 ... 31, and bin 31 - j counts -x in the same
    interval; 0 is counted in bin 32. The result is exact: in the five highest octaves w is a whole number of the monitor's
    bins, and all lower octaves lie within [0, w]. The monitor's octaves set the limits: e is at least LOWEST + 1; magnitudes
    in its first bin, up to 2^LOWEST (1 + 1/16), are taken for 0, and those above 2^(LOWEST + OCTAVES) counted in the last one.
    """
    octaves = side.histogram.reshape(2, OCTAVES, PARTS).copy()
    filled = np.flatnonzero(octaves.any(axis=(0, 2)))
    top = int(filled[-1]) if len(filled) else 0
    halves = np.zeros((2, HALF), np.int64)
    halves[:, 0] = octaves[:, 0, 0]
    octaves[:, 0, 0] = 0
    # Of octave top - i, 2^i neighbours make a bin: PARTS >> i bins, the last of them below the first one of the octave above.
    for i in range(min(PARTS.bit_length(), top + 1)):
        size = PARTS >> i
        halves[:, size : 2 * size] = octaves[:, top - i].reshape(2, size, -1).sum(axis=2)
    halves[:, 0] += octaves[:, : max(top - PARTS.bit_length() + 1, 0)].sum(axis=(1, 2))
    edges = np.linspace(-1, 1, 2 * HALF + 1) * 2.0 ** (top + LOWEST + 1)
    return np.concatenate((halves[1, ::-1], halves[0])), edges


# Names of the figures, and the formulas: of an output, of either gradient, of the layer as a whole.
OUTPUT: dict[str, Callable[[Side], Numbers]] = {
    "elements": elements,
    "saturated_low": saturated_low,
    "saturated_high": saturated_high,
    "zeros": zeros,
    "mean": mean,
    "rms": rms,
    "minimum": minimum,
    "maximum": maximum,
    "nan": nan,
    "infinite": infinite,
}
GRADIENT: dict[str, Callable[[Side], Numbers]] = {
    "elements": elements,
    "rms": rms,
    "zeros": zeros,
    "nan": nan,
    "infinite": infinite,
}
LAYER: dict[str, Callable[[Layer], Numbers]] = {
    "units": units,
    "dead_units": dead_units,
    "dead_share": dead_share,
    "rows": rows_seen,
    "sure_rows": sure_rows,
    "entropy": entropy,
    "nan_rows": nan_rows,
    "ratio": ratio,
}
SIDES = ("gradient_in", "gradient_out")
NAMES = [*OUTPUT, *(f"{side}_{name}" for side in SIDES for name in GRADIENT), *LAYER, "product"]
COUNTS = {name for name in NAMES if name.endswith(("elements", "nan", "infinite", "units", "nan_rows")) or name == "rows"}


def per_step(layer: Layer) -> dict[str, Numbers]:
    """Every figure but the product: an array of [steps]."""
    all_of = {name: f(layer.output) for name, f in OUTPUT.items()}
    if not layer.squashing:
        nothing = np.full(len(layer.steps), np.nan)
        all_of |= {"saturated_low": nothing, "saturated_high": nothing}
    for side in SIDES:
        all_of |= {f"{side}_{name}": f(getattr(layer, side)) for name, f in GRADIENT.items()}
    return all_of | {name: f(layer) for name, f in LAYER.items()}


def chosen(layer: Layer, training: bool | None = None) -> NDArray[np.bool_]:
    """Which steps of a layer to look at: those in training mode, or those in evaluation mode; by default the former if there
    are any, else the latter."""
    if training is None:
        training = bool(layer.training.any())
    return layer.training if training else ~layer.training


def merged(layer: Layer, where: NDArray[np.bool_]) -> Layer:
    """The layer with one row in place of the steps in `where`: sums of counts and of values, extrema of extrema, the union of
    active units. Histograms remain those of all steps."""

    def add(x: Numbers) -> Numbers:
        return np.array([x[where].sum()])

    def any_of(x: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.array([x[where].any(axis=0)])

    def side(s: Side) -> Side:
        return Side(
            count=add(s.count),
            total=add(s.total),
            squares=add(s.squares),
            minimum=np.array([s.minimum[where].min(initial=np.inf)]),
            maximum=np.array([s.maximum[where].max(initial=-np.inf)]),
            zeros=add(s.zeros),
            low=add(s.low),
            high=add(s.high),
            nan=add(s.nan),
            infinite=add(s.infinite),
            histogram=s.histogram,
            size=s.size,
        )

    r, u = layer.rows, layer.units
    return replace(
        layer,
        steps=layer.steps[where][-1:] if where.any() else np.array([-1]),
        training=np.array([bool(layer.training[where].any())]),
        output=side(layer.output),
        gradient_in=side(layer.gradient_in),
        gradient_out=side(layer.gradient_out),
        rows=r and Rows(add(r.count), add(r.sure), add(r.entropy), add(r.nan)),
        units=u and Units(any_of(u.seen), any_of(u.active)),
    )


def _plain(name: str, value: float) -> Any:
    return int(value) if name in COUNTS and not math.isnan(value) else float(value)


def _about(layer: Layer) -> Figure:
    return {"layer": layer.name, "kind": layer.kind, "source": layer.source}


def summary(history: History, training: bool | None = None) -> list[Figure]:
    """The figures of every layer over its chosen steps (see `chosen`): one dict per layer, with `steps`, their number."""
    where = [chosen(layer, training) for layer in history.layers]
    found = [per_step(merged(layer, w)) for layer, w in zip(history.layers, where, strict=True)]
    ratios = [np.full(1, np.nan) if layer.rows else f["ratio"] for layer, f in zip(history.layers, found, strict=True)]
    for f, product in zip(found, products(np.array(ratios).reshape(-1, 1)), strict=True):
        f["product"] = product
    return [
        _about(layer) | {"steps": int(w.sum())} | {name: _plain(name, f[name][0]) for name in NAMES}
        for layer, w, f in zip(history.layers, where, found, strict=True)
    ]


def rows(history: History) -> list[Figure]:
    """The figures of every layer in every recorded step: one dict each, as `pandas.DataFrame(rows)` takes them."""
    steps = np.unique(np.concatenate([np.empty(0, np.int64), *(layer.steps for layer in history.layers)]))
    at = [np.searchsorted(steps, layer.steps) for layer in history.layers]
    found = [per_step(layer) for layer in history.layers]
    ratios = np.full((len(found), len(steps)), np.nan)
    for i, (layer, f) in enumerate(zip(history.layers, found, strict=True)):
        if layer.rows is None:
            ratios[i, at[i]] = f["ratio"]
    for f, product, where in zip(found, products(ratios), at, strict=True):
        f["product"] = product[where]
    return [
        _about(layer)
        | {"step": int(step), "training": bool(layer.training[i])}
        | {name: _plain(name, f[name][i]) for name in NAMES}
        for layer, f in zip(history.layers, found, strict=True)
        for i, step in enumerate(layer.steps)
    ]
