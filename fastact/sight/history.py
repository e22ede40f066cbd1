"""What a monitor has seen, as numbers: filled by the monitor, read by the figures, the report and the plots.

Everything here is NumPy, one row per recorded step. Counts are those of the elements that were looked at: all of a tensor, or a
sample of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# A histogram counts magnitudes in 64 octaves of 16 equal bins each, for either sign: `counts[sign, octave * 16 + k]`, where
# sign 1 is negative. Octave o holds magnitudes in (2^(o - 44), 2^(o - 43)], and bin k of it is open below and closed above too.
# What is smaller (0 among it, as positive) is counted in the first bin, what is larger in the last; NaN and infinity nowhere.
OCTAVES, PARTS, LOWEST = 64, 16, -44
BINS = OCTAVES * PARTS


@dataclass
class Side:
    """Of one tensor of a layer: its output, or the gradient on one of its sides. Arrays of [steps], float64 unless said."""

    count: NDArray[np.float64]  # elements looked at
    total: NDArray[np.float64]  # the sum of those that are finite
    squares: NDArray[np.float64]  # the sum of their squares
    minimum: NDArray[np.float64]  # of those that are finite; +inf where there is none
    maximum: NDArray[np.float64]  # -inf where there is none
    zeros: NDArray[np.float64]  # exact zeros
    low: NDArray[np.float64]  # of outputs: saturated on the low side; else 0
    high: NDArray[np.float64]  # of outputs: saturated on the high side; else 0
    nan: NDArray[np.float64]
    infinite: NDArray[np.float64]
    histogram: NDArray[np.int64]  # [2, BINS], of all steps together
    size: int = 0  # elements, looked at or not, of all steps together; 0: not known


@dataclass
class Rows:
    """Of a softmax, row by row (the probabilities of one sample): arrays of [steps]."""

    count: NDArray[np.float64]  # rows looked at
    sure: NDArray[np.float64]  # those with a probability above 0.99
    entropy: NDArray[np.float64]  # the sum of -sum(p log p) / log n over the rows without NaN; 0 where n is 1
    nan: NDArray[np.float64]  # rows with a NaN


class Units:
    """Which units were ever seen at another value than 0. Kept as bits: a long run of a wide layer has many."""

    def __init__(self, seen: NDArray[np.bool_], active: NDArray[np.bool_]) -> None:
        self.number: int = seen.shape[1]
        self._seen, self._active = np.packbits(seen, axis=1), np.packbits(active, axis=1)

    @staticmethod
    def of_bits(seen: NDArray[np.uint8], active: NDArray[np.uint8], number: int) -> Units:
        """Of arrays of [steps, number / 8], as np.packbits makes them."""
        units = Units.__new__(Units)
        units.number, units._seen, units._active = number, seen, active
        return units

    @property
    def seen(self) -> NDArray[np.bool_]:
        """[steps, units]: at least one of the unit's elements was looked at."""
        return np.unpackbits(self._seen, axis=1, count=self.number).astype(np.bool_)

    @property
    def active(self) -> NDArray[np.bool_]:
        """[steps, units]: and one of these was not 0 (a NaN is not 0)."""
        return np.unpackbits(self._active, axis=1, count=self.number).astype(np.bool_)


@dataclass
class Layer:
    """One activation of the model."""

    name: str  # its path in `named_modules()`; for a function called in a module, "path/relu", and "path/relu#2" for the second
    kind: str  # "sigmoid", as the rows are called
    parameters: dict[str, float]  # {"negative_slope": 0.01}
    source: str  # "fastact" or "torch.nn"
    squashing: bool  # bounded on both sides: `low` and `high` are meant for it
    bounds: tuple[float, float]  # of its outputs: (0, 1), (0, inf) ...
    length: int | None  # of a softmax: elements of a row (the last it was called with); else None
    steps: NDArray[np.int64]  # [steps]: which steps of the monitor have a row below, ascending
    training: NDArray[np.bool_]  # [steps]: whether the model was in training mode
    output: Side
    gradient_in: Side  # of the loss with respect to its output: what comes to it from the loss
    gradient_out: Side  # with respect to its input: what it passes on
    rows: Rows | None  # of softmax and log_softmax
    units: Units | None  # None where the layer has no unit dimension (or far too many units)
    unit_dim: int | None
    shared: list[str] = field(default_factory=list)  # other paths of the same module


@dataclass
class History:
    """All layers, in the order in which they were first called."""

    layers: list[Layer]
    unseen: list[tuple[str, str]]  # (path, why): activations of the model that were never seen at work
    every: int  # one of so many steps was recorded
    sample: int | Literal["auto"] | None  # at most so many elements of a tensor were looked at; None: all
    ranks: int = 1  # processes whose counts are added up here
    environment: dict[str, Any] = field(default_factory=dict)
    loss: str | None = None  # name of the loss module, if the model tells
    # Name of the layer whose output the model returns; "" where what it returns is no activation's; None: not known.
    output: str | None = None
