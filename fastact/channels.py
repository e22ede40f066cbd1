"""Activations that know channels: with learnable parameters, one for all elements or one per channel (csrc/channels.h has their
mathematics), and maxout (csrc/maxout.h).

The body of a function is its reference in plain torch, as in `fastact.activations`: what the tests measure against, what
`torch.compile` sees and fuses with its neighbours, and what is computed for inputs that have no kernel.

What holds for every function with parameters:

- **parameters** are tensors of one element, or of as many as x has channels: the size of its dim 1, of fewer dims 1.
- **dtypes** with kernels: float64, float32, bfloat16, float16, the same for x and the parameters; 16-bit types are computed in
  float32 and rounded once.
- **layouts**: any dense tensor (contiguous, channels_last, permuted) is processed where it lies.
- **gradients**: reverse and forward mode, of any order. One pass makes those that are wanted, of x and of the parameters. The
  gradient of a parameter is a sum over all elements that share it: within blocks of a fixed size in the type that is computed
  in, of these in float64, in an order that does not depend on the number of threads.
- **exceptions**: `TypeError` where an argument is not a tensor, `RuntimeError` where a parameter has more than one dim or
  another number of elements.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, ParamSpec, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary, has_torch_function_variadic

from fastact import _C
from fastact._registry import KERNEL_DTYPES

__all__ = ["Maxout", "PReLU", "channel_scaled_sigmoid", "maxout", "prelu"]

P = ParamSpec("P")

# The public functions with parameters by name, and the reference of each.
functions: dict[str, Callable[..., Tensor]] = {}
references: dict[str, Callable[..., Tensor]] = {}


def _plain(t: Tensor, like: Tensor) -> bool:
    # What handles operators itself, such as a DTensor, knows torch's.
    own = type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
    return t.dtype is like.dtype and t.layout is torch.strided and not t.is_nested and t.device == like.device and not own


def _has_kernel(x: Tensor, *parameters: Tensor) -> bool:
    return (
        x.dtype in KERNEL_DTYPES
        and _plain(x, x)
        and all(_plain(p, x) for p in parameters)
        and (x.is_cpu or _C.device_has_kernels(str(x.device)))
        and not torch.onnx.is_in_onnx_export()  # which has no operators of ours
    )


def channel_activation(*, autocast: bool = False) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Makes the public function of a row out of its reference, whose name, signature and docstring it takes.

    `autocast`: whether torch casts the arguments of its twin to the lower precision of a `torch.autocast` region.
    """

    def decorate(reference: Callable[P, Tensor]) -> Callable[P, Tensor]:
        name, signature = reference.__name__, inspect.signature(reference)
        names = tuple(signature.parameters)
        op, direct = getattr(torch.ops.fastact, name).default, _C.make_direct(name, autocast)
        plain: Callable[..., Tensor] = reference

        def bound(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
            if not args and "input" in keywords and names[0] not in keywords:  # torch's name of it
                args = (keywords.pop("input"),)
            rest = names[len(args) :]
            if len(keywords) == len(rest) and all(name in keywords for name in rest):
                return args + tuple([keywords[name] for name in rest])
            return signature.bind(*args, **keywords).args

        @functools.wraps(reference)
        def function(*args: Any, **keywords: Any) -> Any:
            if keywords:
                args = bound(args, keywords)
            if torch.compiler.is_compiling():
                return plain(*args)
            if (y := direct(*args)) is not None:
                return y
            if len(args) != len(names):
                signature.bind(*args)  # which says what is wrong
            if has_torch_function_variadic(*args):
                return handle_torch_function(function, args, *args)
            for position, t in enumerate(args):
                if not isinstance(t, Tensor):
                    given = type(t).__name__
                    raise TypeError(
                        f"{name}(): argument '{names[position]}' (position {position + 1}) must be Tensor, not {given}"
                    )
            device = args[0].device.type
            lowered = autocast and device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
            return op(*args) if _has_kernel(*args) and not lowered else plain(*args)

        functions[name], references[name] = function, reference
        return cast(Callable[P, Tensor], function)

    return decorate


@channel_activation(autocast=True)
def prelu(x: Tensor, weight: Tensor) -> Tensor:
    """x where x > 0, else weight * x, elementwise, with a weight for all or one per channel: `torch.nn.functional.prelu`.

    Gradient: dy where x > 0, else weight dy; of weight: the sum of dy x where not x > 0. Saved: x and weight.
    Shape and dtype: those of x. Error: at most 0.5 ULP, as torch's. Raises `RuntimeError` for a weight of another dtype than
    x, outside of autocast.
    """
    return F.prelu(x, weight)


class PReLU(nn.PReLU):
    """`fastact.prelu` as a module: the twin of `torch.nn.PReLU(num_parameters=1, init=0.25)`. Shape: any; channels in dim 1."""

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)


