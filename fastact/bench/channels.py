"""Activations with parameters per channel, and maxout, beside torch: `python -m fastact.bench.channels --help`.

Forward without gradients, and forward and backward through autograd, with the gradients of x and of the parameters.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastact import channels
from fastact.bench.cases import DTYPES
from fastact.bench.environment import Neighbours, environment
from fastact.bench.report import save
from fastact.bench.timing import Call, CpuTimer, CudaTimer, Spread

# Channels in dim 1.
SHAPES = ((8, 64), (4096, 1024), (32, 128, 28, 28))
SMALL_SHAPES = ((2, 4),)
# What torch has to offer, and how many parameters there are.
PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    **{
        name: (channels.functions[name], reference, reference.__code__.co_argcount - 1)
        for name, reference in channels.references.items()
    },
    "maxout of 2": (partial(channels.maxout, pieces=2), partial(channels._maxout_reference, pieces=2, dim=1), 0),
}
HEAD = "| | shape | dtype | | torch, us | fastact, us | ratio |\n| --- | --- | --- | --- | --- | --- | --- |"


@dataclass(frozen=True)
class Row:
    op: str
    dtype: str
    shape: tuple[int, ...]
    channels_last: bool
    direction: str
    ours: Spread
    torch: Spread

    def line(self) -> str:
        shape = " x ".join(map(str, self.shape)) + (", channels last" if self.channels_last else "")
        times = f"{self.torch.median * 1e6:,.1f} | {self.ours.median * 1e6:,.1f} | {self.torch.median / self.ours.median:.1f}"
        return f"| {self.op} | {shape} | {self.dtype} | {self.direction} | {times} |"


def inputs(shape: tuple[int, ...], dtype: str, channels_last: bool, count: int, device: str) -> tuple[Tensor, list[Tensor]]:
    x = torch.randn(shape, dtype=DTYPES[dtype], device=device)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    parameters = [torch.rand(shape[1], dtype=x.dtype, device=device) for _ in range(count)]
    return x.requires_grad_(), [p.requires_grad_() for p in parameters]


def trained(function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor], dy: Tensor) -> object:
    return torch.autograd.grad(function(x, *parameters), [x, *parameters], dy)


def without_gradients(function: Callable[..., Tensor], x: Tensor, parameters: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(x, *parameters)


def measure(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str], device: str, seconds: float) -> Iterator[Row]:
    timer = CudaTimer() if device == "cuda" else CpuTimer()
    for op, (ours, theirs, count) in PAIRS.items():
        for shape in shapes:
            for channels_last in (False, True) if len(shape) == 4 else (False,):
                for dtype in dtypes:
                    x, parameters = inputs(shape, dtype, channels_last, count, device)
                    dy = torch.randn_like(without_gradients(theirs, x, parameters))
                    for direction, call, rest in (("forward", without_gradients, ()), ("both", trained, (dy,))):
                        sides: dict[str, Call] = {
                            name: partial(call, function, x, parameters, *rest)
                            for name, function in (("ours", ours), ("torch", theirs))
                        }
                        times = timer(sides, seconds)
                        yield Row(op, dtype, shape, channels_last, direction, times["ours"], times["torch"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastact.bench.channels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bfloat16"], metavar="DTYPE")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line; default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tensors for a test")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the times and the environment here")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    neighbours = Neighbours()
    print(HEAD)
    rows = []
    for row in measure(SMALL_SHAPES if args.small else SHAPES, args.dtypes, args.device, args.seconds):
        rows.append(row)
        print(row.line(), flush=True)
    notes = neighbours.notes()
    print("\n".join(["", *notes]))
    if args.json:
        about = environment(args.device, sys.argv[1:], "python -m fastact.bench.channels")
        save(args.json, environment=about, notes=notes, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
