"""What is made of a monitor's counts: figures against NumPy, planted troubles and their verdicts, files and figures."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

import fastact.sight
from fastact.sight import figures, verdicts
from fastact.sight.history import BINS, LOWEST, OCTAVES, PARTS, History, Layer, Rows, Side, Units
from fastact.sight.images import Pair, gradient_images
from fastact.sight.report import Report, shortened

Array = NDArray[np.float64]

LIMIT = 1 - 0.97**2  # of a local derivative, as a share of its maximum: saturated below

# Of squashing functions: bounds, and the local derivative as a share of its maximum, from the output.
SQUASHING: dict[str, tuple[tuple[float, float], Callable[[Array], Array]]] = {
    "sigmoid": ((0, 1), lambda y: y * (1 - y) * 4),
    "tanh": ((-1, 1), lambda y: 1 - y * y),
    "relu6": ((0, 6), lambda y: ((y > 0) & (y < 6)) * 1.0),
}
BOUNDS = {"relu": (0, math.inf), "softmax": (0, 1), "log_softmax": (-math.inf, 0)}


class Step:
    """What a layer does in one step: its output, the gradient with respect to it and to the input."""

    def __init__(
        self, output: Array, into: Array | None = None, out: Array | None = None, *, training: bool = True, at: int = -1
    ):
        self.output, self.training, self.at = output, training, at
        self.into = np.empty(0) if into is None else into
        self.out = np.empty(0) if out is None else out


def counters(x: Array) -> NDArray[np.int64]:
    """A histogram by the rule in `history`, an element at a time."""
    counts = np.zeros((2, BINS), np.int64)
    for value in x[np.isfinite(x)].tolist():
        mantissa, exponent = math.frexp(abs(value))
        upper = exponent - (mantissa == 0.5)  # the octave ends at 2^upper
        octave = upper - 1 - LOWEST
        if value == 0 or octave < 0:
            place = 0
        elif octave >= OCTAVES:
            place = BINS - 1
        else:
            place = octave * PARTS + math.ceil((abs(value) / 2.0 ** (upper - 1) - 1) * PARTS) - 1
        counts[int(value < 0), place] += 1
    return counts


def side(tensors: Sequence[Array], kind: str | None = None) -> Side:
    finite = [x[np.isfinite(x)] for x in tensors]
    flat = [np.zeros(x.shape, bool) for x in tensors]
    middle = 0.0
    if kind in SQUASHING:
        (low, high), slope = SQUASHING[kind]
        middle = (low + high) / 2
        with np.errstate(invalid="ignore"):
            flat = [slope(x) < LIMIT for x in tensors]

    def numbers(values: Any) -> Array:
        return np.array(list(values), np.float64)

    return Side(
        count=numbers(x.size for x in tensors),
        total=numbers(x.sum() for x in finite),
        squares=numbers((x * x).sum() for x in finite),
        minimum=numbers(x.min(initial=np.inf) for x in finite),
        maximum=numbers(x.max(initial=-np.inf) for x in finite),
        zeros=numbers((x == 0).sum() for x in tensors),
        low=numbers((f & (x < middle)).sum() for f, x in zip(flat, tensors, strict=True)),
        high=numbers((f & (x > middle)).sum() for f, x in zip(flat, tensors, strict=True)),
        nan=numbers(np.isnan(x).sum() for x in tensors),
        infinite=numbers(np.isinf(x).sum() for x in tensors),
        histogram=sum((counters(x) for x in tensors), np.zeros((2, BINS), np.int64)),
    )


def softmax_rows(tensors: Sequence[Array]) -> Rows:
    found = []
    for p in tensors:
        whole = p[~np.isnan(p).any(axis=1)]
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(whole > 0, -whole * np.log(whole), 0).sum(axis=1) / max(math.log(p.shape[1]), 1e-300)
        sure = (whole.max(axis=1, initial=0) > 0.99).sum()
        found.append((len(p), sure, terms.sum() if p.shape[1] > 1 else 0, len(p) - len(whole)))
    return Rows(*np.array(found, np.float64).reshape(-1, 4).T)


def layer(name: str, kind: str, steps: Sequence[Step]) -> Layer:
    """A slow recorder: units along the last dim, softmax along it too."""
    outputs = [step.output for step in steps]
    softmax = "softmax" in kind
    at = [step.at if step.at >= 0 else i for i, step in enumerate(steps)]
    alike = not softmax and len({x.shape[-1] for x in outputs}) == 1
    flat = [x.reshape(-1, x.shape[-1]) for x in outputs]
    return Layer(
        name=name,
        kind=kind,
        parameters={},
        source="fastact",
        squashing=kind in SQUASHING,
        bounds=SQUASHING[kind][0] if kind in SQUASHING else BOUNDS.get(kind, (-math.inf, math.inf)),
        length=outputs[-1].shape[-1] if softmax else None,
        steps=np.array(at, np.int64),
        training=np.array([step.training for step in steps]),
        output=side(outputs, kind),
        gradient_in=side([step.into for step in steps]),
        gradient_out=side([step.out for step in steps]),
        rows=softmax_rows(outputs if kind == "softmax" else [np.exp(x) for x in outputs]) if softmax else None,
        units=Units(np.array([[len(x) > 0] * x.shape[1] for x in flat]), np.array([(x != 0).any(axis=0) for x in flat]))
        if alike
        else None,
        unit_dim=-1 if alike else None,
    )


def history(*layers: Layer, **more: Any) -> History:
    return History(**{"layers": list(layers), "unseen": [], "every": 1, "sample": None} | more)


# Figures


@pytest.fixture
def random(generator: torch.Generator) -> np.random.Generator:
    return np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))


def a_network(random: np.random.Generator, steps: int = 6) -> tuple[History, list[list[Step]]]:
    """Layers of every sort, in training and evaluation mode, some not in every step; and what they were made of."""
    recorded: list[list[Step]] = []
    for i, kind in enumerate(["tanh", "relu", "sigmoid", "softmax", "leaky_relu"]):
        mine = []
        for s in range(steps):
            x = random.standard_normal((7, 5)) * 3
            p = np.exp(x * 3) / np.exp(x * 3).sum(axis=1, keepdims=True)
            of = {"tanh": np.tanh(x), "relu": np.maximum(x, 0), "sigmoid": 1 / (1 + np.exp(-2 * x)), "softmax": p}
            y = of.get(kind, np.where(x > 0, x, 0.01 * x))
            if kind == "relu":
                y[:, 1] = 0
                y[:, 2] *= s == 0
            into = random.standard_normal(y.shape) * 10.0**-i
            training = s % 3 != 2
            mine.append(
                Step(y, into if training else None, into * random.random(y.shape) if training else None, training=training)
            )
        if kind in ("sigmoid", "softmax"):
            mine[1].output[2, 3] = np.nan
        if kind == "leaky_relu":
            mine[1].output[0, :2] = np.inf, -np.inf
            assert mine[0].out is not None
            mine[0].out[0, 0], mine[0].out[1, :3] = np.nan, 0
        recorded.append(mine)
    names = ["a", "b", "c", "d", "e"]
    kinds = ["tanh", "relu", "sigmoid", "softmax", "leaky_relu"]
    return history(*(layer(n, k, s) for n, k, s in zip(names, kinds, recorded, strict=True))), recorded


def straight(kind: str, steps: Sequence[Step]) -> dict[str, float]:
    """The figures from the tensors themselves."""

    def together(name: str) -> Array:
        return np.concatenate([np.empty((0, 5)), *(x for s in steps if (x := getattr(s, name)).size)])

    y, into, out = together("output"), together("into"), together("out")
    finite = y[np.isfinite(y)]

    def rms(x: Array) -> float:
        x = x[np.isfinite(x)]
        return math.sqrt((x**2).mean()) if x.size else math.nan

    found = {
        "elements": y.size,
        "zeros": (y == 0).mean(),
        "mean": finite.mean(),
        "rms": rms(y),
        "minimum": finite.min(),
        "maximum": finite.max(),
        "nan": np.isnan(y).sum(),
        "infinite": np.isinf(y).sum(),
        "ratio": rms(out) / rms(into),
    }
    for name, x in (("gradient_in", into), ("gradient_out", out)):
        found |= {
            f"{name}_elements": x.size,
            f"{name}_rms": rms(x),
            f"{name}_zeros": (x == 0).mean() if x.size else math.nan,
            f"{name}_nan": np.isnan(x).sum(),
            f"{name}_infinite": np.isinf(x).sum(),
        }
    low = high = units = dead = rows = sure = entropy = nan_rows = math.nan
    if kind in ("tanh", "sigmoid"):
        # Of tanh beyond atanh(0.97), of the sigmoid y = (1 + t) / 2 for the same t.
        t = y if kind == "tanh" else 2 * y - 1
        low, high = (t < -0.97).mean(), (t > 0.97).mean()
    if kind == "softmax":
        whole = [p for p in y if not np.isnan(p).any()]
        rows, nan_rows = len(y), len(y) - len(whole)
        sure = sum(p.max() > 0.99 for p in whole) / rows
        entropy = np.mean([-(p * np.log(p)).sum() / np.log(p.size) for p in whole])
    else:
        units = y.shape[1]
        dead = sum(not column.any() for column in y.T)
    found |= {"saturated_low": low, "saturated_high": high, "units": units, "dead_units": dead, "dead_share": dead / units}
    return found | {"rows": rows, "sure_rows": sure, "entropy": entropy, "nan_rows": nan_rows}


def assert_figures(found: dict[str, Any], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        # Sums in two orders of a few hundred float64 numbers.
        assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-15, nan_ok=True), name


def test_figures_over_the_training_steps(random: np.random.Generator) -> None:
    h, recorded = a_network(random)
    product = 1.0
    for x, f, steps in reversed(list(zip(h.layers, figures.summary(h), recorded, strict=True))):
        expected = straight(x.kind, [s for s in steps if s.training])
        product *= 1 if x.kind == "softmax" else expected["ratio"]
        assert_figures(f, expected | {"steps": 4, "product": math.nan if x.kind == "softmax" else product})


def test_figures_over_the_evaluation_steps(random: np.random.Generator) -> None:
    h, recorded = a_network(random)
    for x, f, steps in zip(h.layers, figures.summary(h, training=False), recorded, strict=True):
        assert_figures(f, straight(x.kind, [s for s in steps if not s.training]) | {"steps": 2, "product": math.nan})


def test_evaluation_alone_is_looked_at_where_there_was_no_training(random: np.random.Generator) -> None:
    steps = [Step(random.standard_normal((7, 5)), training=False) for _ in range(3)]
    (f,) = figures.summary(history(layer("a", "relu", steps)))
    assert_figures(f, straight("relu", steps) | {"steps": 3})


def test_a_row_per_layer_and_step(random: np.random.Generator) -> None:
    h, recorded = a_network(random)
    rows = Report(h).rows()
    assert len(rows) == 30
    assert all(row.keys() == rows[0].keys() for row in rows)
    assert set(figures.NAMES) | {"layer", "kind", "source", "step", "training"} == set(rows[0])
    product = np.ones(6)
    for x, steps in reversed(list(zip(h.layers, recorded, strict=True))):
        mine = [row for row in rows if row["layer"] == x.name]
        for i, (row, step) in enumerate(zip(mine, steps, strict=True)):
            expected = straight(x.kind, [step])
            known = x.kind != "softmax" and step.training
            product[i] *= expected["ratio"] if known else 1
            assert_figures(row, expected | {"step": i, "product": product[i] if known else math.nan})
            assert row["training"] is step.training
            assert all(type(row[name]) is int for name in figures.COUNTS if not math.isnan(row[name]))


def test_products_join_the_layers_of_a_step() -> None:
    """Which may be missing in some: then they are left out."""
    half, third = (np.full((2, 2), x) for x in (1 / 2, 1 / 3))
    ones = np.ones((2, 2))
    first = [Step(ones, ones, half, at=s) for s in (0, 4)]
    last = [Step(ones, ones, third, at=s) for s in (2, 4)]
    rows = figures.rows(history(layer("first", "relu", first), layer("last", "relu", last)))
    found = {(row["layer"], row["step"]): row["product"] for row in rows}
    assert found == pytest.approx({("first", 0): 1 / 2, ("first", 4): 1 / 6, ("last", 2): 1 / 3, ("last", 4): 1 / 3})


def test_no_gradient_has_no_ratio() -> None:
    zeros = np.zeros((2, 2))
    (f,) = figures.summary(history(layer("a", "relu", [Step(zeros, zeros, zeros)])))
    assert math.isnan(f["ratio"])
    assert f["gradient_in_rms"] == 0
    assert figures.summary(history()) == [] == figures.rows(history())


# Histograms


@pytest.mark.parametrize("scale", [1.0, 1e-3, 700.0])
def test_histogram_of_random_numbers(random: np.random.Generator, scale: float) -> None:
    x = random.standard_normal(3000) * scale * np.exp(random.standard_normal(3000))
    x[:50] = 0
    counts, edges = figures.histogram(side([x[:1000], x[1000:]]))
    assert edges[-1] / 2 < np.abs(x).max() <= edges[-1]
    # No random float64 lies on an edge, but 0.
    assert counts.tolist() == np.histogram(x, edges)[0].tolist()
    assert len(counts) == 64
    assert np.allclose(np.diff(edges), edges[-1] / 32, rtol=1e-15)


def merged_one_by_one(values: Sequence[float]) -> tuple[list[int], int]:
    """By the definition in `histogram`; divisions by powers of two are exact."""
    top = max((abs(v) for v in values), default=0)
    e = LOWEST + 1
    while top > 2.0**e and e < LOWEST + OCTAVES:
        e += 1
    counts = [0] * 64
    for v in values:
        w = 2.0 ** (e - 5)
        j = min(max(math.ceil(abs(v) / w) - 1, 0), 31)
        if abs(v) <= 2.0**LOWEST * (1 + 1 / PARTS):
            j = 0
        counts[31 - j if v < 0 else 32 + j] += 1
    return counts, e


def edge_values() -> list[float]:
    """Every power of two, its neighbours and multiples on both sides of the bins' edges; zeros, subnormals."""
    powers = [2.0**p for p in range(-60, 30)]
    around = [v * m for v in powers for m in (1, 1 + 1 / 16, 1.5, 1.75, 2 - 1 / 16)]
    near = [math.nextafter(v, to) for v in around for to in (0, math.inf)]
    values = [*around, *near, 5e-324, 1e-310, 2.2250738585072014e-308]
    return [0.0, -0.0, *values, *(-v for v in values)]


