"""What infinities, NaN, signed zeros, subnormals and saturated inputs give: a table, bit for bit, in every lane."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from conftest import ALL_ROWS, ALONG_DIM, DEVICE, ELEMENTWISE, INTEGER, REFERENCE_ERROR, bits, parameter_sets
from torch import Tensor

import fastact
from fastact._registry import Row

NAN, INF = math.nan, math.inf
# Values that depend on the dtype: the smallest subnormal, the largest number, and 1e14 (where that overflows, the largest).
TINY, MAX, HUGE = "tiny", "max", "huge"
Value = float | str

# fmt: off
# name -> parameters -> (x, y). An activation that is not here is held to plain torch alone, as all are.
FORWARD: dict[str, dict[tuple[float, ...], list[tuple[Value, Value]]]] = {
    "sigmoid": {
        (): [
            (0.0, 0.5), (-0.0, 0.5), (TINY, 0.5), ("-tiny", 0.5),
            (INF, 1.0), (-INF, 0.0), (MAX, 1.0), ("-max", 0.0), (40.0, 1.0), (-800.0, 0.0),
            (NAN, NAN), (-NAN, NAN),
        ],
    },
    "relu": {
        (): [
            (0.0, 0.0), (-0.0, -0.0), (TINY, TINY), ("-tiny", 0.0), (2.5, 2.5), (-2.5, 0.0),
            (INF, INF), (-INF, 0.0), (MAX, MAX), ("-max", 0.0),
            (NAN, NAN), (-NAN, NAN),
        ],
    },
    "leaky_relu": {
        (0.25,): [
            # A quarter of the smallest subnormal rounds to zero, whose sign stays.
            (0.0, 0.0), (-0.0, -0.0), (TINY, TINY), ("-tiny", -0.0), (2.5, 2.5), (-2.0, -0.5),
            (INF, INF), (-INF, -INF), (MAX, MAX),
            (NAN, NAN), (-NAN, NAN),
        ],
        (0.0,): [
            (0.0, 0.0), (-0.0, -0.0), (2.5, 2.5), (-2.0, -0.0), ("-max", -0.0), (INF, INF), (-INF, NAN), (NAN, NAN),
        ],
        (-0.5,): [
            (0.0, -0.0), (-0.0, 0.0), (2.5, 2.5), (-2.0, 1.0), (INF, INF), (-INF, INF), (NAN, NAN),
        ],
        (INF,): [(0.0, NAN), (-0.0, NAN), (2.5, 2.5), (-2.0, -INF), (-INF, -INF), (NAN, NAN)],
        (NAN,): [(0.0, NAN), (2.5, 2.5), (-2.0, NAN), (INF, INF), (NAN, NAN)],
    },
    "tanh": {
        (): [
            (0.0, 0.0), (-0.0, -0.0), (TINY, TINY), ("-tiny", "-tiny"),
            (INF, 1.0), (-INF, -1.0), (MAX, 1.0), ("-max", -1.0), (20.0, 1.0), (-20.0, -1.0),
            (NAN, NAN), (-NAN, NAN),
        ],
    },
    "scaled_sigmoid": {
        (1.0, 1.0): [(0.0, 0.5), (-0.0, 0.5), (INF, 1.0), (-INF, 0.0), (MAX, 1.0), ("-max", 0.0), (NAN, NAN)],
        (4.0, 1.0): [(0.0, 2.0), (TINY, 2.0), (INF, 4.0), (-INF, 0.0), (MAX, 4.0), ("-max", 0.0), (NAN, NAN)],
        (-1.0, 1.0): [(0.0, -0.5), (-0.0, -0.5), (INF, -1.0), (-INF, -0.0), (MAX, -1.0), ("-max", -0.0), (NAN, NAN)],
        (2.0, -1.0): [(0.0, 1.0), (INF, 0.0), (-INF, 2.0), (MAX, 0.0), ("-max", 2.0), (NAN, NAN)],
        (0.0, 1.0): [(0.0, 0.0), (3.0, 0.0), (-3.0, 0.0), (INF, 0.0), (-INF, 0.0), (MAX, 0.0), ("-max", 0.0), (NAN, NAN)],
        (2.0, 0.0): [(0.0, 1.0), (3.0, 1.0), ("-max", 1.0), (INF, NAN), (-INF, NAN), (NAN, NAN)],
    },
}

# name -> parameters -> (x, dy, dx)
BACKWARD: dict[str, dict[tuple[float, ...], list[tuple[Value, Value, Value]]]] = {
    "sigmoid": {
        (): [
            (0.0, 1.0, 0.25), (-0.0, -2.0, -0.5), (TINY, 1.0, 0.25), (INF, 1.0, 0.0), (-INF, 1.0, 0.0), (MAX, 1.0, 0.0),
            ("-max", 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, -0.0, -0.0), (0.0, INF, INF), (INF, INF, NAN),
            (NAN, 1.0, NAN), (0.0, NAN, NAN),
        ],
    },
    "relu": {
        (): [
            (0.0, 1.0, 0.0), (-0.0, 1.0, 0.0), (TINY, 1.0, 1.0), ("-tiny", 1.0, 0.0), (2.0, -3.0, -3.0), (-2.0, -3.0, 0.0),
            (INF, 1.0, 1.0), (-INF, 1.0, 0.0), (2.0, -0.0, -0.0), (-2.0, -0.0, 0.0), (2.0, INF, INF), (-2.0, INF, 0.0),
            (NAN, 1.0, 1.0), (NAN, -3.0, -3.0), (2.0, NAN, NAN), (-2.0, NAN, 0.0),
        ],
    },
    "leaky_relu": {
        (0.25,): [
            (0.0, 1.0, 0.25), (-0.0, 1.0, 0.25), (TINY, 1.0, 1.0), ("-tiny", 1.0, 0.25), (2.0, -3.0, -3.0), (-2.0, -3.0, -0.75),
            (INF, 1.0, 1.0), (-INF, 1.0, 0.25), (2.0, -0.0, -0.0), (-2.0, -0.0, -0.0), (-2.0, INF, INF),
            (NAN, 1.0, 0.25), (2.0, NAN, NAN), (-2.0, NAN, NAN),
        ],
        (0.0,): [
            (0.0, 1.0, 0.0), (-0.0, 1.0, 0.0), (2.0, 1.0, 1.0), (-2.0, 1.0, 0.0), (-2.0, -1.0, -0.0), (-2.0, INF, NAN),
            (-INF, 1.0, 0.0), (NAN, 1.0, 0.0),
        ],
        (-0.5,): [
            (0.0, 1.0, -0.5), (-0.0, 1.0, -0.5), (2.0, 1.0, 1.0), (-2.0, 1.0, -0.5), (-2.0, 0.0, -0.0), (INF, 1.0, 1.0),
            (-INF, 1.0, -0.5), (NAN, 1.0, -0.5),
        ],
    },
    "tanh": {
        (): [
            (0.0, 1.0, 1.0), (-0.0, -2.0, -2.0), (TINY, 1.0, 1.0), (INF, 1.0, 0.0), (-INF, 1.0, 0.0), (MAX, 1.0, 0.0),
            ("-max", 1.0, 0.0), (0.0, -0.0, -0.0), (0.0, INF, INF), (INF, INF, NAN),
            (NAN, 1.0, NAN), (0.0, NAN, NAN),
        ],
    },
    "scaled_sigmoid": {
        (1.0, 1.0): [(0.0, 1.0, 0.25), (INF, 1.0, 0.0), (-INF, 1.0, 0.0), (NAN, 1.0, NAN), (0.0, NAN, NAN)],
        (4.0, 1.0): [(0.0, 1.0, 1.0), (INF, 1.0, 0.0), (-INF, 1.0, 0.0), (0.0, INF, INF), (NAN, 1.0, NAN), (0.0, NAN, NAN)],
        (-1.0, 1.0): [(0.0, 1.0, -0.25), (0.0, -1.0, 0.25), (NAN, 1.0, NAN)],
        (2.0, -1.0): [(0.0, 1.0, -0.5), (NAN, 1.0, NAN)],
        (0.0, 1.0): [(0.0, 1.0, 0.0), (3.0, 1.0, 0.0), (-3.0, 1.0, 0.0), (INF, 1.0, 0.0), (-INF, 1.0, 0.0), (NAN, 1.0, NAN)],
        (2.0, 0.0): [(0.0, 1.0, 0.0), (3.0, 1.0, 0.0)],
    },
}

# (row, its softmax)
SOFTMAX: list[tuple[list[Value], list[Value]]] = [
    ([-INF], [NAN]),
    ([-INF, -INF, -INF], [NAN, NAN, NAN]),
    ([INF], [NAN]),
    ([0.0, INF, 1.0], [NAN, NAN, NAN]),
    ([INF, INF, 0.0], [NAN, NAN, NAN]),
    ([-INF, INF, 0.0], [NAN, NAN, NAN]),
    ([NAN], [NAN]),
    ([NAN, 0.0, 1.0], [NAN, NAN, NAN]),
    ([0.0, 1.0, -NAN], [NAN, NAN, NAN]),
    ([-INF, NAN, -INF], [NAN, NAN, NAN]),
    ([INF, NAN, -INF], [NAN, NAN, NAN]),
    ([0.0], [1.0]),
    (["-max"], [1.0]),
    ([0.0, -0.0], [0.5, 0.5]),
    ([TINY, "-tiny", 0.0, -0.0], [0.25, 0.25, 0.25, 0.25]),
    ([HUGE, HUGE, HUGE, HUGE], [0.25, 0.25, 0.25, 0.25]),
    (["-huge", "-huge"], [0.5, 0.5]),
    ([MAX, MAX], [0.5, 0.5]),
    (["-max", "-max", "-max", "-max"], [0.25, 0.25, 0.25, 0.25]),
    # The difference of these two overflows to -inf.
    ([MAX, "-max"], [1.0, 0.0]),
    ([-1e4, 0.0], [0.0, 1.0]),
    ([0.0, 1e4, 0.0, 1e4], [0.0, 0.5, 0.0, 0.5]),
    ([-INF, 0.0, 0.0], [0.0, 0.5, 0.5]),
    ([-INF, "-max", -INF], [0.0, 1.0, 0.0]),
    ([5.0, -INF, 5.0, -INF, 5.0, -INF, 5.0], [0.25, 0.0, 0.25, 0.0, 0.25, 0.0, 0.25]),
]

# With a temperature the same: only -inf, NaN and equal numbers are above. With masked_zero rows of -inf are 0, and only they.
MASKED_ZERO: list[tuple[list[Value], list[Value]]] = [
    ([-INF], [0.0]),
    ([-INF, -INF, -INF], [0.0, 0.0, 0.0]),
    ([-INF, -INF, NAN], [NAN, NAN, NAN]),
    *SOFTMAX[2:],
]

LN2, LN4 = math.log(2), math.log(4)
LOG_SOFTMAX: list[tuple[list[Value], list[Value]]] = [
    ([-INF], [NAN]),
    ([-INF, -INF, -INF], [NAN, NAN, NAN]),
    ([INF], [NAN]),
    ([0.0, INF, 1.0], [NAN, NAN, NAN]),
    ([-INF, INF, 0.0], [NAN, NAN, NAN]),
    ([NAN], [NAN]),
    ([0.0, 1.0, -NAN], [NAN, NAN, NAN]),
    ([-INF, NAN, -INF], [NAN, NAN, NAN]),
    ([0.0], [0.0]),
    (["-max"], [0.0]),
    ([0.0, -0.0], [-LN2, -LN2]),
    ([HUGE, HUGE, HUGE, HUGE], [-LN4, -LN4, -LN4, -LN4]),
    (["-max", "-max"], [-LN2, -LN2]),
    ([MAX, MAX], [-LN2, -LN2]),
    # The difference of these two overflows.
    ([MAX, "-max"], [0.0, -INF]),
    ([-1024.0, 0.0], [-1024.0, 0.0]),
    ([-INF, 0.0, 0.0], [-INF, -LN2, -LN2]),
    ([-INF, "-max", -INF], [-INF, 0.0, -INF]),
    ([5.0, -INF, 5.0, -INF, 5.0, -INF, 5.0], [-LN4, -INF, -LN4, -INF, -LN4, -INF, -LN4]),
]

# Row -> what its op takes after dim -> (row, its result); and what stands in a row for an -inf beside finite numbers.
ALONG: dict[str, dict[tuple[Any, ...], list[tuple[list[Value], list[Value]]]]] = {
    "softmax": {
        (): SOFTMAX, (0.25,): SOFTMAX, (2.0, False): [pair for pair in SOFTMAX if -1e4 not in pair[0]],
        (1.0, True): MASKED_ZERO, (0.5, True): MASKED_ZERO, (2.0**126, True): MASKED_ZERO[:3],
        (2.0**-126, True): [pair for pair in MASKED_ZERO if TINY not in pair[0]],
    },
    "log_softmax": {(): LOG_SOFTMAX},
}
HIDDEN = {"softmax": 0.0, "log_softmax": -INF}

# (y, dy, dx)
SOFTMAX_BACKWARD: list[tuple[list[Value], list[Value], list[Value]]] = [
    ([1.0], [3.0], [0.0]),
    ([1.0], [-3.0], [0.0]),
    ([NAN], [1.0], [NAN]),
    ([1.0], [NAN], [NAN]),
    ([1.0], [INF], [NAN]),
    ([0.5, 0.5], [1.0, 1.0], [0.0, 0.0]),
    ([0.5, 0.5], [1.0, -1.0], [0.5, -0.5]),
    ([0.0, 1.0], [8.0, 2.0], [0.0, 0.0]),
    ([0.25, 0.25, 0.25, 0.25], [4.0, 0.0, 0.0, 0.0], [0.75, -0.25, -0.25, -0.25]),
    ([0.25, 0.25, 0.5], [NAN, 1.0, 1.0], [NAN, NAN, NAN]),
    ([0.25, NAN, 0.5], [1.0, 1.0, 1.0], [NAN, NAN, NAN]),
    ([0.25, 0.25, 0.5], [0.0, 0.0, INF], [-INF, -INF, NAN]),
    ([NAN, NAN], [0.0, 0.0], [NAN, NAN]),
    # What masked_zero gives.
    ([0.0, 0.0], [1.0, -3.0], [0.0, 0.0]),
]
LOG_SOFTMAX_BACKWARD: list[tuple[list[Value], list[Value], list[Value]]] = [
    ([0.0], [3.0], [0.0]),
    ([NAN], [1.0], [NAN]),
    ([0.0], [NAN], [NAN]),
    ([-INF, 0.0], [8.0, 2.0], [8.0, -8.0]),
    ([-INF, -1024.0, 0.0], [1.0, 2.0, 0.0], [1.0, 2.0, -3.0]),
    ([0.0, 0.0], [1.0, -1.0], [1.0, -1.0]),
    ([0.0, NAN, -INF], [1.0, 1.0, 1.0], [-2.0, NAN, 1.0]),
    ([0.0, -1.0, -INF], [NAN, 1.0, 1.0], [NAN, NAN, NAN]),
]
# What the ops take after dim, the table, and which y makes no difference elsewhere in a row.
ALONG_BACKWARD: dict[str, tuple[list[tuple[Any, ...]], list[tuple[list[Value], list[Value], list[Value]]]]] = {
    "softmax": ([(), (1.0,)], SOFTMAX_BACKWARD),
    "log_softmax": ([()], LOG_SOFTMAX_BACKWARD),
}

# fmt: on


def tensor(values: list[Value], dtype: torch.dtype) -> Tensor:
    named = {
        TINY: torch.tensor(1, dtype=INTEGER[dtype.itemsize]).view(dtype).item(),
        MAX: torch.finfo(dtype).max,
        HUGE: min(1e14, torch.finfo(dtype).max),
    }
    numbers = [v if isinstance(v, float) else math.copysign(1, -v.startswith("-")) * named[v.removeprefix("-")] for v in values]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def compare(what: str, x: Tensor, actual: Tensor, expected: Tensor) -> None:
    """Bit for bit, but for the payload and the sign of NaN, which mean nothing."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    wrong = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        shown = x[at].item() if x.shape == actual.shape else x
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: x = {shown!r}, "
            f"expected {expected[at].item()!r}, got {actual[at].item()!r}"
        )


