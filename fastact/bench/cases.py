"""What is measured: the activations of the registry, on which tensors, against what of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from fastact._registry import along_dim, elementwise

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
QUICK_DTYPES = ("float32", "bfloat16")

# From one element, where a call is all overhead, to beyond every cache.
SIZES = (1, 64, 1000, 4096, 32768, 100_000, 1 << 20, 1 << 22, 1 << 25)
QUICK_SIZES = (1 << 20, 32768, 64)

SOFTMAX_SHAPES = (
    ("classes", (1024, 10), -1),
    ("many classes", (128, 1000), -1),
    ("vocabulary", (64, 32768), -1),
    ("attention", (8, 8, 128, 128), -1),
    ("segmentation, channels last", (32, 128, 128, 21), -1),
    ("segmentation", (16, 21, 128, 128), 1),
    ("columns", (4096, 4096), 0),
)
QUICK_SOFTMAX_SHAPES = (SOFTMAX_SHAPES[0], SOFTMAX_SHAPES[1], SOFTMAX_SHAPES[3])

# A GPU's caches are larger, and its memory is busy only with tensors of many MiB: up to 1 GiB of float32.
CUDA_SIZES = (1, 64, 1000, 4096, 16384, 65536, 1 << 20, 1 << 22, 1 << 24, 1 << 26, 1 << 28)
QUICK_CUDA_SIZES = (1 << 26, 1 << 20, 64)

# Rows of 1K to 256K, 256 MiB of float32 each time, and some that no vector divides.
CUDA_SOFTMAX_SHAPES = (
    *SOFTMAX_SHAPES,
    ("ten classes", (1 << 20, 10), -1),
    ("64 classes", (1 << 18, 64), -1),
    *((f"rows of {1 << k}K", (1 << (16 - k), 1024 << k), -1) for k in (0, 2, 4, 6, 8)),
    ("odd rows", (32768, 2049), -1),
    ("odd rows", (8192, 8191), -1),
    ("odd vocabulary", (1024, 50257), -1),
    ("large segmentation", (16, 21, 512, 512), 1),
    ("large columns", (8192, 8192), 0),
    ("columns of a vocabulary", (50257, 128), 0),
)
QUICK_CUDA_SOFTMAX_SHAPES = (CUDA_SOFTMAX_SHAPES[0], CUDA_SOFTMAX_SHAPES[10], CUDA_SOFTMAX_SHAPES[17])

# The fewest tensors a direction can read and write: x, y; dy, saved, dx; and all of these.
TENSORS_MOVED = {"forward": 2, "backward": 3, "both": 5}

_aten = torch.ops.aten
# torch's own backward op and, made of (x, y, args), what it takes after dy: the tensor that torch saves first among it.
TWINS: dict[str, tuple[Any, Callable[..., tuple[Any, ...]]]] = {
    "sigmoid": (_aten.sigmoid_backward.default, lambda x, y, args: (y,)),
    "tanh": (_aten.tanh_backward.default, lambda x, y, args: (y,)),
    "relu": (_aten.threshold_backward.default, lambda x, y, args: (y, 0)),
    "leaky_relu": (_aten.leaky_relu_backward.default, lambda x, y, args: (x, *args, False)),
    "elu": (_aten.elu_backward.default, lambda x, y, args: (*args, 1, 1, False, x)),
    "silu": (_aten.silu_backward.default, lambda x, y, args: (x,)),
    "softplus": (_aten.softplus_backward.default, lambda x, y, args: (x, *args)),
    "log_sigmoid": (_aten.log_sigmoid_backward.default, lambda x, y, args: (x, _aten.log_sigmoid_forward(x)[1])),
    "hardsigmoid": (_aten.hardsigmoid_backward.default, lambda x, y, args: (x,)),
    "softmax": (_aten._softmax_backward_data.default, lambda x, y, args: (y, *args, y.dtype)),
    "log_softmax": (_aten._log_softmax_backward_data.default, lambda x, y, args: (y, *args, y.dtype)),
}


@dataclass(frozen=True)
class Case:
    """One activation on one tensor; `dim` is set for softmax and its relatives only."""

    row: Any
    dtype: str
    label: str
    shape: tuple[int, ...]
    dim: int | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        return tuple(self.row.parameters.values()) if self.dim is None else (self.dim,)

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


def op_names() -> list[str]:
    return [*elementwise, *along_dim]


def make_cases(ops: Iterable[str], dtypes: Iterable[str], quick: bool = False, device: str = "cpu") -> list[Case]:
    """In the order of measuring: should the time for compiling run out, the first have it."""
    ops = list(ops)
    rows = [row for name, row in elementwise.items() if name in ops]
    sizes: tuple[int, ...]
    shapes: tuple[tuple[str, tuple[int, ...], int], ...]
    if device == "cuda":
        sizes = QUICK_CUDA_SIZES if quick else CUDA_SIZES
        shapes = QUICK_CUDA_SOFTMAX_SHAPES if quick else CUDA_SOFTMAX_SHAPES
    else:
        sizes = QUICK_SIZES if quick else SIZES
        shapes = QUICK_SOFTMAX_SHAPES if quick else SOFTMAX_SHAPES
    cases = []
    for dtype in dtypes:
        for size in sizes:
            cases += [Case(row, dtype, f"{size:,}", (size,)) for row in rows]
        cases += [Case(row, dtype, *shape) for name, row in along_dim.items() if name in ops for shape in shapes]
    return cases


class Inputs:
    """The tensors of one shape and dtype, shared by all activations measured on them."""

    def __init__(self, case: Case, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        options: dict[str, Any] = {"device": device, "dtype": DTYPES[case.dtype]}
        self.x = torch.randn(case.shape, generator=generator, **options)
        self.dy = torch.randn(case.shape, generator=generator, **options)
        length = self._copied(max(TENSORS_MOVED, key=TENSORS_MOVED.__getitem__))
        self._source, self._target = (torch.ones(length, **options) for _ in range(2))

    def copy(self, direction: str) -> Callable[[], Tensor]:
        """A copy that moves as many bytes as the direction has to: the limit to compare with."""
        n = self._copied(direction)
        return partial(self._target[:n].copy_, self._source[:n])

    def _copied(self, direction: str) -> int:
        return -(-self.x.numel() * TENSORS_MOVED[direction] // 2)


class Sides(NamedTuple):
    """One direction of one case as calls without arguments, each allocating its result."""

    ours: Callable[[], Tensor]
    eager: Callable[[], Tensor]
    compiled: Callable[[Callable[..., Any]], Callable[[], Tensor]]  # given torch.compile, makes the call
    baseline: str  # what torch runs, for the reader


def sides(case: Case, inputs: Inputs) -> dict[str, Sides]:
    """By direction, what fastact and torch do for it."""
    row, args, x, dy = case.row, case.args, inputs.x, inputs.dy
    eager, name = torch_function(row)
    leaf = x.detach().requires_grad_()

    def with_args(x: Tensor) -> Tensor:
        return eager(x, *args)

    def both(function: Callable[..., Tensor], *args: Any) -> Tensor:
        return torch.autograd.grad(function(leaf, *args), leaf, dy)[0]

    return {
        "forward": Sides(
            ours=partial(row.function, x, *args),
            eager=partial(eager, x, *args),
            compiled=lambda compile: partial(compile(with_args), x),
            baseline=name,
        ),
        "backward": _backward(case, inputs, with_args),
        "both": Sides(
            ours=partial(both, row.function, *args),
            eager=partial(both, eager, *args),
            compiled=lambda compile: partial(both, compile(with_args)),
            baseline=f"{name} and autograd",
        ),
    }


def torch_function(row: Any) -> tuple[Callable[..., Tensor], str]:
    """What a user without fastact calls: torch's function of that name, else the composite."""
    for name in (row.name, row.name.replace("_", "")):
        for module in (torch, torch.nn.functional):
            if hasattr(module, name):
                return getattr(module, name), f"{module.__name__}.{name}"
    return row.reference, "the reference made of torch functions"