def test_histogram_merges_exactly(random: np.random.Generator) -> None:
    """Whatever the largest magnitude is: below it, bins are cut out of every octave."""
    values = sorted(edge_values(), key=abs)
    assert merged_one_by_one([]) == ([0] * 64, LOWEST + 1)
    for top in range(1, len(values) + 1, 7):
        some = np.array([*random.choice(values[:top], 20), values[top - 1]])
        expected, e = merged_one_by_one(some.tolist())
        counts, edges = figures.histogram(side([some]))
        assert counts.tolist() == expected, some
        assert (edges[0], edges[32], edges[-1]) == (-(2.0**e), 0, 2.0**e)


def test_histogram_counts_no_nan_and_no_infinity() -> None:
    counts, _ = figures.histogram(side([np.array([np.nan, np.inf, -np.inf, 1.0, -1.0, 0.0])]))
    assert np.flatnonzero(counts).tolist() == [0, 32, 63]
    assert counts.sum() == 3


# Verdicts

FORWARD: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "leaky_relu": lambda x: np.where(x > 0, x, x / 2),
}
SLOPE: dict[str, Callable[[Array], Array]] = {
    "relu": lambda y: (y > 0) * 1.0,
    "sigmoid": lambda y: y * (1 - y),
    "tanh": lambda y: 1 - y * y,
    "leaky_relu": lambda y: np.where(y > 0, 1, 1 / 2),
}


