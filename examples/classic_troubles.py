"""Five classic troubles of activation functions, each measured in a real training run, beside its cure.

    python examples/classic_troubles.py                          # all five
    python examples/classic_troubles.py --only 2 5 --output figures

The data are the 1797 real 8x8 images of digits that come with scikit-learn. For each trouble one sees the question, what
`fastact.monitor` measured, the verdicts of its report and the effect of the cure on held-out images; the report's figures are
saved in the folder that --output names. All five take two to three minutes on
two CPU cores.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
    from torch import Tensor, nn

    import fastact
    from fastact.sight import plot  # noqa: F401  # which needs matplotlib
    from fastact.sight.report import Report
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: pip install 'fastact[demo]' brings what the example needs")

Activation = Callable[[], nn.Module]
Loss = Callable[[Tensor, Tensor], Tensor]
BATCH = 64


class Data:
    """Images as rows of 64 numbers in [0, 1], digits; always the same split."""

    def __init__(self) -> None:
        images, digits = load_digits(return_X_y=True)
        split = train_test_split((images / 16).astype(np.float32), digits, stratify=digits, random_state=0)
        self.x, self.test_x, self.digit, self.test_digit = (torch.from_numpy(part) for part in split)


def mlp(sizes: list[int], activation: Activation, gain: float | None = None) -> nn.Sequential:
    """Linear layers with an activation between each two. Weights of variance gain^2 / inputs, or those of nn.Linear."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        linear = nn.Linear(inputs, outputs)
        if gain is not None:
            nn.init.normal_(linear.weight, std=gain / inputs**0.5)
            nn.init.zeros_(linear.bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def train(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    loss: Loss,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    whole: bool = False,
) -> Report:
    """Trains under a monitor, which looks at whole tensors or at samples, and returns its report."""
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(0)
    with fastact.monitor(model, sample=None if whole else "auto") as watch:
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=order).split(BATCH):
                optimizer.zero_grad()
                loss(model(x[batch]), target[batch]).backward()
                optimizer.step()
    return watch.report(targets=target if target.is_floating_point() else None)


def accuracy(model: nn.Module, x: Tensor, digit: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(x).argmax(dim=1) == digit).double().mean().item()


def show(name: str, report: Report, output: Path) -> None:
    """The report's verdicts, and its figures in a file."""
    for verdict in report.verdicts:
        print(f"      {verdict.kind}, {verdict.layer}: {verdict.text}")
    path = output / f"{name}.png"
    report.plot(path)
    print(f"      figures: {path}")


def targets_out_of_range(data: Data, output: Path) -> None:
    """A sigmoid output under a squared loss: what if the targets are in [0, 255]?"""
    # From the upper half of an image its lower half.
    x, test_x, target, test_target = data.x[:, :32], data.test_x[:, :32], data.x[:, 32:], data.test_x[:, 32:]
    cases: list[tuple[str, float, Activation]] = [
        ("sigmoid, targets in [0, 1]", 1, fastact.Sigmoid),
        ("sigmoid, targets in [0, 255]", 255, fastact.Sigmoid),
        ("cure: ScaledSigmoid(scale=255), the same targets", 255, partial(fastact.ScaledSigmoid, scale=255.0)),
    ]
    for i, (name, scale, last) in enumerate(cases):
        model = mlp([32, 64, 32], fastact.Tanh).append(last())
        report = train(model, x, target * scale, F.mse_loss, epochs=20)
        with torch.no_grad():
            error = (model(test_x) - test_target * scale).square().mean() / (test_target * scale).var()
        figures = report.figures[-1]
        high = f", {figures['saturated_high']:.0%} of the outputs saturated high"
        print(f"   {name}: {1 - error:.0%} of the variance explained{high}")
        show(f"1-targets-{i}", report, output)


def vanishing_gradients(data: Data, output: Path) -> None:
    """How much of the gradient reaches the first of 2 to 16 layers?"""
    cases: dict[str, tuple[Activation, float]] = {
        "sigmoid": (fastact.Sigmoid, 1),
        "4 sigmoid(x)": (partial(fastact.ScaledSigmoid, scale=4.0), 1),
        "tanh": (fastact.Tanh, 5 / 3),
        "relu": (fastact.ReLU, 2**0.5),
        "leaky relu": (fastact.LeakyReLU, 2**0.5),
    }
    depths = (2, 4, 8, 16)
    print("   RMS of the gradient, out of the first activation / into the last, at the first step;")
    print("   and the accuracy of 16 layers after 20 epochs:")
    print(f"   {'layers':14}" + "".join(f"{depth:>10}" for depth in depths) + f"{'accuracy':>12}")
    for i, (name, (activation, gain)) in enumerate(cases.items()):
        shares = []
        for depth in depths:
            model = mlp([64, *[64] * depth, 10], activation, gain)
            report = train(model, data.x[:BATCH], data.digit[:BATCH], F.cross_entropy, epochs=1)
            shares.append(report.figures[0]["gradient_out_rms"] / report.figures[-1]["gradient_in_rms"])
        report = train(model, data.x, data.digit, F.cross_entropy, epochs=20)
        right = accuracy(model, data.test_x, data.test_digit)
        print(f"   {name:14}" + "".join(f"{share:10.1e}" for share in shares) + f"{right:12.1%}")
        show(f"2-gradient-{i}", report, output)