def describe(row: Row, parameters: tuple[float, ...], dtype: torch.dtype, isa: str) -> str:
    return f"{row.name}{parameters} {str(dtype)[6:]} {isa}"


def saved_for(row: Row, x: Tensor, parameters: tuple[float, ...]) -> Tensor:
    return x if row.saves_input(*parameters) else row.op(x, *parameters)


def plain(row: Row, x: Tensor, parameters: tuple[float, ...]) -> Tensor:
    """The plain-torch reference, computed on the CPU: what torch has there is what is promised on every device."""
    return row.reference(x.cpu(), *parameters).to(x.device)


def plain_gradient(row: Row, x: Tensor, dy: Tensor, parameters: tuple[float, ...]) -> Tensor:
    """Of the plain-torch reference, one by one: what torch makes of NaN may depend on the place in a vector."""
    ones = [one.clone().requires_grad_() for one in x.detach().cpu().unbind()]
    gradients = [
        torch.autograd.grad(row.reference(one, *parameters), one, g)[0][None]
        for one, g in zip(ones, dy.cpu().unbind(), strict=True)
    ]
    return torch.cat(gradients).to(x.device)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Unless a test asks for more: these inputs are small, and on a busy machine threads wait for one another."""
    torch.set_num_threads(1)


# ---- The table -------------------------------------------------------------------------------------------------------


def test_forward(row: Row, dtype: torch.dtype, isa: str) -> None:
    for parameters, pairs in FORWARD.get(row.name, {}).items():
        # Thirteen times over: every value meets full vectors and the rest beyond the last one.
        x, y = (tensor(list(column) * 13, dtype) for column in zip(*pairs, strict=True))
        what = describe(row, parameters, dtype, isa)
        compare(what, x, row.op(x, *parameters), y)
        compare(f"{what}, function", x, row.function(x, *parameters), y)
        compare(f"{what}, one element", x, torch.stack([row.op(one, *parameters) for one in x]), y)
        in_place = x.clone()
        getattr(torch.ops.fastact, row.name + "_")(in_place, *parameters)
        compare(f"{what}, in place", x, in_place, y)


def test_backward(row: Row, dtype: torch.dtype, isa: str) -> None:
    for parameters, triples in BACKWARD.get(row.name, {}).items():
        x, dy, dx = (tensor(list(column) * 13, dtype) for column in zip(*triples, strict=True))
        what = describe(row, parameters, dtype, isa) + " gradient"
        compare(what, x, row.backward_op(dy, saved_for(row, x, parameters), *parameters), dx)
        leaf = x.clone().requires_grad_()
        compare(f"{what}, autograd", x, torch.autograd.grad(row.function(leaf, *parameters), leaf, dy)[0], dx)


@pytest.mark.cpu_only("no kernel of ours is called")
def test_the_table_is_that_of_plain_torch(row: Row, dtype: torch.dtype) -> None:
    for parameters, pairs in FORWARD.get(row.name, {}).items():
        x, y = (tensor(list(column), dtype) for column in zip(*pairs, strict=True))
        compare(f"{row.name}{parameters} {dtype}", x, plain(row, x, parameters), y)
    for parameters, triples in BACKWARD.get(row.name, {}).items():
        x, dy, dx = (tensor(list(column), dtype) for column in zip(*triples, strict=True))
        # Adding 0 makes the zeros equal: where a formula is written differently, theirs may carry another sign.
        compare(f"{row.name}{parameters} {dtype} gradient", x, plain_gradient(row, x, dy, parameters) + 0.0, dx + 0.0)


def test_special_values_agree_with_plain_torch(row: Row, dtype: torch.dtype, isa: str) -> None:
    """NaN, infinity and zero, with their signs, where plain torch has them; close to it elsewhere."""
    x = tensor([0.0, -0.0, TINY, "-tiny", 1.0, -1.0, 30.0, -30.0, MAX, "-max", INF, -INF, NAN], dtype)
    # 16-bit references round after every step, float32 torch flushes what is below its range: neither is what is tested here.
    # The gradient may come from an output that was rounded, so that its error is that of a number as large as the scale.
    rtol, atol, gradient_atol = 8 * torch.finfo(dtype).eps, 1e-12, 8 * torch.finfo(dtype).eps
    for parameters in parameter_sets(row):
        what = describe(row, parameters, dtype, isa)
        y, expected = row.op(x, *parameters), plain(row, x, parameters)
        torch.testing.assert_close(y, expected, equal_nan=True, rtol=rtol, atol=atol, msg=lambda m, what=what: f"{what}: {m}")
        zero = (y == 0) & (expected == 0)
        compare(f"{what} zeros", x[zero], y[zero], expected[zero])
        dy = torch.ones_like(x)
        dx, expected = row.backward_op(dy, saved_for(row, x, parameters), *parameters), plain_gradient(row, x, dy, parameters)
        what += " gradient"
        torch.testing.assert_close(
            dx,
            expected,
            equal_nan=True,
            rtol=max(rtol, REFERENCE_ERROR.get(row.name, 0)),
            atol=gradient_atol,
            msg=lambda m, what=what: f"{what}: {m}",
        )


def test_zero_scale_is_zero_with_zero_gradient(dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Of scaled_sigmoid alone: y / scale, as its derivative is usually written, is 0 / 0 there."""
    x = (torch.randn(1000, generator=generator, dtype=torch.float64) * 30).to(dtype).requires_grad_()
    y = fastact.scaled_sigmoid(x, 0.0, 1.7)
    compare(f"scaled_sigmoid(0, 1.7) {dtype} {isa}", x, y, torch.zeros_like(x))
    dy = torch.rand(1000, generator=generator, dtype=torch.float64).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    compare(f"scaled_sigmoid(0, 1.7) {dtype} {isa} gradient", x, dx, torch.zeros_like(x))