def stack(
    random: np.random.Generator, kind: str, depth: int, gain: float, *, bias: float | Array = 0.0, nan_at: int | None = None
) -> History:
    """Linear layers of 32 units, an activation after each but the last, at initialisation: weights of standard deviation
    gain / sqrt(32), 64 new samples in each of 20 steps, and at the end the gradient of a mean over them."""
    weights = [random.standard_normal((32, 32)) * gain / math.sqrt(32) for _ in range(depth + 1)]
    recorded: list[list[Step]] = [[] for _ in range(depth)]
    for s in range(20):
        x = random.standard_normal((64, 32))
        outputs = []
        for i in range(depth):
            x = FORWARD[kind](x @ weights[i] + bias)
            if nan_at == s and i == 1:
                x[0, 0] = np.nan
            outputs.append(x)
        gradient = random.standard_normal((64, 32)) / 64
        for i in reversed(range(depth)):
            into = gradient @ weights[i + 1].T
            gradient = into * SLOPE[kind](outputs[i])
            recorded[i].append(Step(outputs[i], into, gradient))
    return history(*(layer(f"layers.{i}", kind, steps) for i, steps in enumerate(recorded)), output="")


def planted(random: np.random.Generator, kind: str, outputs: Sequence[Array], *, into: float = 1e-3, **more: Any) -> Layer:
    """A layer with these outputs, a gradient of this RMS, and its slope."""
    gradients = [random.standard_normal(y.shape) * into for y in outputs]
    slope = SLOPE.get(kind, lambda y: np.ones_like(y))
    return layer("act", kind, [Step(y, g, g * slope(y), **more) for y, g in zip(outputs, gradients, strict=True)])


def draws(random: np.random.Generator, kind: str, *, width: float = 1.0, shift: float = 0.0, steps: int = 20) -> list[Array]:
    return [FORWARD[kind](random.standard_normal((64, 32)) * width + shift) for _ in range(steps)]


def deep_relu(random: np.random.Generator) -> History:
    """30 layers, each passing on 0.71 of the gradient, and weights that make up for it."""
    layers = [planted(random, "relu", draws(random, "relu", steps=8)) for _ in range(30)]
    for i, x in enumerate(layers):
        x.name = f"layers.{i}"
    return history(*layers)


def probabilities(random: np.random.Generator, width: float, n: int = 10) -> list[Array]:
    terms = [np.exp(x - x.max(axis=1, keepdims=True)) for x in random.standard_normal((8, 64, n)) * width]
    return [x / x.sum(axis=1, keepdims=True) for x in terms]


