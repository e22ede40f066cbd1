"""Train one small CNN on handwritten digits twice: with torch.nn activations and with fastact's.

    python examples/digits_cnn.py                                # ReLU, 100 epochs
    python examples/digits_cnn.py --activation scaled_sigmoid --epochs 30 --output scaled.png

The data are the 1797 real 8x8 images that come with scikit-learn. Both networks start from the same
weights, see the same batches in the same order and advance together; every step (forward, loss,
backward, optimizer) is timed. What one sees: a progress bar with both losses; the test accuracy and
the median step time of both; some test images with the predicted digit and its probability; and an
image file with both loss curves, which lie on top of each other. Convolutions take most of a step:
the ratio of the step times is what a whole training gains, not that of the activations alone, which
python -m fastact.bench measures.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

try:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from matplotlib.figure import Figure
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
    from torch import Tensor, nn
    from tqdm import tqdm

    import fastact
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is missing: pip install 'fastact[demo]' brings what the demo needs")

BATCH = 128
WARM_UP = 5  # the first steps also allocate memory and prepare the convolutions: not counted


class FourSigmoid(nn.Module):  # as one writes it by hand
    def forward(self, x: Tensor) -> Tensor:
        return 4 * torch.sigmoid(x)


# The whole swap: on the left what a network has today, on the right what replaces it.
NAMES = ("torch.nn", "fastact")
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "relu": (nn.ReLU, fastact.ReLU),
    "leaky_relu": (nn.LeakyReLU, fastact.LeakyReLU),
    "sigmoid": (nn.Sigmoid, fastact.Sigmoid),
    "tanh": (nn.Tanh, fastact.Tanh),
    "scaled_sigmoid": (FourSigmoid, partial(fastact.ScaledSigmoid, scale=4.0)),
    "softmax": (partial(nn.Softmax, dim=1), partial(fastact.Softmax, dim=1)),
}


def build(
    activation: Callable[[], nn.Module], softmax: Callable[[], nn.Module], size: int = 8, channels: int = 32
) -> nn.Sequential:
    # Batch norm holds the input of every activation around zero, where sigmoid and tanh are
    # steep: without it stacked sigmoids, whose slope is at most 1/4, hardly learn at first.
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), activation(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(2 * channels), activation(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(2 * channels * (size // 2) ** 2, 128, bias=False), nn.BatchNorm1d(128), activation(),
        nn.Linear(128, 10), softmax(),
    )  # fmt: skip


def load() -> list[Tensor]:
    """Training images, test images, training digits, test digits: always the same split."""
    data = load_digits()
    images = (data.images[:, None] / 16).astype(np.float32)
    split = train_test_split(images, data.target, stratify=data.target, random_state=0)
    return [torch.from_numpy(part) for part in split]


class Trainee:
    """A network in training, with the loss and the duration of each of its steps."""

    def __init__(self, column: int, activation: str, seed: int, **scale: int) -> None:
        torch.manual_seed(seed)
        self.name = NAMES[column]
        self.model = build(MODULES[activation][column], MODULES["softmax"][column], **scale)
        self.logits = self.model[:-1]  # cross entropy brings its own softmax
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, digits: Tensor) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.logits(images), digits)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, images: Tensor, digits: Tensor) -> None:
        self.probabilities = self.model.eval()(images)
        self.p, self.says = self.probabilities.max(dim=1)
        self.accuracy = (self.says == digits).double().mean().item()


def train(pair: Sequence[Trainee], images: Tensor, digits: Tensor, epochs: int, seed: int) -> None:
    order = torch.Generator().manual_seed(seed)
    batches = len(images) // BATCH
    with tqdm(total=epochs * batches, desc="training", unit="step") as bar:
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=order).split(BATCH)[:batches]:
                # Side by side, so that a machine that slows down slows down both; taking turns
                # in going first, because the second finds the images in the cache.
                for trainee in pair if bar.n % 2 else pair[::-1]:
                    trainee.step(images[batch], digits[batch])
                last = ", ".join(f"{trainee.name} {trainee.losses[-1]:.4f}" for trainee in pair)
                bar.set_postfix_str(f"loss: {last}", refresh=False)
                bar.update()


def report(pair: Sequence[Trainee], digits: Tensor) -> None:
    native, fast = pair
    seconds = np.array([trainee.seconds[WARM_UP:] for trainee in pair])
    medians = np.median(seconds, axis=1)
    low, high = np.quantile(seconds[0] / seconds[1], (0.25, 0.75))
    print(f"\n{'':10}{'test accuracy':>15}{'median step':>15}")
    for trainee, median in zip(pair, medians, strict=True):
        print(f"{trainee.name:10}{trainee.accuracy:15.2%}{median * 1e3:12.2f} ms")
    print(f"step time, {native.name} / {fast.name}: {medians[0] / medians[1]:.3f}", end=" ")
    print(f"(half of the single steps: {low:.2f} to {high:.2f})")

    print(f"\nThe first three test images, and the three that {native.name} is least sure of:")
    print(f"{'image':>6}{'digit':>7}" + "".join(f"{t.name + ' says':>15}   with p" for t in pair))
    for i in [0, 1, 2, *native.p.argsort()[:3].tolist()]:
        print(f"{i:>6}{digits[i]:>7}" + "".join(f"{t.says[i]:>15}{t.p[i]:>9.4f}" for t in pair))
    difference = (native.probabilities - fast.probabilities).abs().max()
    print(f"largest difference of a probability on {len(digits)} test images: {difference:.2g}")
    # Training amplifies differences in the last bit: not yet in the first losses, and in the end
    # not enough to turn more than a few test images, those that stand between two digits.
    apart = np.abs(np.subtract(native.losses, fast.losses)[:WARM_UP]).max()
    if apart > 3e-4 or abs(native.accuracy - fast.accuracy) > 0.01:
        print("The two networks differ by more than rounding explains.")


def plot(pair: Sequence[Trainee], title: str, path: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    # The curves nearly coincide: the second is drawn thin and dashed over the first, wide and
    # light. Orange and blue stay apart for colour-blind eyes.
    for trainee, style in zip(pair, (("#f5b041", 6.0, "-"), ("#0050a0", 1.6, "--")), strict=True):
        color, width, line = style
        losses = np.array(trainee.losses)
        window = min(15, len(losses))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        middle = np.arange(len(smooth)) + 1 + window // 2
        label = f"{trainee.name}, test accuracy {trainee.accuracy:.2%}"
        axes.plot(np.arange(len(losses)) + 1, losses, color=color, linewidth=0.6, alpha=0.4)
        axes.plot(middle, smooth, line, color=color, lw=width, solid_capstyle="butt", label=label)
    axes.set(title=title, xlabel="step", ylabel=f"training loss (raw, and mean of {window} steps)")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    shown = "default: %(default)s"
    choices = [name for name in MODULES if name != "softmax"]
    parser.add_argument("--activation", choices=choices, default="relu", help=shown)
    parser.add_argument("--epochs", type=int, default=100, help=shown)
    parser.add_argument("--seed", type=int, default=0, help=shown)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help=shown)
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help=shown)
    args = parser.parse_args()
    if min(args.epochs, args.threads) < 1:
        parser.error("--epochs and --threads must be at least 1")
    if not args.output.resolve().parent.is_dir():
        parser.error(f"--output: there is no directory {args.output.parent}")

    torch.set_num_threads(args.threads)
    train_images, test_images, train_digits, test_digits = load()
    print(f"{args.activation}: {len(train_images)} training images, threads: {args.threads}")
    pair = Trainee(0, args.activation, args.seed), Trainee(1, args.activation, args.seed)
    train(pair, train_images, train_digits, args.epochs, args.seed)
    for trainee in pair:
        trainee.test(test_images, test_digits)
    report(pair, test_digits)
    plot(pair, f"Handwritten digits, CNN with {args.activation}", args.output)
    print(f"loss curves: {args.output}")


if __name__ == "__main__":
    main()
