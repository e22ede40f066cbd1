"""What is made of a monitor's counts: figures against NumPy, planted troubles and their verdicts, files and figures."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastact.sight import figures, verdicts
from fastact.sight.history import BINS, LOWEST, OCTAVES, PARTS, History, Layer, Rows, Side, Units
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