def classifier_output(random: np.random.Generator, output: str | None, *, training: bool = True) -> History:
    """A ReLU layer, and a sigmoid that becomes sure under cross entropy: the gradient with respect to p is 1/p where p is
    wrong."""
    hidden = [Step(y, np.full(y.shape, 3e-4), np.full(y.shape, 2e-4), training=training) for y in draws(random, "relu")]
    last = []
    for i in range(len(hidden)):
        p = np.clip(draws(random, "sigmoid", width=12 if i or not training else 1, steps=1)[0], 1e-6, 1 - 1e-6)
        right = random.random(p.shape) < 0.99
        into = np.where(right == (p > 0.5), -1 / p, 1 / (1 - p)) / p.size
        last.append(Step(p, into, into * p * (1 - p), training=training))
    return history(layer("hidden", "relu", hidden), layer("last", "sigmoid", last), output=output)


def driven_into_saturation(random: np.random.Generator) -> History:
    """A hidden layer: another one follows."""
    outputs = [*draws(random, "tanh", steps=1), *draws(random, "tanh", width=8)]
    after = planted(random, "relu", draws(random, "relu", steps=21))
    after.name = "last"
    return history(planted(random, "tanh", outputs), after, output="")


def a_few_dead(random: np.random.Generator, dead: int, steps: int = 20, batch: int = 64) -> History:
    outputs = [np.resize(y, (batch, y.shape[1])) for y in draws(random, "relu", steps=steps)]
    for y in outputs:
        y[:, :dead] = 0
    return history(planted(random, "relu", outputs))


HEALTHY: dict[str, Callable[[np.random.Generator], History]] = {
    "tanh": lambda r: stack(r, "tanh", 5, 5 / 3),
    "sigmoid": lambda r: stack(r, "sigmoid", 3, 1),
    "relu": lambda r: stack(r, "relu", 3, math.sqrt(2)),
    "deep relu": deep_relu,
    "wide relu inputs": lambda r: stack(r, "relu", 3, 3),
    "half of relu6 at 0": lambda r: history(planted(r, "relu6", list(np.clip(r.standard_normal((20, 64, 32)), 0, 6)))),
    "sure softmax": lambda r: history(planted(r, "softmax", probabilities(r, 300))),
    "log of 0": lambda r: history(planted(r, "log_softmax", [np.array([[0.0, -np.inf]])] * 20)),
    "sure output": lambda r: classifier_output(r, "last"),
    "sure output, unknown": lambda r: classifier_output(r, None),
    "sure output, clamped": lambda r: classifier_output(r, ""),
    "sure output, clamped, after training": lambda r: classifier_output(r, "", training=False),
    "three dead of 32": lambda r: a_few_dead(r, 3),
    "dead units after few looks": lambda r: a_few_dead(r, 16, steps=4, batch=37),
    "dead units after few steps": lambda r: a_few_dead(r, 16, steps=3, batch=640),
    "nothing": lambda r: history(),
}
FEW = ("dead units after few looks", "dead units after few steps")


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_gets_no_verdict(name: str, random: np.random.Generator) -> None:
    report = Report(HEALTHY[name](random))
    assert report.verdicts == []
    assert ("No trouble found." in str(report)) == bool(report.figures)
    # What the table says of dead units is no verdict yet, and says so.
    assert ("count as dead after few looks" in report.looked_at()) == (name in FEW)


def sparse_relu(random: np.random.Generator) -> History:
    """Every unit is active in one sample of 200."""
    return history(planted(random, "relu", [(random.random((200, 32)) < 0.005) * 1.0 for _ in range(20)]))


def nan_gradient(random: np.random.Generator) -> History:
    """At step 3, from the second of three layers down; at step 4 everywhere."""
    bad = np.full((4, 4), np.nan)
    good = np.tanh(random.standard_normal((4, 4))) / 2
    layers = []
    for i in range(3):
        before = [Step(good, good, good)] * 3
        third = Step(good, good if i == 2 else bad, good if i == 2 else bad)
        layers.append(layer(f"layers.{i}", "tanh", [*before, third, Step(bad, bad, bad)]))
    return history(*layers)


def masked_rows(random: np.random.Generator) -> History:
    outputs = probabilities(random, 1)
    outputs[2][5] = np.nan
    return history(planted(random, "softmax", outputs))


# What is planted, and the layers and kinds of the verdicts: exactly these.
TROUBLES: dict[str, tuple[Callable[[np.random.Generator], History], list[tuple[str, str]]]] = {
    "wide inputs": (lambda r: stack(r, "tanh", 2, 8), [("layers.0", "saturated"), ("layers.1", "saturated")]),
    "shifted inputs": (lambda r: history(planted(r, "sigmoid", draws(r, "sigmoid", shift=8))), [("act", "saturated")]),
    "driven into saturation": (driven_into_saturation, [("act", "saturated")]),
    "dead units": (lambda r: a_few_dead(r, 4), [("act", "dead units")]),
    "all dead": (lambda r: a_few_dead(r, 32), [("act", "vanishing"), ("act", "dead units")]),
    "hardly active": (sparse_relu, [("act", "zeros")]),
    "exploding": (lambda r: stack(r, "leaky_relu", 8, 10), [("layers.3", "exploding")]),
    "one unit": (lambda r: history(planted(r, "softmax", [np.ones((8, 1))] * 3)), [("act", "softmax over one unit")]),
    "one unit, log": (lambda r: history(planted(r, "log_softmax", [np.zeros((8, 1))] * 3)), [("act", "softmax over one unit")]),
    "NaN output": (lambda r: stack(r, "tanh", 4, 1, nan_at=7), [("layers.1", "NaN")]),
    "NaN gradient": (nan_gradient, [("layers.1", "NaN")]),
    "infinity": (lambda r: history(planted(r, "relu", [np.array([[0.0, 1.0, np.inf]])] * 3)), [("act", "infinity")]),
    "masked rows": (masked_rows, [("act", "NaN")]),
    "unseen": (lambda r: history(unseen=[("head.act", "never called")]), [("head.act", "unseen")]),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_a_trouble_is_named(name: str, random: np.random.Generator) -> None:
    make, expected = TROUBLES[name]
    report = Report(make(random))
    assert [(v.layer, v.kind) for v in report.verdicts] == expected, report
    assert {v.kind for v in report.verdicts} <= set(verdicts.KINDS)
    for verdict in report.verdicts:
        assert verdict.text in " ".join(str(report).split())
        assert verdict.remedy in " ".join(str(report).split())


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.gate = nn.Sequential(nn.Linear(channels, half), nn.ReLU(), nn.Linear(half, channels), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate: torch.Tensor = self.gate(x.mean((2, 3)))
        return x * gate[:, :, None, None]


class Residual(nn.Module):
    def __init__(self, *end: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), *end),
        )
        nn.init.constant_(self.body[4].weight, 0.2)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.act(x + self.body(x))
        return y


