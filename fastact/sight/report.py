"""What a person gets from a history: a table with verdicts, a file, rows for pandas, scalars for TensorBoard, the figures."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fastact import _C
from fastact.sight import figures
from fastact.sight.figures import SIDES, Figure
from fastact.sight.history import History, Layer, Side
from fastact.sight.verdicts import DEAD_LOOKS, DEAD_STEPS, Verdict, inactive, range_of, verdicts

WIDTH = 120  # of the printed report
SHORTEST_NAME = 24  # that the table shortens a long path to, even if a line becomes wider

# Columns after name and kind: the head, and what stands in it for the figures of a layer.
COLUMNS: dict[str, Callable[[Figure], str]] = {
    "low %": lambda f: _percent(f["saturated_low"]),
    "high %": lambda f: _percent(f["saturated_high"]),
    "zero %": lambda f: _percent(f["zeros"]),
    "dead": lambda f: "-" if math.isnan(f["dead_units"]) else f"{f['dead_units']}/{f['units']}",
    "mean": lambda f: _number(f["mean"]),
    "RMS": lambda f: _rms(f, ""),
    "grad in": lambda f: _rms(f, "gradient_in_"),
    "grad out": lambda f: _rms(f, "gradient_out_"),
    "ratio": lambda f: _number(f["ratio"]),
    "product": lambda f: _number(f["product"]),
}


class Report:
    """What a monitor's history says: printed as a table with verdicts, or as data.

    The table has a line per layer, in the order in which they were first called: outputs saturated low and high and exact zeros
    (in percent), dead units of those seen, mean and RMS of the outputs, RMS of the gradient that comes in from the loss and of
    the one that goes out to the input, their ratio, and the product of ratios from the loss down to the layer. The formulas
    stand in `fastact.sight.figures`, thresholds and rules of the verdicts in `fastact.sight.verdicts`. Figures are over all
    steps in training mode; if there were none, over those in evaluation mode.

    `report.figures`: a dict per layer. `report.verdicts`: a list whose entries have `layer`, `kind`, `text` (what was measured)
    and `remedy`. `report.history`: the numbers behind them, a `fastact.sight.history.History`.

    `targets` (a tensor, an array or numbers): what the loss compares the output with, to be held against its range.
    """

    def __init__(self, history: History, targets: Any = None) -> None:
        self.history = history
        self.figures = figures.summary(history)  # a dict per layer
        self.verdicts = verdicts(history, self.figures, None if targets is None else range_of(targets))

    def __str__(self) -> str:
        parts = [self._table(), self._softmaxes(), self._verdicts(), _wrapped(self.looked_at(), "", "")]
        return "\n\n".join("\n".join(lines) for lines in parts if lines)

    __repr__ = __str__

    def _table(self) -> list[str]:
        if not self.figures:
            return ["No activation was seen at work. Modules are, and functions of fastact; torch.nn.functional's are not."]
        cells = [["kind", *COLUMNS]]
        cells += [[str(f["kind"]), *(show(f) for show in COLUMNS.values())] for f in self.figures]
        widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
        room = max(WIDTH - sum(widths) - len(widths), SHORTEST_NAME)
        names = [shortened(name, room) for name in ("layer", *(f["layer"] for f in self.figures))]
        room = max(map(len, names))
        return [
            " ".join([f"{name:{room}}", f"{line[0]:{widths[0]}}", *map(str.rjust, line[1:], widths[1:])])
            for name, line in zip(names, cells, strict=True)
        ]

    def _softmaxes(self) -> list[str]:
        return [
            f"{shortened(f['layer'], 40)}: {f['rows']:,} rows, {f['sure_rows']:.1%} sure (p > 0.99), "
            f"mean entropy {_number(f['entropy'])} log n" + (f", {f['nan_rows']:,} rows of NaN" if f["nan_rows"] else "")
            for layer, f in zip(self.history.layers, self.figures, strict=True)
            if layer.rows and f["rows"]
        ]

    def _verdicts(self) -> list[str]:
        if not self.verdicts:
            return ["No trouble found."] if self.figures else []
        # Layers with the same trouble stand together, above the remedy that they share.
        groups: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in self.verdicts:
            groups.setdefault((verdict.kind, verdict.remedy), []).append(verdict)
        lines: list[str] = []
        for (kind, remedy), group in groups.items():
            lines.append(kind)
            for verdict in group:
                lines += _wrapped(f"{verdict.layer}: {verdict.text}", "  ", "      ")
            lines += _wrapped(remedy, "  -> ", "     ")
        return lines

    def looked_at(self) -> str:
        """Which steps, elements and ranks the figures are of, and what could not be seen."""
        return ". ".join([*self._seen(), *self._not_seen()]) + "."

    def _seen(self) -> Iterator[str]:
        layers = self.history.layers
        chosen = [layer.steps[figures.chosen(layer)] for layer in layers]
        steps = np.unique(np.concatenate([np.empty(0, np.int64), *chosen]))
        training = any(layer.training.any() for layer in layers)
        if not len(steps):
            yield "Looked at: no step"
            return
        every = f", one of {self.history.every} recorded" if self.history.every > 1 else ""
        span = f"step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps ({steps[0]} to {steps[-1]}{every})"
        sample = self.history.sample
        most = _C.MOST_SAMPLED if sample == "auto" else sample
        elements = "all elements" if most is None else f"at most {most:,} elements of a tensor"
        ranks = f", {self.history.ranks} ranks together" if self.history.ranks > 1 else ""
        yield f"Looked at: {span} in {'training' if training else 'evaluation'} mode, {elements}{ranks}"
        others = {int(s) for layer in layers for s in layer.steps} - set(map(int, steps))
        if others:
            yield f"{len(others)} steps in evaluation mode are in rows() only"

    def _not_seen(self) -> Iterator[str]:
        without = [f["layer"] for f in self.figures if not f["gradient_in_elements"] and not f["gradient_out_elements"]]
        if without:
            yield f"No gradient was seen of {_some(without)}"
        few = [layer.name for layer, *_, enough in inactive(self.history, self.figures) if not enough]
        if few:
            yield (
                f"Units of {_some(few)} count as dead after few looks: a verdict takes {DEAD_LOOKS} of each in {DEAD_STEPS} "
                "steps (more steps, or sample=None)"
            )
        if self.history.unseen:
            yield f"Not seen at all: {_some([path for path, _ in self.history.unseen])}"

    def rows(self) -> list[Figure]:
        """A dict per layer and recorded step, in training or evaluation mode, as `pandas.DataFrame(report.rows())` takes them.

        Keys: `layer`, `kind`, `source`, `step`, `training`, and every name in `fastact.sight.figures.NAMES`. What is not
        defined is NaN.
        """
        return figures.rows(self.history)

    def to_dict(self) -> dict[str, Any]:
        """Everything in types that JSON knows: `layers` (with `figures` and `histograms`), `rows`, `verdicts`, and what was
        looked at. What is not defined or not finite is None."""
        h = self.history
        data = {
            "layers": [_layer(layer, f) for layer, f in zip(h.layers, self.figures, strict=True)],
            "rows": self.rows(),
            "verdicts": [vars(verdict) for verdict in self.verdicts],
            "unseen": [{"layer": path, "why": why} for path, why in h.unseen],
            "output": h.output,
            "loss": h.loss,
            "every": h.every,
            "sample": h.sample,
            "ranks": h.ranks,
            "environment": h.environment,
        }
        plain: dict[str, Any] = _jsonable(data)
        return plain

    def to_json(self, path: str | PathLike[str]) -> None:
        """Writes `to_dict()`, as strict JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def log_to(self, writer: Any, prefix: str = "fastact") -> None:
        """Calls `writer.add_scalar(tag, value, step)`, as TensorBoard's `SummaryWriter` and its relatives have it, for every
        figure that is defined, of every layer and step. The tag is "prefix/figure/layer"."""
        for row in self.rows():
            for name in figures.NAMES:
                if math.isfinite(row[name]):
                    writer.add_scalar(f"{prefix}/{name}/{row['layer']}", row[name], row["step"])

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws six panels into one file, of the type that its ending names (.png, .pdf, .svg): saturated outputs, zeros and
        dead units per layer; the same over the steps; densities of the outputs; densities of the gradients (of more than 24
        layers as rows); RMS of the gradient by depth; which units were active in which step. Needs matplotlib:
        `pip install 'fastact[sight]'`."""
        from fastact.sight import plot

        plot.plot(self, path)


def shortened(name: str, room: int) -> str:
    """The name, without its middle where it is longer than `room`."""
    if len(name) <= room:
        return name
    end = (room - 3 + 1) // 2  # the last parts of a path say more than the first ones
    return name[: room - 3 - end] + "..." + name[len(name) - end :]


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _wrapped(text: str, first: str, later: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=later, break_on_hyphens=False)


def _percent(share: float) -> str:
    """A share that is not 0 never reads as 0, nor one below 1 as 100."""
    if math.isnan(share):
        return "-"
    if 0 < share < 0.0005:
        return "<0.1"
    return ">99.9" if 0.9995 <= share < 1 else f"{share * 100:.1f}"


def _number(value: float) -> str:
    """At most 8 characters."""
    if math.isnan(value):
        return "-"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def _rms(f: Figure, side: str) -> str:
    """What has no finite element says so."""
    bad = "NaN" if f[f"{side}nan"] else "inf" if f[f"{side}infinite"] else "-"
    return bad if math.isnan(f[f"{side}rms"]) else _number(f[f"{side}rms"])


def _layer(layer: Layer, figure: Figure) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "parameters": layer.parameters,
        "source": layer.source,
        "squashing": layer.squashing,
        "bounds": layer.bounds,
        "length": layer.length,
        "unit_dim": layer.unit_dim,
        "shared": layer.shared,
        "figures": {name: figure[name] for name in ("steps", *figures.NAMES)},
        "histograms": {side: _histogram(getattr(layer, side)) for side in ("output", *SIDES)},
    }


def _histogram(side: Side) -> dict[str, Any]:
    counts, edges = figures.histogram(side)
    return {"counts": counts.tolist(), "edges": edges.tolist()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_jsonable(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