def softmax_over_one_unit(data: Data, output: Path) -> None:
    """Two classes and one output unit: why does a softmax stay at the share of one class?"""
    target, test_target = data.digit % 2, data.test_digit % 2
    print(f"   odd digits among the test images: {test_target.double().mean():.1%}")

    def with_sigmoid(p: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy(p.squeeze(1), y.float())

    def with_two(p: Tensor, y: Tensor) -> Tensor:
        return F.nll_loss(p.log(), y)

    cases: list[tuple[str, int, Activation, Loss]] = [
        ("softmax over one unit", 1, partial(fastact.Softmax, dim=1), with_sigmoid),
        ("cure: sigmoid", 1, fastact.Sigmoid, with_sigmoid),
        ("cure: softmax over two units", 2, partial(fastact.Softmax, dim=1), with_two),
    ]
    for i, (name, units, last, loss) in enumerate(cases):
        model = mlp([64, 32, units], fastact.ReLU).append(last())
        report = train(model, data.x, target, loss, epochs=15)
        with torch.no_grad():
            p = model.eval()(data.test_x)[:, -1]  # of the class of odd digits
        right = ((p > 0.5) == test_target.bool()).double().mean()
        rms = report.figures[0]["gradient_in_rms"]
        print(f"   {name}: accuracy {right:.1%}, RMS of the gradient that reaches the hidden layer {rms:.1e}")
        show(f"3-one-unit-{i}", report, output)


def hidden_sigmoids(data: Data, output: Path) -> None:
    """Are the hidden sigmoids of a trained network near 0 and 1?"""
    for i, (name, gain) in enumerate({"small initial weights": 1.0, "large initial weights": 20.0}.items()):
        model = mlp([64, 64, 64, 10], fastact.Sigmoid, gain)
        report = train(model, data.x, data.digit, F.cross_entropy, epochs=20)
        rows = report.rows()
        print(f"   {name} (deviation {gain:g} / sqrt(inputs)): accuracy {accuracy(model, data.test_x, data.test_digit):.1%}")
        for layer in (f["layer"] for f in report.figures):
            of_layer = [row for row in rows if row["layer"] == layer]
            ends = [f"{row['saturated_low']:.0%} low, {row['saturated_high']:.0%} high" for row in (of_layer[0], of_layer[-1])]
            print(f"      layer {layer}, saturated: {ends[0]} at the first step; {ends[1]} at the last")
        show(f"4-hidden-{i}", report, output)


def dying_relus(data: Data, output: Path) -> None:
    """How many ReLU units does a large learning rate kill?"""
    cases: list[tuple[str, Activation, float]] = [
        ("relu, learning rate 0.1", fastact.ReLU, 0.1),
        ("relu, learning rate 0.3", fastact.ReLU, 0.3),
        ("cure: leaky relu, learning rate 0.3", partial(fastact.LeakyReLU, negative_slope=0.1), 0.3),
    ]
    for i, (name, activation, rate) in enumerate(cases):
        model = mlp([64, 128, 128, 10], activation)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        train(model, data.x, data.digit, F.cross_entropy, epochs=10, optimizer=optimizer)
        # What is dead now: for all images, while the weights stand still.
        still = torch.optim.SGD(model.parameters(), lr=0.0)
        report = train(model, data.x, data.digit, F.cross_entropy, epochs=1, optimizer=still, whole=True)
        dead = ", ".join(f"{f['dead_units']} of {f['units']}" for f in report.figures)
        print(f"   {name}: dead units {dead}; accuracy {accuracy(model, data.test_x, data.test_digit):.1%}")
        show(f"5-dying-{i}", report, output)


TROUBLES = (targets_out_of_range, vanishing_gradients, softmax_over_one_unit, hidden_sigmoids, dying_relus)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    numbers = range(1, len(TROUBLES) + 1)
    parser.add_argument("--only", type=int, nargs="+", choices=numbers, default=list(numbers), help="which of the five")
    parser.add_argument("--output", type=Path, default=Path("troubles"), help="folder for the figures; default: %(default)s")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # One of the troubles is announced by the function itself.
    warnings.filterwarnings("ignore", "softmax over dim")
    data = Data()
    for number in args.only:
        trouble = TROUBLES[number - 1]
        print(f"{number}. {trouble.__doc__}")
        trouble(data, args.output)
        print()


if __name__ == "__main__":
    main()