def classifier(*body: nn.Module) -> nn.Module:
    """Of images, with a mean over all places and two linear layers at the end."""
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 10)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), *body, *end)


class Timed(nn.Module):
    """A block of a U-Net for diffusion: an embedding of the time is added to every place."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, into), nn.SiLU(), nn.Conv2d(into, out, 3, padding=1))
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(32, out))
        self.second = nn.Sequential(nn.GroupNorm(4, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1))
        self.skip = nn.Conv2d(into, out, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.skip(x) + self.second(self.first(x) + self.time(time)[:, :, None, None])
        return y


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down, self.middle, self.up = Timed(8, 8), Timed(8, 8), Timed(16, 8)
        self.last = nn.Sequential(nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time = self.time(x[:, 0].mean((1, 2))[:, None])
        a = self.down(self.stem(x), time)
        b = self.middle(F.avg_pool2d(a, 2), time)
        y: torch.Tensor = self.last(self.up(torch.cat([F.interpolate(b, scale_factor=2.0), a], 1), time))
        return y


SIZES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "gates": (lambda: classifier(*(Residual(Gate(8)) for _ in range(4))), 64),
    "mean over places": (lambda: classifier(*(Residual() for _ in range(20))), 96),
    "embedding of time": (Diffusion, 512),
}


def trained(model: nn.Module, x: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor], **options: Any) -> Report:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with fastact.monitor(model, **options) as watch:
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x)).backward()
            optimizer.step()
    return watch.report()


@pytest.mark.parametrize("options", [{}, {"sample": None}], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_what_spreads_or_gathers_a_gradient_is_no_trouble(
    name: str, options: dict[str, Any], generator: torch.Generator
) -> None:
    """A mean over places spreads the gradient over thousands of them, and what is added to all gathers theirs."""
    make, size = SIZES[name]
    torch.manual_seed(generator.initial_seed())
    x = torch.randn(2, 3, size, size, generator=generator)

    def loss(y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(y, torch.tensor([3, 7])) if y.dim() == 2 else F.mse_loss(y, x)

    report = trained(make(), x, loss, **options)
    rms = [f["gradient_out_rms"] for f in report.figures if f["gradient_out_rms"] > 0]
    assert max(rms) > verdicts.EXPLODED * min(rms)
    assert not {"vanishing", "exploding"} & {v.kind for v in report.verdicts}, report


def test_vanishing_is_found_behind_a_mean_over_places(generator: torch.Generator) -> None:
    torch.manual_seed(generator.initial_seed())
    sigmoids = [m for _ in range(10) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid())]
    x = torch.randn(2, 3, 64, 64, generator=generator)
    report = trained(classifier(*sigmoids), x, lambda y: F.cross_entropy(y, torch.tensor([3, 7])))
    (verdict,) = (v for v in report.verdicts if v.kind == "vanishing")
    below = [f["layer"] for f in report.figures if f["product"] < verdicts.VANISHED]
    assert below.index(verdict.layer) >= len(below) - 2


@pytest.mark.parametrize(("fall", "expected"), [(1 / 4096, []), (1e-5, ["vanishing"])])
def test_the_size_of_a_sampled_tensor_counts(random: np.random.Generator, fall: float, expected: list[str]) -> None:
    """As many elements of 64 x 64 places are looked at as of their mean."""
    g, y = random.standard_normal((64, 32)), random.standard_normal((64, 32))
    first = layer("first", "relu", [Step(y, g * fall * 20, g * fall)] * 3)
    last = layer("last", "relu", [Step(y, g, g / 100)] * 3)
    for side_of in (first.gradient_in, first.gradient_out):
        side_of.size = 4096 * int(side_of.count.sum())
    assert [v.kind for v in Report(history(first, last, output="")).verdicts] == expected


def test_nan_is_named_with_its_step(random: np.random.Generator) -> None:
    (output,) = Report(stack(random, "tanh", 4, 1, nan_at=7)).verdicts
    assert output.text == "NaN at step 7, first seen in its output"
    (gradient,) = Report(nan_gradient(random)).verdicts
    assert gradient.text == "NaN at step 3, first seen in the gradient that came to it"
    (masked,) = Report(masked_rows(random)).verdicts
    assert "-inf" in masked.remedy


@pytest.mark.parametrize("compiled", [False, True])
def test_what_was_not_seen_has_a_remedy_by_its_reason(compiled: bool) -> None:
    model: Any = nn.Sequential(nn.ReLU())
    with fastact.monitor(torch.compile(model, backend="eager") if compiled else model) as watch:
        model[0].forward(torch.ones(2))
    (verdict,) = watch.report().verdicts
    assert (verdict.layer, verdict.kind) == ("0", "unseen")
    assert ("a copy that is not compiled" in verdict.remedy) is compiled
    assert ("forward()" in verdict.remedy) is not compiled


def test_one_sided_saturation_has_another_remedy(random: np.random.Generator) -> None:
    for shift, side_of in ((8, "0% low, 100% high"), (-8, "100% low, 0% high")):
        (verdict,) = Report(history(planted(random, "sigmoid", draws(random, "sigmoid", shift=shift)))).verdicts
        assert side_of in verdict.text
        assert "shifted" in verdict.remedy
    (wide,) = Report(history(planted(random, "sigmoid", draws(random, "sigmoid", width=30)))).verdicts
    assert "wide" in wide.remedy


@pytest.mark.parametrize(("depth", "gain"), [(12, 1.0), (8, 0.6)])
def test_vanishing_is_where_the_product_falls(random: np.random.Generator, depth: int, gain: float) -> None:
    report = Report(stack(random, "sigmoid", depth, gain))
    (verdict,) = report.verdicts
    below = [f["layer"] for f in report.figures if f["product"] < 1e-3]
    assert (verdict.layer, verdict.kind) == (below[-1], "vanishing")
    # With a derivative of at most 1/4, four layers leave 4e-3 at most, and five 1e-3.
    assert len(below) == depth - 4


def test_targets_outside_the_range(random: np.random.Generator) -> None:
    h = history(planted(random, "relu", draws(random, "relu")), planted(random, "sigmoid", draws(random, "sigmoid")))
    h.layers[1].name = "last"
    for targets in (torch.tensor([0.0, 255.0]), np.array([0, 255]), [-1, 1], torch.tensor([2.0], dtype=torch.bfloat16)):
        (verdict,) = Report(h, targets=targets).verdicts
        assert (verdict.layer, verdict.kind) == ("last", "targets out of range")
        assert "[0, 1]" in verdict.text
    for targets in (torch.tensor([0.0, 1.0]), torch.tensor([True]), [0.5], torch.empty(0), [math.nan], None):
        assert Report(h, targets=targets).verdicts == []
    h.output = ""  # a linear layer follows
    assert Report(h, targets=[255]).verdicts == []
    h.output = "act"
    assert [v.layer for v in Report(h, targets=[-1]).verdicts] == ["act"]


def test_classes_are_no_values_for_a_softmax(random: np.random.Generator) -> None:
    h = history(planted(random, "softmax", probabilities(random, 1)))
    assert Report(h, targets=torch.tensor([0, 9])).verdicts == []
    assert [v.kind for v in Report(h, targets=torch.tensor([0.0, 9.0])).verdicts] == ["targets out of range"]


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_squared_loss_after_a_squasher(random: np.random.Generator, kind: str) -> None:
    outputs = probabilities(random, 1) if kind == "softmax" else draws(random, "sigmoid")
    h = history(planted(random, kind, outputs), loss="MSELoss")
    (verdict,) = Report(h).verdicts
    assert (verdict.layer, verdict.kind) == ("act", "squared loss")
    assert ("CrossEntropyLoss" in verdict.remedy) is (kind == "softmax")
    for changes in ({"loss": "BCELoss"}, {"loss": None}, {"output": ""}):
        assert Report(history(*h.layers, **{"loss": "MSELoss"} | changes)).verdicts == []
    assert Report(history(planted(random, "relu", draws(random, "relu")), loss="MSELoss")).verdicts == []


# The report


def test_the_table_has_a_line_per_layer(random: np.random.Generator) -> None:
    h, _ = a_network(random)
    h.layers[1].name = "backbone.encoder.transformer.layers.11.feed_forward.mlp.activation"
    h.unseen.append(("head.act", "never called"))
    report = Report(h)
    lines = str(report).splitlines()
    assert repr(report) == str(report)
    assert max(map(len, lines)) <= 120
    heads = ("layer", "kind", "low %", "high %", "zero %", "dead", "mean", "RMS", "grad in", "grad out", "ratio", "product")
    assert re.fullmatch(" +".join(heads), lines[0])
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[1].startswith("a ")
    name, short = h.layers[1].name, lines[2].split()[0]
    ways = (short.partition("..."), short.rpartition("..."))  # a dot of the name may lie beside them
    assert any(name.startswith(start) and name.endswith(end) for start, _, end in ways)
    f = report.figures[0]
    assert lines[1].split()[1:5] == ["tanh", f"{f['saturated_low']:.1%}"[:-1], f"{f['saturated_high']:.1%}"[:-1], "0.0"]
    assert f"{report.figures[1]['dead_units']}/5" in lines[2]
    assert re.search(r"^d: 28 rows, \d+\.\d% sure \(p > 0.99\), mean entropy [\d.]+ log n, 1 rows of NaN$", str(report), re.M)
    looked_at = "Looked at: 4 steps (0 to 4) in training mode, all elements. 2 steps in evaluation mode are in rows() only. "
    if report.figures[1]["dead_units"]:
        looked_at += f"Units of {name} count as dead after few looks: a verdict takes {verdicts.DEAD_LOOKS} of each in "
        looked_at += f"{verdicts.DEAD_STEPS} steps (more steps, or sample=None). "
    assert report.looked_at() == looked_at + "Not seen at all: head.act."
    assert " ".join(str(report).split()).endswith(report.looked_at())


def test_every_line_fits(random: np.random.Generator) -> None:
    h = stack(random, "sigmoid", 30, 0.01)
    for x in h.layers:
        x.name = "model." * 20 + x.name
        x.kind = "channel_scaled_sigmoid"
    assert max(map(len, str(Report(h)).splitlines()[:31])) <= 120


def test_shortened_names_keep_both_ends() -> None:
    assert shortened("encoder.act", 11) == "encoder.act"
    assert shortened("encoder.layers.11.mlp.act", 15) == "encode...lp.act"
    assert all(len(shortened("x" * n, room)) == min(n, room) for n in range(60) for room in range(10, 50))


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


@pytest.mark.parametrize("name", ["network", "nothing", *TROUBLES])
def test_json_is_strict(name: str, random: np.random.Generator, tmp_path: Path) -> None:
    h = a_network(random)[0] if name == "network" else history() if name == "nothing" else TROUBLES[name][0](random)
    h.environment = {"torch": "2.13", "threads": np.int64(2), "time": np.float32(0.5), "device": torch.device("cpu")}
    report = Report(h)
    report.to_json(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data == report.to_dict()
    assert data["environment"] == {"torch": "2.13", "threads": 2, "time": 0.5, "device": "cpu"}
    assert [x["name"] for x in data["layers"]] == [x.name for x in h.layers]
    assert [v["kind"] for v in data["verdicts"]] == [v.kind for v in report.verdicts]
    for x, f, y in zip(data["layers"], report.figures, h.layers, strict=True):
        for key in ("steps", *figures.NAMES):
            assert x["figures"][key] == (f[key] if math.isfinite(f[key]) else None)
        assert sum(x["histograms"]["output"]["counts"]) == sum(
            next(y for y in h.layers if y.name == x["name"]).output.histogram.flat
        )


class Writer:
    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert math.isfinite(value)
        assert (tag, step) not in self.scalars
        self.scalars[tag, step] = value


def test_scalars_are_logged_per_layer_and_step(random: np.random.Generator) -> None:
    report = Report(a_network(random)[0])
    writer = Writer()
    report.log_to(writer, prefix="sight")
    expected = {
        (f"sight/{name}/{row['layer']}", row["step"]): row[name]
        for row in report.rows()
        for name in figures.NAMES
        if not math.isnan(row[name])
    }
    assert writer.scalars == expected
    assert ("sight/ratio/a", 0) in expected
    assert ("sight/ratio/a", 2) not in expected


# Figures on paper

PICTURES: dict[str, Callable[[np.random.Generator], History]] = {
    "one layer": lambda r: a_few_dead(r, 5),
    "thirty layers": lambda r: named(deep_relu(r), "encoder.layers.{}.mlp.activation"),
    "ninety layers": lambda r: history(*deep_relu(r).layers * 3),
    "NaN": lambda r: stack(r, "tanh", 4, 1, nan_at=7),
    "names that are no formulas": lambda r: names_with_dollars(r),
    "one unit in one step": lambda r: history(planted(r, "relu", [np.ones((5, 1))])),
    "all sorts": lambda r: a_network(r)[0],
    "nothing but 0": lambda r: history(planted(r, "relu", [np.zeros((4, 4))] * 3)),
    "a step in evaluation mode": lambda r: history(layer("a", "tanh", [Step(draws(r, "tanh")[0], training=False)])),
    "many units and steps": lambda r: history(planted(r, "relu", [np.maximum(r.standard_normal((1, 500)), 0)] * 200)),
    "no units": lambda r: history(planted(r, "softmax", probabilities(r, 1))),
    "nothing": lambda r: history(),
}


def named(h: History, name: str) -> History:
    for i, x in enumerate(h.layers):
        x.name = name.format(i)
    return h


def names_with_dollars(random: np.random.Generator) -> History:
    h = named(a_few_dead(random, 4), "$a_$b_{}")
    h.layers += named(deep_relu(random), "$\\frac$_{}").layers[:2]
    h.unseen.append(("$_$", "was never called"))
    return h


@pytest.mark.parametrize("name", PICTURES)
def test_plot(name: str, random: np.random.Generator, tmp_path: Path) -> None:
    """No text leaves the picture or lies over another text."""
    pytest.importorskip("matplotlib", reason="pip install 'fastact[sight]'")
    plot = importlib.import_module("fastact.sight.plot")
    report = Report(PICTURES[name](random))
    path = tmp_path / "report.png"
    report.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    figure = plot.draw(report)
    figure.draw_without_rendering()
    whole = figure.get_tightbbox().padded(0.2).transformed(figure.dpi_scale_trans)
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts_of(figure)]
    said = " ".join(t for t, _ in boxes)
    assert all(shortened(f["layer"], plot.NAME) in said for f in report.figures)
    for t, box in boxes:
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, t
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, t
    for (t, one), (u, other) in itertools.combinations(boxes, 2):
        width = min(one.x1, other.x1) - max(one.x0, other.x0)
        height = min(one.y1, other.y1) - max(one.y0, other.y0)
        # Boxes have room above and below their letters.
        assert min(width, height) <= 3, (t, u)


@pytest.mark.parametrize("sample", [None, 2048])
def test_densities_leave_out_the_zeros_and_nothing_else(sample: int | None) -> None:
    """Of a sample's histogram, which is of a part of what the zeros are counted in, and of training alone."""
    pytest.importorskip("matplotlib", reason="pip install 'fastact[sight]'")
    plot = importlib.import_module("fastact.sight.plot")
    x = torch.full((64 * 1000,), 0.01)
    x[::2] = -1
    x[1::64] = 1  # so that of 64 neighbours 32 become 0, and 31 lie in the first bin above it
    model = fastact.ReLU()
    with fastact.monitor(model, sample=sample) as watch:
        for training in (True, False, False):
            model.train(training)
            model(x)
    (found,) = watch.history().layers
    density, edges = plot._without_zeros(found.output)
    runs = found.output.histogram.sum() / 64
    assert edges[-1] == 1
    assert runs == (1000 if sample is None else sample / 64)
    assert {int(i): density[i] / runs for i in np.flatnonzero(density)} == {32: 31, 63: 1}


