"""What the figures mean: thresholds, and rules that name a trouble and its remedy. They are silent about a healthy network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastact.sight.figures import Figure
from fastact.sight.history import History, Layer, Side

# Of a hidden layer's outputs, low and high together. Normal inputs of standard deviation 1 saturate 4 % of a tanh, of deviation
# 2 30 %: trained networks have both. Above a half, most elements pass on less than a tenth of the largest derivative.
SATURATED = 0.5

# Of the saturated outputs, on one side: the inputs are shifted rather than too wide. Inputs around 0 give a half.
ONE_SIDED = 0.9

# The fall of the gradient from the loss. With one learning rate for all layers, those with a thousandth of the last one's
# gradient stay where they are. A mean over 112 x 112 places alone makes a hundredth of its norm.
VANISHED = 1e-3

# The fall that must remain below a last layer that may be the model's output and is bounded on both sides: the gradient of
# cross entropy with respect to a probability p is 1/p, and the layer's derivative takes it back, which says nothing of depth.
VANISHED_BELOW_OUTPUT = 1e-2

# The growth of the gradient from the loss. Widths and strides change it tenfold in healthy networks; with a thousandfold, no
# learning rate suits both ends.
EXPLODED = 1e3

# Of the units seen. A few that never fire are found in most networks of ReLU, and more of them the deeper the layer, since the
# inputs of deep layers become alike: plain stacks of four layers and more may begin with so many, which is a trouble too.
DEAD = 0.1

# Before a unit is called dead: elements looked at. One that is active once in fifty is missed with probability
# 0.98^150 = 5%, and a tenth of a healthy layer's units are not that seldom active.
DEAD_LOOKS = 150

# And steps, since the elements that a convolution has in one step are neighbours in a few images.
DEAD_STEPS = 4

# Of a layer's outputs, exact zeros. A ReLU with inputs around 0 has half, trained ones of transformers up to 0.97
# (Li et al., The Lazy Neuron Phenomenon, 2023). Above, almost nothing passes in either direction.
ZEROS = 0.99

# A layer whose low bound is where inputs below 0 go, as those of ReLU do: not saturation.
RECTIFIED = {"relu6"}

# Infinite outputs that are right: the logarithm of a probability of 0.
LOGARITHMS = {"log_softmax", "log_sigmoid"}


@dataclass(frozen=True)
class Verdict:
    layer: str
    kind: str  # one of KINDS
    text: str  # what was measured
    remedy: str


@dataclass(frozen=True)
class Targets:
    """What a loss compares the model's output with."""

    minimum: float
    maximum: float
    indices: bool  # integers, which cross entropy takes for classes


def output_layer(history: History) -> Layer | None:
    """The layer that makes the model's output: the one that the history names, else the last. None: no layer does."""
    if history.output is None:
        return history.layers[-1] if history.layers else None
    return next((layer for layer in history.layers if layer.name == history.output), None)


def _may_be_output(history: History, layer: Layer) -> bool:
    """The layer that the history names as the model's output; where it names none, the last one: what the model returns may be
    made of it (clamped, scaled, cut) without an activation in between."""
    return layer.name == history.output or (not history.output and layer is history.layers[-1])