def _backward(case: Case, inputs: Inputs, with_args: Callable[[Tensor], Tensor]) -> Sides:
    row, args, x, dy = case.row, case.args, inputs.x, inputs.dy
    y = row.function(x, *args)
    saved = x if row.saves_input(*args) else y
    op = getattr(row.backward_op, "default", row.backward_op)  # as below: no overload to resolve
    ours = partial(op, dy, saved, *args)

    if row.name in TWINS:
        twin, operands = TWINS[row.name]
        rest = operands(x, y, args)
        at = next(i for i, operand in enumerate(rest) if isinstance(operand, Tensor))
        before, kept, after = rest[:at], rest[at], rest[at + 1 :]

        def with_constants(dy: Tensor, kept: Tensor) -> Tensor:
            dx: Tensor = twin(dy, *before, kept, *after)
            return dx

        return Sides(
            ours=ours,
            eager=partial(twin, dy, *rest),
            compiled=lambda compile: partial(compile(with_constants), dy, kept),
            baseline=twin._schema.name,
        )

    leaf = x.detach().requires_grad_()

    def through_graph(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        y = function(leaf)
        return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    def compiled(compile: Callable[..., Any]) -> Callable[[], Tensor]:
        with torch._functorch.config.patch(donated_buffer=False):  # they forbid retaining the graph
            return through_graph(compile(with_args))

    return Sides(
        ours=ours,
        eager=through_graph(with_args),
        compiled=compiled,
        baseline="autograd through that, graph retained (the engine adds some us to small sizes)",
    )