def texts_of(figure: Any) -> list[Any]:
    """All that are drawn: an axis also keeps labels of ticks outside its limits."""
    texts = list(figure.texts)  # the title of the figure among them
    for axes in figure.axes:
        texts += [axes.title, *axes.texts, *(axes.get_legend().get_texts() if axes.get_legend() else [])]
        for axis in (axes.xaxis, axes.yaxis):
            texts += [axis.label, *(tick.label1 for tick in axis._update_ticks())]
    return [t for t in texts if t.get_visible() and t.get_text().strip()]


def drawn(h: History) -> Any:
    pytest.importorskip("matplotlib", reason="pip install 'fastact[sight]'")
    figure = importlib.import_module("fastact.sight.plot").draw(Report(h))
    figure.draw_without_rendering()
    return figure


def labels(axis: Any) -> list[str]:
    return [tick.label1.get_text() for tick in axis._update_ticks()]


def test_steps_and_units_are_counted_in_whole_numbers(random: np.random.Generator) -> None:
    axes = drawn(history(layer("a", "relu", [Step(np.ones((5, 1)), at=7)]))).axes
    assert [labels(axes[4].xaxis), labels(axes[5].xaxis), labels(axes[5].yaxis)] == [["7"], ["0"], ["7"]]


def mesh_of(axes: Any) -> tuple[Array, Array]:
    """The middles of its columns, and its rows."""
    mesh = axes.collections[0]
    borders = mesh.get_coordinates()[0, :, 0]
    return (borders[1:] + borders[:-1]) / 2, np.asarray(mesh.get_array())


