"""What a monitor costs: `python -m fastact.bench.sight --help`.

Training steps of a convolutional network, and single activations forward and backward, each without a monitor, with
`fastact.monitor` recording every step, and with a forward hook that takes three figures of every output to the host, as common
monitors do. The three take turns. Single activations are timed in several processes, since where a process has its memory makes
a difference that lasts as long as it does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastact
from fastact.bench.environment import Neighbours, environment
from fastact.bench.processes import Worker
from fastact.bench.report import save

SIZES = (10_000, 100_000, 1_000_000)
OPS = ("relu", "sigmoid", "tanh")
PLAIN, MONITOR, HOOK = "no monitor", "fastact.monitor", "hook with .item()"
HEAD = f"| | {PLAIN}, us | {MONITOR} | {HOOK} |\n| --- | --- | --- | --- |"


Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    what: str
    seconds: Seconds

    def ratio(self, name: str) -> float:
        """Median over the rounds of the time beside that without a monitor in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[PLAIN], strict=True))

    def line(self) -> str:
        plain = statistics.median(self.seconds[PLAIN])
        return (
            f"| {self.what} | {plain * 1e6:,.0f} | "
            + " | ".join(f"{self.ratio(name) - 1:+.1%}" for name in (MONITOR, HOOK))
            + " |"
        )


def three_figures(module: nn.Module, args: object, y: Tensor) -> None:
    with torch.no_grad():
        y = y.detach()
        module.figures = [y.mean().item(), y.std().item(), (y.abs() <= 0.05).float().mean().item()]  # type: ignore[assignment]


def network(activation: Callable[[], nn.Module], size: int, channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), activation(),
        nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(2 * channels), activation(),
        nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(2 * channels * (size // 2) ** 2, 128, bias=False), nn.BatchNorm1d(128), activation(),
        nn.Linear(128, 10),
    )  # fmt: skip


def training(activation: Callable[[], nn.Module], batch: int, size: int, channels: int) -> Callable[[], nn.Module]:
    """Makes networks that train themselves when they are called without arguments."""
    images, digits = torch.randn(batch, 1, size, size), torch.arange(batch) % 10

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(activation, size, channels)
            self.optimizer = torch.optim.SGD(self.net.parameters(), 0.01)

        def forward(self) -> None:
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(images), digits).backward()
            self.optimizer.step()

    return Trained


def alone(activation: Callable[[], nn.Module], elements: int, calls: int) -> Callable[[], nn.Module]:
    """Makes models that call their activation so often in a step, forward and backward."""
    x, dy = torch.randn(elements // 100, 100, requires_grad=True), torch.randn(elements // 100, 100)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation = activation()

        def forward(self) -> None:
            for _ in range(calls):
                x.grad = None
                self.activation(x).backward(dy)

    return Alone


def measure(make: Callable[[], nn.Module], rounds: int, calls: int = 1) -> Seconds:
    """Seconds per call, of so many in one call of the model."""
    seconds: Seconds = {PLAIN: [], MONITOR: [], HOOK: []}
    models = {name: make() for name in seconds}
    for module in models[HOOK].modules():
        if isinstance(module, fastact.ReLU | fastact.Sigmoid | fastact.Tanh):
            module.register_forward_hook(three_figures)
    for turn in range(rounds):
        for name in list(seconds)[:: 1 if turn % 2 else -1]:
            # Where others take their turn, none is open.
            with fastact.monitor(models[name]) if name == MONITOR else nullcontext():
                models[name]()  # prepares
                begin = time.perf_counter()
                models[name]()
                seconds[name].append((time.perf_counter() - begin) / calls)
    return seconds


def module_of(op: str) -> Callable[[], nn.Module]:
    return getattr(fastact, fastact._registry.rows[op].class_name)  # type: ignore[no-any-return]


def measure_alone(op: str, elements: int, rounds: int, threads: int) -> Seconds:
    torch.set_num_threads(threads)
    calls = max(200, 20_000_000 // elements)  # in one step, whose end counts with the training steps
    return measure(alone(module_of(op), elements, calls), rounds, calls)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastact.bench.sight", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="in every process, default: %(default)s")
    parser.add_argument("--processes", type=int, default=5, help="for single activations, default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="a network and tensors for a test")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times and the environment here")
    args = parser.parse_args(arguments)
    if min(args.rounds, args.processes, args.threads) < 1:
        parser.error("--rounds, --processes and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    neighbours = Neighbours()
    scale = {"batch": 4, "size": 8, "channels": 4} if args.small else {"batch": 64, "size": 64, "channels": 64}
    sizes = SIZES[:1] if args.small else SIZES
    print(HEAD)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(row.line(), flush=True)

    with ExitStack() as stack:
        workers = [stack.enter_context(Worker()) for _ in range(args.processes)]
        for op in OPS:
            for elements in sizes:
                of_each = [worker(measure_alone, op, elements, args.rounds, args.threads) for worker in workers]
                together = {name: [s for seconds in of_each for s in seconds[name]] for name in of_each[0]}
                add(Row(f"{op}, {elements:,} elements", together))
    for op in ("relu", "sigmoid"):
        add(Row(f"training step, {op}", measure(training(module_of(op), **scale), args.rounds)))
    notes = neighbours.notes()
    print("\n".join(["", *notes]))
    if args.json:
        about = environment("cpu", sys.argv[1:], "python -m fastact.bench.sight") | {"scale": scale, "threads": args.threads}
        save(args.json, environment=about, notes=notes, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
