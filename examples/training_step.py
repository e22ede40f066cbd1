"""Time and memory of a whole training step: the network of digits_cnn.py scaled up, torch.nn against fastact.

    python examples/training_step.py                                      # ReLU, 64x64 images, 64 channels, batches of 64
    python examples/training_step.py --activations leaky_relu scaled_sigmoid --json step.json

The images are the same digits, enlarged. Each side trains in a process of its own, because a process shows its peak memory only
once: the two take turns, a step each. What one sees, for every activation: the median time of a step (forward, loss, backward,
optimizer); the peak of the resident memory; and how much of it came with the training, on top of libraries, weights and images.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from digits_cnn import MODULES, NAMES, Trainee, load

from fastact.bench.environment import Neighbours, environment
from fastact.bench.processes import Worker, resident_bytes
from fastact.bench.report import save

WARM_UP = 2  # steps that also allocate memory and prepare the convolutions: not counted


class Side:
    """What a process trains: made there, and stepped from outside."""

    here: "Side"

    def __init__(self, column: int, activation: str, scale: dict[str, int], batch: int, threads: int) -> None:
        torch.set_num_threads(threads)
        images, _, digits, _ = load()
        self.images = F.interpolate(images[:batch], size=scale["size"], mode="bilinear")
        self.digits = digits[:batch]
        self.trainee = Trainee(column, activation, seed=0, **scale)
        self.before = resident_bytes()[0]


def start(*args: object) -> None:
    Side.here = Side(*args)  # type: ignore[arg-type]


def step() -> tuple[float, float]:
    """Seconds and loss."""
    side = Side.here
    side.trainee.step(side.images, side.digits)
    return side.trainee.seconds[-1], side.trainee.losses[-1]


def memory() -> tuple[int, int]:
    """The peak in bytes, and how much of it came with the training."""
    peak = resident_bytes()[1]
    return peak, peak - Side.here.before


@dataclass
class Row:
    """Each pair is of torch.nn and of fastact."""

    activation: str
    seconds: list[list[float]]
    losses: list[list[float]]
    peak_bytes: list[int]
    training_bytes: list[int]

    @property
    def apart(self) -> bool:
        """More than rounding explains, as in digits_cnn.py."""
        return bool(np.abs(np.subtract(*self.losses)[:WARM_UP]).max() > 3e-4)

    def line(self) -> str:
        native, fast = (float(np.median(seconds)) for seconds in self.seconds)
        low, high = np.quantile(np.divide(*self.seconds), (0.25, 0.75))
        peaks = "".join(f"{peak / 2**20:10,.0f}" for peak in (*self.peak_bytes, *self.training_bytes))
        ratio = f"{native / fast:.3f} ({low:.2f} to {high:.2f})"
        return f"{self.activation:16}{native * 1e3:10,.0f}{fast * 1e3:10,.0f}  {ratio:23}{peaks}"


def measure(activation: str, scale: dict[str, int], batch: int, steps: int, threads: int) -> Row:
    with Worker() as native, Worker() as fast:
        workers = native, fast
        for column, worker in enumerate(workers):
            worker(start, column, activation, scale, batch, threads)
        results: list[list[tuple[float, float]]] = [[], []]
        for i in range(WARM_UP + steps):
            for column in (0, 1) if i % 2 else (1, 0):
                results[column].append(workers[column](step))
        seconds = [[second for second, _ in side[WARM_UP:]] for side in results]
        losses = [[loss for _, loss in side] for side in results]
        peaks = [worker(memory) for worker in workers]
    return Row(activation, seconds, losses, *(list(column) for column in zip(*peaks, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shown = "default: %(default)s"
    choices = [name for name in MODULES if name != "softmax"]
    parser.add_argument("--activations", nargs="+", choices=choices, default=["relu"], help=shown)
    for name, default, what in (
        ("size", 64, "height and width of the images"),
        ("channels", 64, "of the first convolution; the second has twice as many"),
        ("batch", 64, "images in a step"),
        ("steps", 9, "timed for each side"),
        ("threads", torch.get_num_threads(), "of each process"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what}, {shown}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows and the environment here")
    args = parser.parse_args()
    if min(args.size // 2, args.channels, args.batch // 2, args.steps, args.threads) < 1:
        parser.error("--channels, --steps and --threads must be at least 1, --size and --batch at least 2")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"no such directory: {args.json.parent}")

    scale = {"size": args.size, "channels": args.channels}
    neighbours = Neighbours()
    print(f"images: {args.batch} of {args.size}x{args.size}, channels: {args.channels}, threads: {args.threads}\n")
    print(f"{'':16}{'step, ms':>20}  {'ratio (half of steps)':23}{'peak, MiB':>20}{'of that training':>20}")
    print(f"{'':16}{NAMES[0]:>10}{NAMES[1]:>10}{'':25}" + 2 * f"{NAMES[0]:>10}{NAMES[1]:>10}")
    rows = []
    for activation in args.activations:
        rows.append(measure(activation, scale, args.batch, args.steps, args.threads))
        print(rows[-1].line(), flush=True)
    notes = neighbours.notes()
    notes += [f"{row.activation}: the losses differ by more than rounding explains" for row in rows if row.apart]
    print("\n".join(notes))
    if args.json:
        about = environment("cpu", sys.argv[1:], "python examples/training_step.py") | {"scale": scale, "batch": args.batch}
        about["threads"] = args.threads
        save(args.json, environment=about, notes=notes, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