def saturated(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """low + high > SATURATED in a layer that is not known to be the model's output, which training drives to its bounds. In one
    that may be the output, in the first step in training too: nothing was driven then. So a last hidden layer whose inputs are
    too wide from the start is found, and an output that has become sure is none."""
    for layer, f in zip(history.layers, summary, strict=True):
        low = 0.0 if layer.kind in RECTIFIED else f["saturated_low"]
        high = f["saturated_high"]
        if not layer.squashing or layer.name == history.output or not low + high > SATURATED:
            continue
        if _may_be_output(history, layer):
            step = np.flatnonzero(layer.training)[:1]
            counted = layer.output.high + (0 if layer.kind in RECTIFIED else layer.output.low)
            if not (counted[step] > SATURATED * layer.output.count[step]).any():
                continue
        text = f"{low + high:.0%} of its outputs are where the function is flat: {low:.0%} low, {high:.0%} high"
        if max(low, high) > ONE_SIDED * (low + high):
            remedy = "Its inputs are shifted: batch or layer normalisation before it, a smaller bias, centred data."
        else:
            remedy = (
                "Its inputs are too wide: smaller initial weights (Xavier), batch or layer normalisation before it, "
                "a scaled sigmoid with a smaller slope, or a function that does not saturate (ReLU, SiLU)."
            )
        yield Verdict(layer.name, "saturated", text, remedy)


def _passing(history: History, summary: Sequence[Figure]) -> list[tuple[Layer, Figure, float]]:
    """The layers that the product is of, their figures, and the norm of the gradient that they pass on."""
    passing = [(layer, f) for layer, f in zip(history.layers, summary, strict=True) if not np.isnan(f["product"])]
    return [(layer, f, _norm(layer, f, "gradient_out")) for layer, f in passing]


def _norm(layer: Layer, f: Figure, side: str) -> float:
    """Of a step's gradient: RMS sqrt(n), where n counts the elements of a step, looked at or not.

    What has n times the elements has a smaller gradient in each, though nothing is lost: below a mean over n places the RMS is
    n times smaller, and of a value that is added to n places up to n times larger; the norm changes by sqrt(n) at most. A
    history that does not know the sizes has the elements looked at in their place.
    """
    counted: Side = getattr(layer, side)
    looked_at = counted.count.sum()
    in_a_step = f[f"{side}_elements"] / f["steps"] * (counted.size or looked_at) / looked_at
    return float(f[f"{side}_rms"] * np.sqrt(in_a_step))


def vanishing(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """The first layer from the loss down where the product of ratios is below VANISHED and so is the norm of the gradient, as a
    share of that which came to the last layer, here and in all layers before it: weights that make up for small ratios (He
    initialisation) keep the gradient healthy, and where it is small in a branch alone (a gate), the layers before it learn."""
    passing = _passing(history, summary)
    if not passing:
        return
    last, f, below = passing[-1]
    first = _norm(last, f, "gradient_in")
    limit = VANISHED * first
    if last.squashing and _may_be_output(history, last):
        limit = min(limit, VANISHED_BELOW_OUTPUT * below)
    largest = np.maximum.accumulate([norm for *_, norm in passing])
    for (layer, f, here), most in reversed(list(zip(passing, largest, strict=True))):
        if f["product"] < VANISHED and most < limit:
            text = (
                f"from the loss to this layer the activations multiply the gradient by {f['product']:.1e}; "
                f"its norm falls from {first:.1e} to {here:.1e}"
            )
            yield Verdict(
                layer.name,
                "vanishing",
                text,
                "The layers from the input to this one hardly learn: a function with a larger derivative (tanh, ReLU, "
                "4 sigmoid(x) as ScaledSigmoid(scale=4)), initial weights that suit it (Xavier, He), normalisation between "
                "the layers, residual connections, or fewer layers.",
            )
            return


def exploding(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """The first layer from the loss down where the norm of the gradient is above EXPLODED times that which came to the last
    layer."""
    passing = _passing(history, summary)
    if not passing:
        return
    last, f, _ = passing[-1]
    first = _norm(last, f, "gradient_in")
    for layer, _, here in reversed(passing):
        if here > EXPLODED * first:
            yield Verdict(
                layer.name,
                "exploding",
                f"the norm of the gradient grows from {first:.1e} at the last layer to {here:.1e} here",
                "Smaller initial weights (He for ReLU, Xavier for tanh), normalisation between the layers, gradient clipping "
                "(torch.nn.utils.clip_grad_norm_), or a smaller learning rate.",
            )
            return


def inactive(history: History, summary: Sequence[Figure]) -> Iterator[tuple[Layer, Figure, float, bool]]:
    """Layers of which more than DEAD of the units were 0 at every look, their figures, the looks per unit, and whether these
    are enough to call them dead."""
    for layer, f in zip(history.layers, summary, strict=True):
        if layer.units is not None and not layer.rows and f["units"] and f["dead_share"] > DEAD:
            looks = f["elements"] / f["units"]
            yield layer, f, looks, looks >= DEAD_LOOKS and f["steps"] >= DEAD_STEPS


def dead(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """dead_units / units > DEAD, after DEAD_LOOKS elements of a unit in DEAD_STEPS steps. Not of softmax, whose outputs are not
    units that an input switches on."""
    for layer, f, looks, enough in inactive(history, summary):
        if enough:
            yield Verdict(
                layer.name,
                "dead units",
                f"{f['dead_units']} of {f['units']} units ({f['dead_share']:.0%}) were 0 at every look, {looks:,.0f} each",
                "They get no gradient, so training does not bring them back: a smaller learning rate or a warm-up, leaky ReLU "
                "(or ELU, SiLU), normalisation before it, no large negative bias.",
            )


def sparse(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """zeros > ZEROS, unless dead units say so already."""
    known = {verdict.layer for verdict in dead(history, summary, targets)}
    for layer, f in zip(history.layers, summary, strict=True):
        if f["zeros"] > ZEROS and not layer.rows and layer.name not in known:
            yield Verdict(
                layer.name,
                "zeros",
                f"{f['zeros']:.1%} of its outputs are exactly 0 (about half is usual for ReLU)",
                "Almost nothing passes: centre its inputs (batch or layer normalisation before it), look at the bias, "
                "or use leaky ReLU.",
            )


def one_unit(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """Softmax over rows of length 1. That rows are sure, or that all are alike, is no trouble by itself: trained classifiers
    and attention heads are so."""
    for layer in history.layers:
        if layer.rows and layer.length == 1:
            always = 0 if layer.kind in LOGARITHMS else 1
            yield Verdict(
                layer.name,
                "softmax over one unit",
                f"a softmax over one element is always {always}, and its gradient always 0",
                "A sigmoid (with nn.BCEWithLogitsLoss on its input), or two output units with nn.CrossEntropyLoss. "
                "Or another dim is meant.",
            )


def not_finite(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """The first NaN or infinity in the order of computation: by step, outputs in the order of the layers, then gradients in the
    opposite order."""
    first: tuple[tuple[int, int, int], Layer, str, str] | None = None
    for place, layer in enumerate(history.layers):
        sides = (
            (0, place, layer.output, "its output"),
            (1, -2 * place, layer.gradient_in, "the gradient that came to it"),
            (1, -2 * place + 1, layer.gradient_out, "the gradient that it passed on"),
        )
        for backward, order, side, where in sides:
            infinite = np.zeros_like(side.infinite) if not backward and layer.kind in LOGARITHMS else side.infinite
            bad = np.flatnonzero((side.nan > 0) | (infinite > 0))
            if len(bad):
                i = int(bad[0])
                key = int(layer.steps[i]), backward, order
                if first is None or key < first[0]:
                    first = key, layer, "NaN" if side.nan[i] else "infinity", where
    if first:
        (step, backward, _), layer, kind, where = first
        masked = layer.rows is not None and not backward and bool(layer.rows.nan[layer.steps == step].any())
        if masked:
            remedy = "A row whose inputs are all -inf (all masked) is NaN: leave an element in each, or give such rows a value."
        elif backward:
            remedy = (
                "Between this layer and the loss: a division by 0, a logarithm or root of 0, an overflow in float16 (a "
                "gradient scaler meets some, and skips those steps); or clip the gradient, or lower the learning rate."
            )
        else:
            remedy = (
                "Look at what comes just before it: NaN in the inputs, weights that a step has made infinite (a smaller "
                "learning rate, gradient clipping), a division by 0, an overflow in float16."
            )
        yield Verdict(layer.name, kind, f"{kind} at step {step}, first seen in {where}", remedy)


def _interval(low: float, high: float) -> str:
    return f"[{low:g}, {high:g}]"


def out_of_range(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """Targets below or above the bounds of the output: the last layer that is bounded on some side, unless the history tells
    which layer's output the model returns. Class indices for a softmax are not compared."""
    layer = output_layer(history)
    if layer and history.output is None and not np.isfinite(layer.bounds).any():
        layer = next((x for x in reversed(history.layers) if np.isfinite(x.bounds).any()), None)
    if targets is None or layer is None or (layer.rows and targets.indices):
        return
    low, high = layer.bounds
    if targets.minimum < low or targets.maximum > high:
        yield Verdict(
            layer.name,
            "targets out of range",
            f"the targets lie in {_interval(targets.minimum, targets.maximum)}, its outputs in {_interval(low, high)}",
            "No input gives the values outside, and the loss drives the layer to its bound: scale the targets, scale the "
            "output (ScaledSigmoid), or leave the activation out.",
        )


def squared_loss(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """nn.MSELoss after a layer with outputs in [0, 1]. The squared error's gradient is 2 (y - t) f'(x), which is small where
    the output is wrong and saturated; with cross entropy it is y - t."""
    layer = output_layer(history)
    if layer and history.loss == "MSELoss" and layer.bounds == (0, 1):
        softmax = layer.rows is not None
        yield Verdict(
            layer.name,
            "squared loss",
            f"the squared error of a {layer.kind} hardly moves outputs that are wrong and near 0 or 1",
            f"For classes or probabilities: nn.{'CrossEntropyLoss' if softmax else 'BCEWithLogitsLoss'} on the input of the "
            f"{layer.kind}. For other values: no {layer.kind} at the end.",
        )


def unseen(history: History, summary: Sequence[Figure], targets: Targets | None) -> Iterator[Verdict]:
    """Activations of the model that the monitor has not seen at work."""
    for path, why in history.unseen:
        if "torch.compile" in why:
            remedy = "Monitor the model before it is compiled, or a copy that is not compiled."
        else:
            remedy = (
                "Call the model in a way that reaches it while the monitor is open. If that was done, the model uses it "
                "without calling it (its forward(), a function of torch.nn.functional in its place, or code that "
                "torch.compile made), or not at all."
            )
        yield Verdict(path, "unseen", why, remedy)


RULES = (not_finite, out_of_range, squared_loss, one_unit, vanishing, exploding, saturated, dead, sparse, unseen)
KINDS = (
    "NaN",
    "infinity",
    "targets out of range",
    "squared loss",
    "softmax over one unit",
    "vanishing",
    "exploding",
    "saturated",
    "dead units",
    "zeros",
    "unseen",
)


def verdicts(history: History, summary: Sequence[Figure], targets: Targets | None = None) -> list[Verdict]:
    """What `figures.summary(history)` says is wrong: of every rule in turn, in the order of KINDS."""
    return [verdict for rule in RULES for verdict in rule(history, summary, targets)]


def range_of(targets: Any) -> Targets | None:
    """The least and the greatest of the finite targets: a tensor, an array or numbers. None where there is none."""
    if hasattr(targets, "detach"):
        indices = not (targets.is_floating_point() or targets.is_complex())
        values = targets.detach().cpu().double().numpy()
    else:
        values = np.asarray(targets)
        indices = values.dtype.kind in "iu"
        values = values.astype(np.float64)
    values = values[np.isfinite(values)]
    return Targets(float(values.min()), float(values.max()), indices) if values.size else None