@channel_activation()
def channel_scaled_sigmoid(x: Tensor, scale: Tensor, slope: Tensor) -> Tensor:
    """scale * sigmoid(slope * x), elementwise, with a scale and a slope for all or one each per channel, in one kernel.

    Gradient: dy scale slope s (1 - s) with s = sigmoid(slope x); of scale: the sum of dy s; of slope: the sum of
    dy scale s (1 - s) x. Saved: x, scale and slope. Shape and dtype: those of x. Error: that of `fastact.scaled_sigmoid`.
    One of scale and slope may be for all, the other per channel.
    """
    shape = [1, -1, *[1] * (x.dim() - 2)] if x.dim() > 1 else []
    channels = x.shape[1] if x.dim() > 1 else 1
    for name, p in (("scale", scale), ("slope", slope)):
        if p.dim() > 1 or (p.numel() != 1 and (x.dim() == 0 or p.numel() != channels)):
            raise RuntimeError(
                f"channel_scaled_sigmoid: {name} has shape {list(p.shape)}; for an x of shape {list(x.shape)} "
                f"it must have 1 element or {channels}"
            )
    scale, slope = (p.reshape([] if p.numel() == 1 else shape) for p in (scale, slope))
    return scale * torch.sigmoid(slope * x)


_direct_maxout = _C.make_direct("maxout")


def _maxout_reference(x: Tensor, pieces: int, dim: int) -> Tensor:
    dim = dim % x.dim()
    groups = torch.unflatten(x, dim, (x.shape[dim] // pieces, pieces))
    values: Tensor = groups.max(dim + 1).values
    return values


def _whole(number: Any, which: str) -> int:
    if not isinstance(number, bool):
        if isinstance(number, int | torch.SymInt):
            return cast(int, number)
        try:
            return operator.index(number)  # NumPy's integers and tensors of one, as torch takes them
        except TypeError:
            pass
    raise TypeError(f"maxout(): argument {which} must be int, not {type(number).__name__}")


def maxout(x: Tensor, pieces: int, dim: int = 1) -> Tensor:
    """The largest of every `pieces` neighbours along `dim`: `x.unflatten(dim, (-1, pieces)).max(dim + 1).values`.

    Gradient: dy at the first of the largest, 0 elsewhere. Saved: a byte per result, not x. NaN is larger than any number.
    Shape: that of x with size(dim) / pieces in `dim`; dtype: that of x. Error: none. float64, float32, bfloat16 and float16
    have kernels for up to 255 pieces, in any dense layout. Derivatives: reverse and forward mode, of any order. Raises
    `TypeError` where x is not a tensor or a number not an int, `ValueError` where `pieces` is not positive or does not divide
    the size, `IndexError` for a dim out of range.
    """
    if not torch.compiler.is_compiling():
        if has_torch_function_unary(x):
            return handle_torch_function(maxout, (x,), x, pieces, dim)
        known = type(x) is Tensor and type(pieces) is type(dim) is int and 0 < pieces <= _C.MOST_PIECES
        if known and x.size(dim) % pieces == 0 and (y := _direct_maxout(x, pieces, dim)) is not None:
            return y
    if not isinstance(x, Tensor):
        raise TypeError(f"maxout(): argument 'x' (position 1) must be Tensor, not {type(x).__name__}")
    pieces, dim = _whole(pieces, "'pieces' (position 2)"), _whole(dim, "'dim' (position 3)")
    size = x.size(dim)
    if pieces < 1 or size % pieces != 0:
        raise ValueError(f"maxout(): pieces must be positive and divide size {size} of dim {dim}, but is {pieces}")
    if torch.compiler.is_compiling() or pieces > _C.MOST_PIECES or not _has_kernel(x):
        return _maxout_reference(x, pieces, dim)
    return cast(Tensor, torch.ops.fastact.maxout.default(x, pieces, dim)[0])


class Maxout(nn.Module):
    """`fastact.maxout` as a module. Shape: any whose size of `dim` is a multiple of `pieces`, by which it is divided."""

    def __init__(self, pieces: int, dim: int = 1) -> None:
        super().__init__()
        self.pieces = pieces
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return maxout(input, self.pieces, self.dim)

    def extra_repr(self) -> str:
        return f"pieces={self.pieces}, dim={self.dim}"
