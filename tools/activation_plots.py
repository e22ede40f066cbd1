"""Draws every activation and its derivative, as fastact computes them, into docs/plots.

    python tools/activation_plots.py

The same bytes each time, for the same matplotlib. The colours are Okabe and Ito's, which the colour-blind tell apart, and lines
differ in their dashes too.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from fastact import _registry

FOLDER = Path(__file__).parent.parent / "docs" / "plots"
STYLES = [("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":")]
# Parameters beside the defaults, by how many there are.
OTHERS = {0: [], 1: [(0.2,), (0.5,), (-0.3,)], 2: [(4.0, 1.0), (1.0, 3.0), (-1.0, 1.0)]}
OTHERS_OF = {"softplus": [(4.0, 20.0), (0.5, 20.0)]}
# Not at 0, where a derivative may jump: the line is interrupted there.
HALF = torch.linspace(1e-6, 6, 121, dtype=torch.float64)
X = torch.cat([-HALF.flip(0), torch.tensor([torch.nan], dtype=torch.float64), HALF])
# Softmax is shown on a row of three, of which one runs.
ROW = [1.0, -1.0]

Curve = tuple[str, Tensor, Tensor]  # a label, the values, the derivative


def others(row: _registry.Row) -> list[tuple[float, ...]]:
    return OTHERS_OF.get(row.name, OTHERS[len(row.parameters)])


def labels(row: _registry.Row) -> list[str]:
    """What the legend says: the parameters, or for softmax the elements of the row."""
    if row.along_dim:
        return ["y of x", *(f"y of {x:g}" for x in ROW)]
    if not row.parameters:
        return [""]
    sets = [tuple(row.parameters.values()), *others(row)]
    return [", ".join(f"{name} = {value:g}" for name, value in zip(row.parameters, values, strict=True)) for values in sets]


def curves(row: _registry.Row) -> list[Curve]:
    x = X.clone().requires_grad_()
    if row.along_dim:
        rows = torch.stack([x, *(torch.full_like(x, value) for value in ROW)], dim=1)
        outputs = list(row.function(rows, dim=1).unbind(1))
    else:
        sets = [tuple(row.parameters.values()), *others(row)]
        outputs = [row.function(x, *values) for values in sets]
    found = []
    for label, y in zip(labels(row), outputs, strict=True):
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        # relu lets the gradient pass at NaN, which here means a gap
        found.append((label, y.detach(), slope.masked_fill(x.isnan(), torch.nan)))
    return found


def draw(row: _registry.Row, path: Path) -> None:
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "fastact", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10}
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained", facecolor="white")
    argument = f" of (x, {', '.join(f'{value:g}' for value in ROW)})" if row.along_dim else "(x)"
    for axis, title, name, values in zip(axes, (row.name + argument, "derivative"), ("y", "dy / dx"), (1, 2), strict=True):
        for (color, dashes), curve in zip(STYLES, curves(row), strict=False):
            axis.plot(X, curve[values], color=color, linestyle=dashes, linewidth=2, label=curve[0])
        axis.set(title=title, xlabel="x", ylabel=name, xlim=(-6, 6))
        axis.axhline(0, color="#888888", linewidth=0.8, zorder=0)
        axis.axvline(0, color="#888888", linewidth=0.8, zorder=0)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    if labels(row) != [""]:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main() -> None:
    matplotlib.use("Agg")
    FOLDER.mkdir(exist_ok=True)
    for row in _registry.rows.values():
        draw(row, FOLDER / f"{row.name}.svg")


if __name__ == "__main__":
    main()