# ---- Exact activations -----------------------------------------------------------------------------------------------


def random_patterns(dtype: torch.dtype, count: int, generator: torch.Generator) -> Tensor:
    """Every number of a 16-bit type, else `count` random patterns: with all kinds of special ones."""
    if dtype.itemsize == 2:
        order = torch.randperm(2**16, generator=generator)
        return (order - 2**15).to(torch.int16).view(dtype)
    words = torch.randint(-(2**31), 2**31, (count * dtype.itemsize // 4,), generator=generator).to(torch.int32).view(dtype)
    # A random exponent of 11 bits is seldom that of NaN, an infinity, a zero or a subnormal: those come on top.
    special = tensor([0.0, -0.0, INF, -INF, NAN, TINY, "-tiny", MAX, "-max"], dtype)
    return torch.cat([words, special])[torch.randperm(count + 9, generator=generator)]


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_bitwise_equal_to_torch(name: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Only these two: where torch rounds at most once, there is nothing to be better at."""
    row = next(row for row in ELEMENTWISE if row.name == name)
    x = random_patterns(dtype, 65527, generator)
    dy = random_patterns(dtype, 65527, generator)
    for parameters in [*parameter_sets(row), *FORWARD[name]]:
        what = describe(row, parameters, dtype, isa)
        leaf = x.clone().requires_grad_()
        y = row.function(leaf, *parameters)
        compare(what, x, y.detach(), plain(row, x, parameters))
        plain_leaf = x.clone().requires_grad_()
        plain_dx = torch.autograd.grad(plain(row, plain_leaf, parameters), plain_leaf, dy)[0]
        compare(f"{what} gradient", x, torch.autograd.grad(y, leaf, dy)[0], plain_dx)


# ---- Along a dim -----------------------------------------------------------------------------------------------------


def paddings(length: int) -> list[tuple[str, list[int], int]]:
    """Name, positions and padded length: alone, scattered over a short row, a long one, and one of more than one sum block."""
    spread = [(7 * k + 3) % 61 for k in range(length)]
    return [
        ("alone", list(range(length)), length),
        ("short row", spread, 64),
        ("long row", [k + 1 for k in spread], 70),
        ("blocks", [17 * k for k in spread], 1100),
    ]


def softmax_shapes(rows: Tensor) -> list[tuple[str, Tensor, int]]:
    """The rows of a matrix along the last dim, along the first, and in the middle."""
    return [
        ("last dim", rows, 1),
        ("first dim", rows.t().contiguous(), 0),
        ("middle dim", torch.stack([rows.t(), rows.t()], 0).contiguous(), 1),
        ("transposed", rows.t().contiguous().t(), 1),
    ]


def first_row(t: Tensor, dim: int) -> Tensor:
    """Of softmax_shapes, the rows again."""
    return t if dim == 1 and t.dim() == 2 else t.t() if t.dim() == 2 else t[1].t()


def test_along_a_dim(along: Row, dtype: torch.dtype, isa: str) -> None:
    for options, pairs in ALONG[along.name].items():
        for k, (values, result) in enumerate(pairs):
            x, y = tensor(values, dtype), tensor(result, dtype)
            about = f"{along.name}{options} {dtype} {isa}, row {k}"
            compare(f"{about}, 1-D", x, along.op(x, 0, *options), y)
            for name, at, length in paddings(len(values)):
                padded = torch.full((length,), -INF, dtype=dtype).index_copy_(0, torch.tensor(at), x)
                hidden = 0.0 if not y.any() and options[1:] == (True,) else HIDDEN[along.name]
                expected = torch.full((length,), hidden, dtype=dtype).index_copy_(0, torch.tensor(at), y)
                if y.isnan().any():
                    expected.fill_(NAN)
                # Among 20 plain rows, which nothing in this one may reach.
                rows = torch.zeros(21, length, dtype=dtype)
                rows[13] = padded
                plain_result = along.op(torch.zeros(length, dtype=dtype), 0, *options)
                for shape, t, dim in softmax_shapes(rows):
                    got = first_row(along.op(t, dim, *options), dim)
                    what = f"{about} {values}, {name}, {shape}"
                    compare(what, rows[13], got[13], expected)
                    others = torch.arange(21) != 13
                    # The sum of equal terms is exact, so these are the same but for the last rounding.
                    error = (got[others].double() - plain_result.double()).abs().max() / plain_result[0].abs().double()
                    assert length == 1 or error <= torch.finfo(dtype).eps, f"{what}: another row is off by {error}"


def test_plain_rows(along: Row, dtype: torch.dtype, isa: str) -> None:
    """What the rows beside the special ones are held to."""
    for length in (1, 2, 3, 7, 64, 70, 1100):
        y = along.op(torch.zeros(length, dtype=dtype), 0).double()
        expected = along.reference(torch.zeros(length, dtype=torch.float64), 0)
        assert ((y - expected).abs() <= torch.finfo(dtype).eps * expected.abs()).all(), f"{along.name} {dtype} {isa} {length}"


def test_backward_along_a_dim(along: Row, dtype: torch.dtype, isa: str) -> None:
    all_options, table = ALONG_BACKWARD[along.name]
    for options, (k, columns) in itertools.product(all_options, enumerate(table)):
        y, dy, dx = (tensor(column, dtype) for column in columns)
        for name, at, length in paddings(len(y)):
            index = torch.tensor(at)
            rows = [torch.full((21, length), fill, dtype=dtype) for fill in (HIDDEN[along.name], 0.0, 0.0)]
            for full, part in zip(rows, (y, dy, dx), strict=True):
                full[13] = full[13].index_copy(0, index, part)
            if not dy.isfinite().all() or (along.name == "softmax" and not dx.isfinite().all()):
                # The sum is NaN or infinite, and so is its product with 0 where nothing was.
                rows[2][13] = torch.full((length,), NAN, dtype=dtype).index_copy_(0, index, dx)
            for (shape, y_, dim), (_, dy_, _) in zip(softmax_shapes(rows[0]), softmax_shapes(rows[1]), strict=True):
                got = first_row(along.backward_op(dy_, y_, dim, *options), dim)
                # The sign of a zero times a difference of either sign means nothing here: adding 0 takes it away.
                what = f"{along.name} gradient {dtype} {isa}, row {k}, {name}, {shape}"
                compare(what, dy, got + 0.0, rows[2] + 0.0)


def test_masked_rows(dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Softmax alone: rows that are masked altogether, anywhere among others, are 0 with a gradient of 0, to which NaN of
    neighbours does not come; the others are what they are without them."""
    for length, (temperature, count) in itertools.product((2, 3, 10, 33, 64, 129, 1030), ((1.0, 7), (0.7, 20))):
        x = torch.randn(count, length, generator=generator, dtype=torch.float64).to(dtype)
        x[torch.rand(x.shape, generator=generator) < 0.3] = -INF
        x[:, -1] = 1.0
        masked = torch.arange(count) % 3 == 1
        x[masked] = -INF
        x[2] = torch.where(torch.arange(length) == length // 2, NAN, -INF)
        dy = torch.randn(count, length, generator=generator, dtype=torch.float64).to(dtype)
        for name, rows, dim in softmax_shapes(x):
            what = f"softmax {dtype} {isa}, {count} rows of {length}, {name}"
            leaf = rows.detach().clone().requires_grad_()
            y = fastact.softmax(leaf, dim, temperature=temperature, masked_rows="zero")
            usual = fastact.softmax(rows, dim, temperature=temperature)
            expected = first_row(usual, dim).masked_fill(masked[:, None], 0)
            compare(what, x, first_row(y.detach(), dim), expected)
            assert first_row(usual, dim)[masked].isnan().all()
            grads = next(t for n, t, _ in softmax_shapes(dy) if n == name)
            (dx,) = torch.autograd.grad(y, leaf, grads)
            got = first_row(dx, dim)
            assert (got[masked] == 0).all(), f"{what}: the gradient of a masked row"
            assert got[2].isnan().all(), f"{what}: the gradient of a row with NaN"
            usual_dx = torch.ops.fastact.softmax_backward(grads, usual, dim, temperature)
            compare(f"{what}, gradient", x, got[~masked], first_row(usual_dx, dim)[~masked])


def test_few_elements_along_a_dim(along: Row, dtype: torch.dtype, isa: str) -> None:
    what = f"{along.name} {dtype} {isa}"
    for shape, dim in [((3, 0), 0), ((3, 0), 1), ((0, 3), 1), ((0,), 0), ((2, 0, 3), -1)]:
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        y = along.op(x, dim)
        assert y.shape == x.shape
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape
    one = along.reference(torch.zeros(1), 0).item()
    for value, result in [(5.0, one), (-0.0, one), ("-max", one), (INF, NAN), (-INF, NAN), (NAN, NAN)]:
        for shape in [(), (1,), (1, 1)]:
            x = tensor([value], dtype).reshape(shape)
            for dim in (0, -1):
                compare(f"{what} of {value}", x, along.op(x, dim), tensor([result], dtype).reshape(shape))


# ---- NaN in every lane -----------------------------------------------------------------------------------------------

LONGEST = 70  # more than four vectors of every type


def with_nan_at_each(values: Tensor) -> Tensor:
    """values as rows of a square, with NaN on the diagonal."""
    return values.expand(len(values), -1).clone().fill_diagonal_(NAN)


def test_nan_in_every_lane(row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    parameters = tuple(row.parameters.values())
    what = describe(row, parameters, dtype, isa)
    lone = torch.tensor([NAN], dtype=dtype)
    # Positive, so that the gradient passes through every activation.
    values = (torch.rand(LONGEST, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    grads = (torch.rand(LONGEST, generator=generator, dtype=torch.float64) + 0.5).to(dtype)
    y = row.op(values, *parameters)
    dx = row.backward_op(grads, y, *parameters)
    # What one element gives alone. Plain torch says whether that is NaN: some activations let the gradient pass there.
    lone_dx = torch.stack([row.backward_op(g, lone[0], *parameters) for g in grads])
    plain_dx = plain_gradient(row, lone.expand(LONGEST), grads, parameters)
    assert torch.equal(lone_dx.isnan(), plain_dx.isnan()), what

    for n in range(1, LONGEST + 1):
        x = with_nan_at_each(values[:n])
        compare(f"{what}, length {n}", x, torch.stack([row.op(r, *parameters) for r in x]), with_nan_at_each(y[:n]))

        dy = with_nan_at_each(grads[:n])
        saved = y[:n].clone()
        actual = torch.stack([row.backward_op(r, saved, *parameters) for r in dy])
        compare(f"{what}, length {n}, dy", dy, actual, with_nan_at_each(dx[:n]))

        saved = with_nan_at_each(y[:n])
        g = grads[:n].clone()
        actual = torch.stack([row.backward_op(g, r, *parameters) for r in saved])
        compare(f"{what}, length {n}, saved", saved, actual, torch.where(saved.isnan(), lone_dx[:n], dx[:n]))


@pytest.mark.parametrize("rest", ["finite", "-inf"])
def test_nan_in_every_lane_along_a_dim(along: Row, rest: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Rows with a NaN in turn with clean rows: all NaN, and as without the others."""
    lengths = [*range(1, LONGEST + 1), 1023, 1030]
    for n in lengths:
        clean = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        spoilt = with_nan_at_each(clean if rest == "finite" else torch.full_like(clean, -INF))[-LONGEST:]
        rows = torch.stack([spoilt, clean.expand_as(spoilt)], 1).flatten(0, 1)
        y = along.op(clean, 0)
        what = f"{along.name} {dtype} {isa}, length {n}"

        def expected(along: Tensor, across: Tensor) -> tuple[Tensor, Tensor]:
            """Rows and columns; on CUDA columns may differ from rows in the last digit, but not through their neighbours."""
            pair = (along, along if DEVICE == "cpu" else across)
            return tuple(torch.stack([torch.full_like(r, NAN), r]).repeat(len(spoilt), 1) for r in pair)  # noqa: B023

        def columns(of: Tensor) -> Tensor:
            return of.expand_as(rows).t().contiguous()  # noqa: B023

        in_rows, in_columns = expected(y, along.op(columns(clean), 0)[:, 0])
        compare(f"{what}, rows", rows, along.op(rows, 1), in_rows)
        compare(f"{what}, columns", rows, along.op(rows.t().contiguous(), 0).t(), in_columns)

        grad = torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
        dx = along.backward_op(grad, y, 0)
        in_rows, in_columns = expected(dx, along.backward_op(columns(grad), columns(y), 0)[:, 0])
        clean_grads, clean_ys = grad.expand_as(rows).contiguous(), y.expand_as(rows).contiguous()
        for part, dy, saved in [
            ("dy", clean_grads.where(~rows.isnan(), NAN), clean_ys),
            ("saved", clean_grads, clean_ys.where(~rows.isnan(), NAN)),
        ]:
            wanted = [in_rows, in_columns]
            if (along.name, part) == ("log_softmax", "saved"):
                # Its sum is not one of y: a NaN stays where it is.
                wanted = [w[1].expand_as(rows).where(~rows.isnan(), NAN) for w in wanted]
            actual = along.backward_op(dy, saved, 1)
            compare(f"{what}, {part}, rows", rows, actual, wanted[0])
            actual = along.backward_op(dy.t().contiguous(), saved.t().contiguous(), 0).t()
            compare(f"{what}, {part}, columns", rows, actual, wanted[1])


def test_nan_shows_at_the_ends_of_long_inputs(dtype: torch.dtype, isa: str) -> None:
    """Beyond the size from which several threads share the work."""
    torch.set_num_threads(2)
    n = 100003
    for at in (0, 1, n // 2, n - 2, n - 1):
        x = torch.zeros(n, dtype=dtype)
        x[at] = NAN
        for row in ALL_ROWS:
            arguments = (0,) if row in ALONG_DIM else tuple(row.parameters.values())
            nan = row.op(x, *arguments).isnan()
            where = nan.nonzero().flatten().tolist() if row not in ALONG_DIM else [at] * bool(nan.all())
            assert where == [at], f"{row.name} {dtype} {isa}: NaN at {at} of {n} shows at {where[:5]}"
