"""No time is taken of a wrong result: every case is compared with its float64 reference first."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastact.bench.cases import DTYPES, Case, Inputs, Sides

# In units of the dtype's machine epsilon, relative. float32 evaluates in its own precision, where
# exp(x - max) alone loses some units. The 16-bit types compute in float32 and round only y and the
# result, half a unit each, and get as much again for a rounding the other way. For float64 the
# reference is no more precise than what it checks: its own sum of thousands is off by dozens.
TOLERANCE = {"float32": 16, "bfloat16": 2, "float16": 2, "float64": 256}

# Elements of an elementwise check at a time. On the CPU its float64 intermediates stay in the cache, and torch
# keeps to one thread, which is faster than waking others for each of a dozen small steps. A GPU wants much to do at once.
CHUNK = {"cpu": 1 << 14, "cuda": 1 << 24}


def _hardsigmoid(x: Tensor) -> Tensor:
    """Of which torch's own gradient is no reference: it multiplies by 1/6 as a float32, in float64 too. At -3 and 3 it is 0."""
    return torch.where(x.abs() < 3, (x + 3) / 6, ((x + 3).clamp(0, 6) / 6).detach())


EXACT: dict[str, Callable[..., Tensor]] = {"hardsigmoid": _hardsigmoid}


class WrongResult(Exception):
    """fastact and the reference differ by more than rounding explains."""


def check(case: Case, inputs: Inputs, directions: dict[str, Sides]) -> None:
    results = []
    for direction, side in directions.items():
        results.append(result := side.ours())
        if (result.shape, result.dtype) != (inputs.x.shape, inputs.x.dtype):
            _fail(case, direction, f"returned {result.dtype} of shape {tuple(result.shape)}")

    info = torch.finfo(DTYPES[case.dtype])
    relative = TOLERANCE[case.dtype] * info.eps
    absolute = 8 * info.tiny * info.eps  # eight subnormal steps, where relative error means nothing
    for x, dy, *pieces in _pieces(case, inputs.x, inputs.dy, *results):
        y, dx, size, scale = _expected(case, x, dy)
        # A backward sees y already rounded: its error grows with dy even where dx itself is small.
        bounds = {"forward": size, "backward": scale + dx.abs(), "both": scale + dx.abs()}
        for (direction, bound), got in zip(bounds.items(), pieces, strict=True):
            want = y if direction == "forward" else dx
            allowed = relative * bound + absolute
            wrong = ~((got.double() - want).abs() <= allowed)  # this way round, NaN is wrong too
            if wrong.any():
                i = int(wrong.flatten().nonzero()[0])
                at = [t.flatten()[i].item() for t in (x, dy, got, want, got - want, allowed)]
                what = "x = {:.9g}, dy = {:.9g}: {:.9g}, not {:.9g}; off by {:.2g}, allowed {:.2g}"
                _fail(case, direction, what.format(*at))


def _expected(case: Case, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx and the magnitudes of the terms that these are made of, all in float64."""
    x, dy = x.detach().to(torch.float64, copy=True).requires_grad_(), dy.double()
    y = EXACT.get(case.row.name, case.row.reference)(x, *case.args)
    (dx,) = torch.autograd.grad(y, x, dy)
    y, scale = y.detach(), dy.abs()
    size = y.abs()
    if case.row.name == "log_softmax":  # the logarithm of a sum of 1 and more is off by what the sum is, of 1
        size, scale = size + 1, scale + y.exp() * scale.sum(case.dim, keepdim=True)
    elif case.dim is not None:
        scale = y * (scale + (y * scale).sum(case.dim, keepdim=True))
    return y, dx, size, scale


def _pieces(case: Case, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    if case.dim is not None:
        yield tensors
    else:
        chunk = CHUNK[tensors[0].device.type]
        yield from zip(*(t.flatten().split(chunk) for t in tensors), strict=True)


def _fail(case: Case, direction: str, what: str) -> None:
    dim = "" if case.dim is None else f", dim {case.dim}"
    raise WrongResult(f"{case.row.name} {direction}, {case.dtype} {case.shape}{dim}: {what}")