def test_densities_of_many_layers_are_rows(random: np.random.Generator) -> None:
    """Where lines would hide each other."""
    h = history(*(planted(random, "relu", draws(random, "relu", steps=2), into=10.0 ** (-i / 8)) for i in range(40)))
    h.layers[0].output.histogram[:] = 0
    axes, gradients = drawn(h).axes[2:4]
    for panel in (axes, gradients):
        assert not panel.lines
        assert panel.get_ylim() == (39.5, -0.5)
    values, rows = mesh_of(axes)
    assert rows.max(axis=1).tolist() == [0] + [1] * 39
    assert not rows[:, values < -0.1].any()
    # Half of a normal distribution.
    assert np.median(rows[:, values > 2], axis=0).max() < 0.5 < np.median(rows[:, (values > 0) & (values < 0.5)], axis=0).min()
    values, rows = mesh_of(gradients)
    assert rows.max(axis=1).tolist() == [1] * 40
    scales = 10.0 ** (-np.arange(40) / 8)
    peaks = values[rows.argmax(axis=1)]
    assert np.all((peaks / scales > 0.2) & (peaks / scales < 4))


def test_a_gradient_that_is_not_finite_was_seen(random: np.random.Generator) -> None:
    y = random.standard_normal((4, 4))
    h = history(
        *(layer(f"{bad}", "relu", [Step(y, np.full((4, 4), bad), np.full((4, 4), bad))] * 2) for bad in (math.inf, math.nan)),
        layer("none", "relu", [Step(y)] * 2),
    )
    axes = drawn(h).axes[1]
    assert [t.get_text() for t in axes.texts] == ["infinite", "NaN", "no gradient seen"]
    lines = str(Report(h)).splitlines()
    assert [line.split()[-4:-2] for line in lines[1:4]] == [["inf", "inf"], ["NaN", "NaN"], ["-", "-"]]
    assert "No gradient was seen of none." in str(Report(h))


def test_units_of_a_step_with_nan_do_not_look_active(random: np.random.Generator) -> None:
    outputs = [np.ones((4, 3)) for _ in range(3)]
    outputs[0][:, 0] = 0
    outputs[1][:, 0] = math.nan
    healthy = layer("healthy", "relu", [Step(np.ones((4, 2)))] * 3)
    axes = drawn(history(healthy, planted(random, "relu", outputs))).axes[5]
    assert axes.get_title() == "act: 0 dead of 3 units"
    (image,) = axes.images
    pixels = image.to_rgba(image.get_array()).tolist()
    assert pixels[0][1] == pixels[2][0]
    assert pixels[0][0] != pixels[1][0] != pixels[2][0]
    # Which of the step's units are NaN is not counted.
    assert pixels[1] == [pixels[1][0]] * 3
    assert "not 0, or NaN" in [t.get_text() for t in axes.get_legend().get_texts()]


def test_plot_without_matplotlib_says_what_to_install(random: np.random.Generator, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delitem(sys.modules, "fastact.sight.plot", raising=False)
    monkeypatch.delattr(fastact.sight, "plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (Report(a_few_dead(random, 1)).plot, functools.partial(gradient_images, torch.nn.Conv2d(1, 1, 1))):
        with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'fastact[sight]'")) as caught:
            draw(tmp_path / "x.png")
        assert len(str(caught.value).splitlines()) == 1


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour = torch.nn.Conv2d(3, 70, 3)
        self.matrix = torch.nn.Conv2d(70, 66, 1)
        self.up = torch.nn.ConvTranspose2d(66, 4, 2)
        self.row = torch.nn.Conv1d(4, 5, 3)
        self.slices = torch.nn.Conv3d(1, 4, 3)
        self.unused = torch.nn.Conv2d(1, 1, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(self.matrix(self.colour(x)))
        return self.row(y.flatten(2)).pow(2).mean() + self.slices(y[:, None]).pow(2).mean()


def test_gradient_images(tmp_path: Path, generator: torch.Generator) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'fastact[sight]'")
    model = Convolutions()
    model(torch.randn(2, 3, 8, 8, generator=generator)).backward()
    assert model.row.weight.grad is not None
    model.row.weight.grad[0, 0, 0] = math.nan
    before = {name: (p.detach().clone(), p.grad) for name, p in model.named_parameters()}
    gradient_images(model, tmp_path / "images.svg")
    written = (tmp_path / "images.svg").read_text()
    for name, module in model.named_children():
        assert (f"<!-- {name} " in written) is (name != "unused")
        if name != "unused":
            for tensor in (module.weight, module.weight.grad):
                finite = tensor.detach().double()[tensor.isfinite()]
                assert f"RMS {finite.square().mean().sqrt().item():.2e}, scale ±{finite.abs().max().item():.2e}" in written
    assert written.count("1 not finite") == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0])
        assert p.grad is before[name][1]


def test_gradient_images_of_a_path_that_is_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'fastact[sight]'")
    model = torch.nn.ModuleDict({"$_$": torch.nn.Conv2d(1, 1, 3)})
    model["$_$"](torch.ones(1, 1, 4, 4)).sum().backward()
    gradient_images(model, tmp_path / "images.svg")
    assert "<!-- $_$ " in (tmp_path / "images.svg").read_text()


def test_mosaics_hold_the_kernels() -> None:
    def mosaic(*shape: int) -> tuple[torch.Tensor, Array]:
        weight = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
        return weight, Pair("", weight, weight).mosaics[0]

    weight, image = mosaic(3, 2, 2, 2)
    assert image.shape == (8, 5)
    assert np.array_equal(image[3:5, :2], weight[1, 0])
    assert np.array_equal(image[6:8, 3:], weight[2, 1])
    assert np.isnan(image[2]).all()
    assert np.isnan(image[:, 2]).all()
    weight, image = mosaic(4, 5, 1)
    assert np.array_equal(image, weight[..., 0])
    weight, image = mosaic(2, 3, 2, 2)
    assert image.shape == (2, 5, 3)
    assert np.allclose(image[:, 3:], weight[1].permute(1, 2, 0) / 48 + 0.5)
    weight, image = mosaic(20, 1, 2, 3, 4)
    assert image.shape == (7, 16 * 9 - 1)
    assert np.array_equal(image[:3, 9:17], torch.cat([*weight[1, 0]], 1))


def test_gradient_images_names_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'fastact[sight]'")
    with pytest.raises(ValueError, match=r"no convolution .*Linear"):
        gradient_images(torch.nn.Linear(1, 1), tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"gradient \(0, 1\): .*backward"):
        gradient_images(torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Conv1d(1, 1, 1)), tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
