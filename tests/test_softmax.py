"""Softmax and its relatives against their formulas in a wider type; one sum order in every layout; torch's dim and dtype.

On CUDA there are two orders: of rows whose elements are neighbours in memory, and of rows that lie across memory, which also
depends on how many of those lie side by side. Each is the same wherever and in however large a tensor the rows lie.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ALONG_DIM, BEST_ISA, DEVICE, DTYPES, INTEGER, ROOT, THREAD_COUNTS, bits, softmax_slack
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fastact
from fastact._registry import Row

COLUMNS = 64  # kSoftmaxColumns: columns of one unit of work
# Of the sum order in softmax.h.
SUM_LANES = 64


def sum_block(dtype: torch.dtype) -> int:
    return 512 if dtype == torch.float64 else 1024


softmax = torch.ops.fastact.softmax
softmax_backward = torch.ops.fastact.softmax_backward

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-24,
    torch.float16: 2.0**-24,
}  # of the compute type


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Unless a test asks for more: most inputs are small, and on a busy machine threads wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def one_element_warning_said() -> None:
    """It comes once per process: before the tests, so that none of them meets it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastact.softmax(torch.zeros(1), 0)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str, slack: Tensor | None = None) -> None:
    """With a slack: the same to within it."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    wrong = bits(actual) != bits(expected)
    if slack is not None:
        wrong &= ~((actual.double() - expected.double()).abs() <= slack)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: "
            f"expected {expected[at].item()!r}, got {actual[at].item()!r}"
        )


@dataclass(frozen=True)
class Member:
    """An op with its options: what is tested as softmax is."""

    name: str
    temperature: float = 1.0
    masked_rows: str = "nan"

    @property
    def row(self) -> Row:
        return next(row for row in ALONG_DIM if row.name == self.name)

    @property
    def logarithm(self) -> bool:
        return self.name == "log_softmax"

    def __str__(self) -> str:
        return self.name + f" at {self.temperature}" * (self.temperature != 1)

    def forward(self, x: Tensor, dim: int) -> Tensor:
        options = (self.temperature, self.masked_rows == "zero") if self.row.parameters else ()
        return self.row.op(x, dim, *options)

    def backward(self, dy: Tensor, y: Tensor, dim: int) -> Tensor:
        return self.row.backward_op(dy, y, dim, *(self.temperature,) if self.row.parameters else ())

    def function(self, x: Tensor, dim: int) -> Tensor:
        options = {"temperature": self.temperature, "masked_rows": self.masked_rows} if self.row.parameters else {}
        return self.row.function(x, dim, **options)

    def slack(self, dtype: torch.dtype, dim: int, y: Tensor, dy: Tensor | None = None) -> Tensor | None:
        slack = softmax_slack(dtype, dim, y, dy, logarithm=self.logarithm)
        return None if slack is None else slack * max(1, 1 / self.temperature)


SOFTMAX = Member("softmax")
# Below 1 the distances grow, above they shrink; neither has an exact reciprocal.
MEMBERS = [*map(Member, [row.name for row in ALONG_DIM]), Member("softmax", 0.3, "zero"), Member("softmax", 7.0)]
each_member = pytest.mark.parametrize("member", MEMBERS, ids=str)

# ---- The reference and its bounds ------------------------------------------------------------------------------------

# float64 is judged in the processor's extended type, all else in float64.
EXTENDED = np.longdouble
Array = np.ndarray


def widened(t: Tensor) -> Array:
    wide = t.detach().double().cpu().numpy()
    return wide.astype(EXTENDED) if t.dtype == torch.float64 else wide


def needs_extended(dtype: torch.dtype) -> None:
    if dtype == torch.float64 and np.finfo(EXTENDED).nmant < 60:
        pytest.skip("no floating-point type here is wider than float64, so that nothing can judge it")


def exact_softmax(x: Array, temperature: float = 1.0) -> tuple[Array, Array, Array]:
    """For rows in the last dim: y, |x - max| / temperature (0 where x is -inf and y is 0), and its mean weighted by y."""
    distance = (x.max(-1, keepdims=True) - x) / x.dtype.type(temperature)
    term = np.exp(-distance)
    y = term / term.sum(-1, keepdims=True)
    distance = np.where(np.isinf(distance), 0, distance)
    return y, distance, (y * distance).sum(-1, keepdims=True)


def exact(x: Array, member: Member, dtype: torch.dtype, across: bool = False) -> tuple[Array, Array]:
    """For rows in the last dim: y, and what a result may be off."""
    y, distance, mean_distance = exact_softmax(x, member.temperature)
    if not member.logarithm:
        return y, forward_bound(y, distance, mean_distance, dtype, across, 1 if member.temperature == 1 else 3)
    below = x.max(-1, keepdims=True) - x
    logarithm = np.log(np.exp(-below).sum(-1, keepdims=True))
    return -below - logarithm, log_bound(below, logarithm, mean_distance, dtype, across)


def log_bound(below: Array, logarithm: Array, mean_distance: Array, dtype: torch.dtype, across: bool) -> Array:
    """Of log_softmax: x - max and the result are rounded once each, and the logarithm is good to 2.0 ULP, which is at most 4
    units of it. What the sum is off relatively, its logarithm is absolutely: as in forward_bound, 3 for an exponential and
    its part of the sum, and what vanishes of each term.
    """
    u = UNIT[dtype]
    n = below.shape[-1]
    constant, factor = (16, 2.5) if DEVICE == "cuda" and dtype.itemsize == 2 else (3, 1)
    tiny = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    size = np.where(np.isinf(below), 0, 2 * below + logarithm)
    bound = u * (size + 4 * logarithm + factor * mean_distance + constant + additions(n, dtype, across)) + 2 * n * tiny
    if dtype.itemsize == 2:
        bound = bound + rounding(size + bound, dtype)
    return bound


def additions(n: int, dtype: torch.dtype, across: bool = False) -> int:
    """How many roundings an element meets on its way into the sum: its lane's partial sum, the tree, the total's rounding.

    On CUDA, at most: in a thread 10 (16 where rows lie across memory), 5 in a warp, 4 and 4 by halves in a block and a cluster
    (15 and 15 one after the other in the longest rows and across memory), then 1/32 of the chunks that the longest have, and 5.
    """
    if DEVICE == "cuda":
        return min(n - 1, 55 + n // 2**13 if across else 45 + n // 2**18)
    lane = min(-(-n // SUM_LANES), sum_block(dtype) // SUM_LANES) - 1
    blocks = -(-n // sum_block(dtype)) if dtype == torch.float64 else 0  # the total is kept in double: exact enough for float
    return lane + int(math.log2(SUM_LANES)) + 1 + blocks


def rounding(value: Array, dtype: torch.dtype) -> Array:
    """Half the distance of neighbours of `dtype` at a value: the error of one rounding."""
    info = torch.finfo(dtype)
    exponent = np.frexp(np.maximum(np.abs(value), info.tiny).astype(np.float64))[1] - 1
    return np.ldexp(info.eps / 2, exponent)


def vanishing_distance(dtype: torch.dtype) -> float:
    """From here below the maximum, terms may be 0: just before exp(-distance) becomes subnormal."""
    return 708.396 if dtype == torch.float64 else 87.3365


def forward_bound(
    y: Array, distance: Array, mean_distance: Array, dtype: torch.dtype, across: bool = False, roundings: int = 1
) -> Array:
    """What a result may be off.

    Rounding x - max is a relative error of |x - max| units in the term, as are the roundings of 1 / temperature and of the
    product; so it is in each term of the sum, where terms count by their weight. 8 units more are for two exponentials (2.2
    each), the reciprocal and the product, and one for every addition, as if all had the same sign. Terms that vanish count as
    0, and a subnormal result is off by up to one unit of that range. A 16-bit type then rounds once more, so that its result
    is the neighbour of the exact value on one side or the other. On CUDA these take an approximate exponential and
    reciprocal: 4 units each, and 1.5 |x - max| from the product with log2(e).
    """
    u = UNIT[dtype]
    n = y.shape[-1]
    constant, factor = (16, 2.5) if DEVICE == "cuda" and dtype.itemsize == 2 else (8, 1)
    smallest_normal = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal
    factor += roundings - 1
    bound = y * u * (factor * (distance + mean_distance) + constant + additions(n, dtype, across))
    bound = bound + 2 * (smallest_normal * 2 * u)
    bound = np.where(distance * (1 + 4 * u) > vanishing_distance(dtype), y + bound, bound)
    if dtype.itemsize == 2:
        bound = bound + rounding(y + bound, dtype)
    return bound


def backward_bound(
    dy: Array, y: Array, dtype: torch.dtype, across: bool = False, member: Member = SOFTMAX
) -> tuple[Array, Array]:
    """The gradient and what it may be off.

    The sum of dy y rounds each product and each addition, in proportion to the magnitudes; the difference and the product with
    y round once each, and so do 1 / temperature and the product with that. 16-bit types round once more, at the end.
    """
    u = UNIT[dtype]
    if member.logarithm:
        return log_backward_bound(dy, y, dtype, across)
    dot = (dy * y).sum(-1, keepdims=True)
    dx = y * (dy - dot)
    sum_error = (np.abs(dy * y)).sum(-1, keepdims=True) * u * (additions(y.shape[-1], dtype, across) + 2)
    smallest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal * 2 * u
    # 1.001: the roundings of roundings.
    roundings = 2 if member.temperature == 1 else 4
    bound = 1.001 * np.abs(y) * (sum_error + roundings * u * np.abs(dy - dot)) + (2 + y.shape[-1]) * smallest
    t = dy.dtype.type(member.temperature)
    dx, bound = dx / t, bound / t + (0 if t == 1 else smallest)
    if dtype.itemsize == 2:
        bound = bound + rounding(np.abs(dx) + bound, dtype)
    return dx, bound


def log_backward_bound(dy: Array, y: Array, dtype: torch.dtype, across: bool) -> tuple[Array, Array]:
    """Of log_softmax, dy - exp(y) sum(dy): the additions, an exponential (on CUDA of 16-bit types as in forward_bound), the
    product and the difference. Probabilities below the normal range count as 0.
    """
    u = UNIT[dtype]
    p = np.exp(y)
    total, size = dy.sum(-1, keepdims=True), np.abs(dy).sum(-1, keepdims=True)
    dx = dy - p * total
    approximate = DEVICE == "cuda" and dtype.itemsize == 2
    exponential = 4 + 1.5 * np.where(np.isinf(y), 0, np.abs(y)) if approximate else 3
    smallest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    bound = 1.001 * u * (p * (size * additions(y.shape[-1], dtype, across) + (exponential + 1) * np.abs(total)) + np.abs(dx))
    bound = bound + smallest * (1 + np.abs(total))
    if dtype.itemsize == 2:
        bound = bound + rounding(np.abs(dx) + bound, dtype)
    return dx, bound


def check(actual: Tensor, expected: Array, bound: Array, x: Array, what: str) -> None:
    with np.errstate(invalid="ignore"):
        error = np.abs(widened(actual) - expected)
    error = np.where(np.isinf(expected) & (widened(actual) == expected), 0, error)
    # What is beyond the largest number of the type rounds to infinity.
    beyond = np.abs(expected) + bound > torch.finfo(actual.dtype).max
    error = np.where(beyond & (widened(actual) == np.copysign(np.inf, expected)), 0, error)
    wrong = ~(error <= bound)
    if wrong.any():
        at = np.unravel_index(np.argmax(np.where(wrong, error / bound, 0)), wrong.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} beyond the bound, worst at {tuple(map(int, at))}: x = {x[at]!r}, "
            f"expected {expected[at]!r}, got {actual[tuple(map(int, at))].item()!r}, off by {error[at] / bound[at]:.3g} bounds"
        )


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3


def spread(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 1e4 - 5e3


def narrow(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """All terms count: where sums of many go wrong."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) / 8


def constant(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.randn((*shape[:-1], 1), generator=generator, dtype=torch.float64).expand(shape)


def leader(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One element above many equal ones, whose additions all round the same way."""
    x = torch.zeros(shape, dtype=torch.float64) - torch.rand((*shape[:-1], 1), generator=generator, dtype=torch.float64) * 3
    x[..., 0] = 0
    return x


def offset(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """1e7, or the largest power of ten that float16 has."""
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + (1e4 if dtype == torch.float16 else 1e7)


def masked(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A third of them -inf, but not the first."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 1 / 3
    mask[..., 0] = False
    return x.masked_fill(mask, -math.inf)


def vanishing(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """One element, and others at the distance at which terms vanish."""
    x = -vanishing_distance(dtype) * (1 + 1e-6 * torch.randn(shape, generator=generator, dtype=torch.float64))
    x[..., 0] = 0
    return x


def subnormal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of the dtype, of both signs, one in four larger."""
    tiny = torch.finfo(dtype).tiny
    x = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * tiny
    return torch.where(torch.rand(shape, generator=generator) < 0.25, torch.randn(shape, generator=generator).double(), x)


PROFILES = [normal, spread, narrow, constant, leader, offset, masked, vanishing, subnormal]
ROWS = 3
SHORT = list(range(1, 301))
LONG = [511, 512, 513, 1000, 1023, 1024, 1025, 2047, 2049, 4095, 4097, 8193, 30576, 131073]


# Of a member other than softmax itself, whose loops are the same.
FEWER = [*range(1, 40), 63, 64, 65, 100, 129, 257, 300]
FEWER_LONG = [513, 1000, 1025, 2049, 8193, 30576]


@functools.cache
def cases(
    profile: Callable[..., Tensor], lengths: str, dtype: torch.dtype, seed: int, member: Member = SOFTMAX
) -> list[tuple[Tensor, Array, Array]]:
    """For every length: x, y, and the bound; made once for all instruction sets."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    result = []
    short, long = (SHORT, LONG) if member == SOFTMAX else (FEWER, FEWER_LONG)
    for n in short if lengths == "short" else long:
        x = profile((ROWS if n < 5000 else 1, n), dtype, generator).to(dtype).contiguous()
        result.append((x, *exact(widened(x), member, dtype)))
    return result


@each_member
@pytest.mark.parametrize("lengths", ["short", "long"])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda f: f.__name__)
def test_forward(
    profile: Callable[..., Tensor], lengths: str, member: Member, dtype: torch.dtype, isa: str, generator: torch.Generator
) -> None:
    needs_extended(dtype)
    for x, y, bound in cases(profile, lengths, dtype, generator.initial_seed(), member):
        what = f"{member} {dtype} {isa} {profile.__name__}, {len(x)} rows of {x.shape[1]}"
        check(member.forward(x, 1), y, bound, x, what)


def sum_tolerance(n: int) -> float:
    """The reciprocal and the total round once each (1.2e-7 together), and the roundings of the results hardly add up: the rest
    is for the sums within a block, so that it does not grow with the length. On CUDA the total is a float: every addition on an
    element's way may round by half a unit in the same direction.
    """
    return 4e-7 if DEVICE == "cpu" else (additions(n, torch.float32) + 3) * 2.0**-24


@pytest.mark.parametrize("lengths", ["short", "long"])
@pytest.mark.parametrize("profile", PROFILES, ids=lambda f: f.__name__)
def test_row_sums(profile: Callable[..., Tensor], lengths: str, isa: str, generator: torch.Generator) -> None:
    for x, *_ in cases(profile, lengths, torch.float32, generator.initial_seed()):
        error = (softmax(x, 1).double().sum(1) - 1).abs().max()
        what = f"softmax float32 {isa} {profile.__name__}, {len(x)} rows of {x.shape[1]}"
        assert error <= sum_tolerance(x.shape[1]), f"{what}: sum is off by {error:.2e}"


@pytest.mark.parametrize("n", [10, 64, 65, 300, 1000, 1024, 4096])
def test_row_sums_of_equal_elements(n: int, isa: str) -> None:
    """One element above many equal ones: all additions to a partial sum round by the same bits of the same number."""
    c = torch.linspace(0.001, 3, 1000)
    x = (-c[:, None]).repeat(1, n)
    x[:, 0] = 0
    error = (softmax(x, 1).double().sum(1) - 1).abs()
    worst = int(error.argmax())
    assert error[worst] <= sum_tolerance(n), (
        f"softmax float32 {isa}, 0 and {n - 1} times {-c[worst]}: sum is off by {error[worst]:.2e}"
    )


@each_member
@pytest.mark.parametrize("lengths", ["short", "long"])
def test_backward(lengths: str, member: Member, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """From the saved y, rounded as it is, and dy: what an exact backward would make of them."""
    needs_extended(dtype)
    for profile in [normal, narrow, spread]:
        for x, *_ in cases(profile, lengths, dtype, generator.initial_seed(), member):
            y = member.forward(x, 1)
            scale = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[: len(x), None]
            dy = (torch.randn(x.shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
            dx, bound = backward_bound(widened(dy), widened(y), dtype, member=member)
            what = f"{member} gradient {dtype} {isa} {profile.__name__}, {len(x)} rows of {x.shape[1]}"
            check(member.backward(dy, y, 1), dx, bound, widened(dy), what)
            leaf = x.clone().requires_grad_()
            check(torch.autograd.grad(member.function(leaf, 1), leaf, dy)[0], dx, bound, widened(dy), f"{what}, autograd")


@each_member
@pytest.mark.parametrize("n", [2, 5, 10, 65, 1030])
def test_inner_sizes(n: int, member: Member, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Rows that are columns in memory, in the first dim, the middle and, with a size-1 dim, before the last."""
    needs_extended(dtype)
    every = range(1, 131) if n < 100 and member == SOFTMAX else []
    for inner in every or [1, 2, 7, COLUMNS - 1, COLUMNS, COLUMNS + 1, 130]:
        x = (torch.randn((2, n, inner), generator=generator, dtype=torch.float64) * 3).to(dtype)
        y, bound = (np.moveaxis(a, 2, 1) for a in exact(np.moveaxis(widened(x), 1, 2), member, dtype, across=True))
        what = f"{member} {dtype} {isa}, {n} rows of inner size {inner}"
        check(member.forward(x, 1), y, bound, x, f"{what}, dim 1")
        check(member.forward(x, -2), y, bound, x, f"{what}, dim -2")
        check(member.forward(x[0], 0), y[0], bound[0], x[0], f"{what}, dim 0")
        check(member.forward(x[0], -2), y[0], bound[0], x[0], f"{what}, dim -2 of 2")
        check(member.forward(x[1, :, None], 0), y[1, :, None], bound[1, :, None], x[1, :, None], f"{what}, dim 0 of 3")

        saved = member.forward(x, 1)
        dy = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
        wide = [np.moveaxis(widened(t), 1, 2) for t in (dy, saved)]
        dx, bound = (np.moveaxis(a, 2, 1) for a in backward_bound(*wide, dtype, across=True, member=member))
        check(member.backward(dy, saved, 1), dx, bound, widened(dy), f"{what}, gradient")


# Worked out by hand; the third by e^1, e^2, e^3 over their sum, to 17 digits.
LITERAL = [
    ([0.0, math.log(2), math.log(3)], [1 / 6, 1 / 3, 1 / 2]),
    ([math.log(8), 0.0], [8 / 9, 1 / 9]),
    ([1.0, 2.0, 3.0], [0.09003057317038046, 0.24472847105479764, 0.6652409557748219]),
    ([0.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]),
    ([-1000.0, -1000.0 + math.log(4)], [1 / 5, 4 / 5]),
    ([math.log(k) for k in range(1, 101)], [k / 5050 for k in range(1, 101)]),
]


@pytest.mark.parametrize("k", range(len(LITERAL)))
def test_literal_rows(k: int, isa: str) -> None:
    x, y = (torch.tensor(values, dtype=torch.float64) for values in LITERAL[k])
    # The rounding of the inputs, whose largest is 1000, and of a few steps.
    tolerance = 2.0**-53 * (x.abs().max() + 20)
    error = ((fastact.softmax(x, 0) - y) / y).abs().max()
    assert error <= tolerance, f"{LITERAL[k][0][:4]}: off by {error}, {isa}"
    single = fastact.softmax(x.float(), 0).double()
    assert ((single - y) / y).abs().max() <= 2.0**-24 * (x.abs().max() + 20)


@pytest.mark.parametrize("k", range(len(LITERAL)))
def test_literal_rows_of_log_softmax(k: int, isa: str) -> None:
    x, y = (torch.tensor(values, dtype=torch.float64) for values in LITERAL[k])
    for dtype, unit in ((torch.float64, 2.0**-53), (torch.float32, 2.0**-24)):
        error = (fastact.log_softmax(x.to(dtype), 0).double() - y.log()).abs().max()
        # The rounding of the inputs, whose largest is 1000, and of a few steps with numbers up to 9.
        assert error <= unit * (x.abs().max() + 40), f"{LITERAL[k][0][:4]}: off by {error}, {dtype} {isa}"


@pytest.mark.parametrize("shape", [(), (1,), (3, 1)])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_temperature_does_not_widen_the_result(
    shape: tuple[int, ...], wide: torch.dtype, dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = torch.randn(3, 4, generator=generator).to(dtype)
    temperature = torch.full(shape, 2.0, dtype=wide).requires_grad_()
    y = fastact.softmax(x, 1, temperature=temperature)
    assert y.dtype is dtype
    assert torch.equal(y, fastact.softmax(x, 1, temperature=temperature.to(dtype)))  # halving is exact
    assert torch.autograd.grad(y[:, 0].sum(), temperature)[0].dtype is wide
    for other in (torch.float16, torch.float64):
        assert fastact.softmax(x, 1, other, temperature).dtype is other


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_literal_rows_at_a_temperature(temperature: float, isa: str) -> None:
    """exp(log(k) / T): the squares of 1 to 10, and their roots."""
    x = torch.arange(1, 11, dtype=torch.float64).log()
    powers = torch.arange(1, 11, dtype=torch.float64) ** (1 / temperature)
    y = fastact.softmax(x, 0, temperature=temperature)
    # Distances of up to log(10) / T, with three roundings each, and the rounding of x.
    assert ((y - powers / powers.sum()) / y).abs().max() <= 2.0**-53 * 50, isa


def test_literal_gradient(isa: str) -> None:
    """y = (1/6, 1/3, 1/2) and dy = (1, 0, 0): dx_j = y_j (dy_j - 1/6)."""
    x = torch.tensor(LITERAL[0][0], dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(fastact.softmax(x, 0)[0], x)
    # A few roundings of numbers below 1.
    assert (dx - torch.tensor([5 / 36, -1 / 18, -1 / 12], dtype=torch.float64)).abs().max() <= 1e-15


# ---- Temperature -----------------------------------------------------------------------------------------------------

# torch itself calls it, the first time that forward mode is used.
jit_is_deprecated = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


def ways(temperature: float, masked_rows: str, dim: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """To call softmax with its options."""
    masked_zero = masked_rows == "zero"
    return {
        "function": lambda x: fastact.softmax(x, dim, temperature=temperature, masked_rows=masked_rows),
        "by position": lambda x: fastact.softmax(x, dim, None, temperature, masked_rows),
        "module": fastact.Softmax(dim, temperature, masked_rows),
        "op": lambda x: softmax(x, dim, temperature, masked_zero),
        "Function": lambda x: fastact.autograd.Softmax.apply(x, dim, temperature, masked_zero),
    }


@pytest.mark.parametrize("masked_rows", ["nan", "zero"])
@pytest.mark.parametrize("temperature", [1, 0.5, 3.0])
def test_every_way_to_call(temperature: float, masked_rows: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    x = normal((4, 9), dtype, generator).to(dtype)
    x[2] = -math.inf
    dy = normal((4, 9), dtype, generator).to(dtype)
    for dim in (0, 1):
        y = softmax(x, dim, temperature, masked_rows == "zero")
        dx = softmax_backward(dy, y, dim, temperature)
        for name, call in ways(temperature, masked_rows, dim).items():
            leaf = x.clone().requires_grad_()
            torch.testing.assert_close(call(x), y, rtol=0, atol=0, equal_nan=True, msg=name)
            (got,) = torch.autograd.grad(call(leaf), leaf, dy)
            torch.testing.assert_close(got, dx, rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_temperature_of_1_changes_nothing(dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    for shape, dim in [((70, 10), 1), ((5, 1000), 1), ((100, 70), 0)]:
        x, dy = (normal(shape, dtype, generator).to(dtype) for _ in range(2))
        y = softmax(x, dim)
        what = f"softmax {dtype} {isa} {shape}"
        for temperature in (1, 1.0, True):
            assert_same_bits(fastact.softmax(x, dim, temperature=temperature), y, what)
        assert_same_bits(softmax_backward(dy, y, dim, 1.0), softmax_backward(dy, y, dim), f"{what}, gradient")
        # A power of two is divided by without a rounding, in loops that are not those of 1.
        assert_same_bits(softmax(2 * x, dim, 2.0), y, f"{what}, of twice x at a temperature of 2")
        doubled = softmax_backward(dy, y, dim, 0.5)
        if dtype.itemsize > 2:  # where a subnormal result is rounded after it is doubled
            assert_same_bits(doubled / 2, softmax_backward(dy, y, dim), f"{what}, gradient at a temperature of 1/2")


@jit_is_deprecated
@pytest.mark.parametrize("masked_rows", ["nan", "zero"])
@pytest.mark.parametrize("temperature", [0.4, 2.5])
@pytest.mark.parametrize("way", ["function", "op", "Function"])
def test_gradients_at_a_temperature(way: str, temperature: float, masked_rows: str, generator: torch.Generator) -> None:
    forward_mode = way != "Function"  # which has no jvp
    for shape, dim in [((3, 4), 1), ((3, 4), 0), ((2, 3, 2), 1)]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        call = ways(temperature, masked_rows, dim)[way]
        assert gradcheck(
            call, x, check_forward_ad=forward_mode, check_batched_grad=True, check_batched_forward_grad=forward_mode
        )
        assert gradgradcheck(call, x, check_fwd_over_rev=forward_mode, check_batched_grad=True)
        y = torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()
        dy = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        def backward(dy: Tensor, y: Tensor, dim: int = dim) -> Tensor:
            return softmax_backward(dy, y, dim, temperature)

        assert gradcheck(backward, (dy, y), check_forward_ad=True)
        assert gradgradcheck(backward, (dy, y), check_fwd_over_rev=True)


def test_second_order_of_masked_rows(generator: torch.Generator) -> None:
    """All of it is 0 there, and what it is without them elsewhere."""
    x, weight = (torch.randn((3, 4), generator=generator, dtype=torch.float64) for _ in range(2))
    x[1] = -math.inf
    found = []
    for part in (slice(None), [0, 2]):
        leaf = x[part].clone().requires_grad_()
        y = fastact.softmax(leaf, 1, temperature=0.7, masked_rows="zero")
        (dx,) = torch.autograd.grad(y, leaf, weight[part], create_graph=True)
        (ddx,) = torch.autograd.grad((dx * dx).sum(), leaf)
        found.append((y.detach(), dx.detach(), ddx))
    for masked, plain in zip(*found, strict=True):
        assert (masked[1] == 0).all()
        assert_same_bits(masked[[0, 2]], plain, "rows beside a masked one")


@pytest.mark.parametrize("masked_rows", ["nan", "zero"])
def test_temperature_as_a_tensor(masked_rows: str, generator: torch.Generator) -> None:
    """In plain torch, so that it has a gradient; one for all, or one for every row."""
    x = torch.randn((3, 4), generator=generator, dtype=torch.float64).requires_grad_()

    def call(x: Tensor, temperature: Tensor) -> Tensor:
        return fastact.softmax(x, 1, temperature=temperature, masked_rows=masked_rows)

    for shape in [(), (1,), (3, 1)]:
        temperature = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5).requires_grad_()
        # Some roundings of numbers below 1.
        assert (call(x, temperature) - torch.softmax(x / temperature, 1)).abs().max() <= 1e-15
        assert gradcheck(call, (x, temperature))
    # What is masked stays out of the gradient of the temperature.
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    masked = x.detach().clone()
    masked[1, 2:] = -math.inf
    if masked_rows == "zero":
        masked[2] = -math.inf
    y = call(masked, temperature)
    assert (y.detach() - fastact.softmax(masked, 1, temperature=0.7, masked_rows=masked_rows)).abs().max() <= 1e-15
    (slope,) = torch.autograd.grad((y * x.detach()).sum(), temperature)
    assert slope.isfinite()


@pytest.mark.parametrize("options", [(2.0, False), (2.0, True), (1.0, True)], ids=str)
def test_opcheck_with_options(options: tuple[float, bool], generator: torch.Generator) -> None:
    for layout in (lambda t: t, Tensor.t):
        x, y, dy = (layout(torch.randn((3, 4), generator=generator)).requires_grad_() for _ in range(3))
        assert set(torch.library.opcheck(softmax.default, (x, 1, *options)).values()) == {"SUCCESS"}
        assert set(torch.library.opcheck(softmax_backward.default, (dy, y, 0, options[0])).values()) == {"SUCCESS"}


# ---- Properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 10, 64, 65, 300, 1500])
def test_shift_invariance(n: int, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Bit for bit where the shift is exact: multiples of 1/4 up to 8 keep their bits when 2^k is added to them."""
    x = torch.randint(0, 33, (5, n), generator=generator).to(dtype) / 4
    for c in (8.0, -8.0, 16.0, -16.0, -1.0, 0.25):
        shifted = x + c
        assert torch.equal(shifted.double() - c, x.double())
        assert_same_bits(softmax(shifted, 1), softmax(x, 1), f"softmax {dtype} {isa}, rows of {n} shifted by {c}")
        columns, unshifted = (softmax(t.t().contiguous(), 0).t() for t in (shifted, x))
        assert_same_bits(columns, unshifted, f"softmax {dtype} {isa}, columns of {n} shifted by {c}")
        slack = softmax_slack(dtype, 1, unshifted)
        assert_same_bits(unshifted, softmax(x, 1), f"softmax {dtype} {isa}, columns of {n}", slack)


@pytest.mark.parametrize("n", [3, 10, 64, 65, 300, 1500])
def test_permutation(n: int, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """A permuted row is the permuted result, but for the order of the additions and for what rounds after them."""
    x = normal((5, n), dtype, generator).to(dtype)
    order = torch.randperm(n, generator=generator)
    y, permuted = softmax(x, 1)[:, order].double(), softmax(x[:, order], 1).double()
    unit = UNIT[dtype] * (2 * additions(n, dtype) + 4)
    bound = y * (unit + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)) + torch.finfo(dtype).smallest_normal * 2.0**-7
    wrong = (permuted - y).abs() > bound
    assert not wrong.any(), f"softmax {dtype} {isa}, rows of {n}: {int(wrong.sum())} elements depend on the order"


# ---- One result in every layout --------------------------------------------------------------------------------------


def layouts(rows: Tensor) -> Iterator[tuple[str, Tensor, int, Callable[[Tensor], Tensor]]]:
    """The rows of a matrix as another tensor, the dim they lie in, and how to find them in a result of its shape."""
    count, n = rows.shape
    yield "first dim", rows.t().contiguous(), 0, lambda y: y.t()
    yield "transposed", rows.t().contiguous().t(), 1, lambda y: y
    yield "middle dim", torch.stack([rows.t(), rows.t().flip(1)]), 1, lambda y: y[0].t()
    yield "middle dim, second", torch.stack([rows.t().flip(1), rows.t()]), 1, lambda y: y[1].t()
    wide = torch.full((count + 2, n + 3), math.nan, dtype=rows.dtype)
    wide[1:-1, 1:-2] = rows
    yield "padded slice", wide[1:-1, 1:-2], 1, lambda y: y
    yield "padded rows", wide[1:-1, 1:-2].t(), 0, lambda y: y.t()
    yield "every other", torch.stack([rows, rows * math.nan], -1)[..., 0], 1, lambda y: y
    aligned = torch.full((count * n + 1,), math.nan, dtype=rows.dtype)
    aligned[1:] = rows.flatten()
    yield "at an offset", aligned[1:].view(count, n), 1, lambda y: y
    order = torch.arange(count - 1, -1, -1)
    yield "other order", rows[order], 1, lambda y: y[order]
    yield "other order, columns", rows[order].t().contiguous(), 0, lambda y: y.t()[order]
    yield "3-D", rows[:, None], 2, lambda y: y[:, 0]
    yield "inner dim of 1", rows[:, :, None], 1, lambda y: y[:, :, 0]
    # channels_last: a picture of count pixels, n channels; stored as rows.
    yield (
        "channels_last",
        rows.t().reshape(1, n, count, 1).contiguous(memory_format=torch.channels_last),
        1,
        (lambda y: y[0, :, :, 0].t()),
    )
    yield "channels first", rows.t().reshape(1, n, count, 1).contiguous(), 1, lambda y: y[0, :, :, 0].t()


# Those of which a row's elements lie side by side, or are brought to lie so because the tensor has gaps.
ALONG = ("padded slice", "padded rows", "every other", "at an offset", "other order", "3-D", "inner dim of 1", "channels_last")


def in_layout(name: str, along: Tensor, across: Tensor) -> Tensor:
    """Whose bits a layout has to give: on the CPU all the same."""
    return along if DEVICE == "cpu" or name in ALONG else across


# Around vectors, tiles and the blocks of the sum; then around the buffer that keeps the terms of 16-bit rows.
LAYOUT_LENGTHS = [*range(1, 35), 48, *range(62, 68), 80, 100, 127, 128, 129, 144, 255, 256, 257, 300]
LAYOUT_LONG = [1000, 1023, 1024, 1025, 1040, 2047, 2048, 2049, 4095, 4096, 4097, 5000]


def columns_of(rows: Tensor) -> Tensor:
    return rows.t().contiguous()


def check_layouts(member: Member, x: Tensor, dy: Tensor, what: str) -> None:
    y = member.forward(x, 1)
    dx = member.backward(dy, y, 1)
    y_across = member.forward(columns_of(x), 0).t()
    dx_across = member.backward(columns_of(dy), columns_of(y), 0).t()
    for (name, view, dim, back), (_, dy_view, _, _), (_, y_view, _, _) in zip(layouts(x), layouts(dy), layouts(y), strict=True):
        assert_same_bits(back(member.forward(view, dim)), in_layout(name, y, y_across), f"{what}, {name}")
        got = back(member.backward(dy_view, y_view, dim))
        assert_same_bits(got, in_layout(name, dx, dx_across), f"{what}, {name}, gradient")
    assert_same_bits(y_across, y, f"{what}, across", member.slack(x.dtype, 1, y))
    assert_same_bits(dx_across, dx, f"{what}, across, gradient", member.slack(x.dtype, 1, y, dy))


@each_member
def test_same_rows_in_every_layout(member: Member, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """softmax.h defines one order of the sums, so that where a row lies cannot be seen in its result."""
    lengths = [*LAYOUT_LENGTHS, *LAYOUT_LONG]
    for n in lengths if member == SOFTMAX else lengths[::3]:
        for count in [COLUMNS + 3, 5] if n <= 300 else [5]:
            # Gradients of all sizes and signs: no sum of them is right by chance.
            x, dy = (normal((count, n), dtype, generator).to(dtype) for _ in range(2))
            check_layouts(member, x, dy, f"{member} {dtype} {isa}, {count} rows of {n}")


def test_same_zeros_in_every_layout(dtype: torch.dtype, isa: str) -> None:
    """Products that vanish below zero leave sums of -0.0, and 0 - (-0.0) has another sign than 0 - 0.0."""
    tiny = torch.tensor(1, dtype=INTEGER[dtype.itemsize]).view(dtype)
    for n in (32, 40, 64, 70, 100, 128, 1000, 1024, 1030, 2048):
        y = torch.full((3, n), 1 / 1024, dtype=dtype)
        dy = torch.full((3, n), -0.0, dtype=dtype)
        dy[:, torch.arange(n) // SUM_LANES % 4 == 0] = -tiny  # in every partial sum of every block
        dx = softmax_backward(dy, y, 1)
        dx_across = softmax_backward(columns_of(dy), columns_of(y), 0).t()
        what = f"softmax gradient {dtype} {isa}, 3 rows of {n}"
        for (name, dy_view, dim, back), (_, y_view, _, _) in zip(layouts(dy), layouts(y), strict=True):
            assert_same_bits(back(softmax_backward(dy_view, y_view, dim)), in_layout(name, dx, dx_across), f"{what}, {name}")


def test_number_of_rows(dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Any number of rows at a time gives what each gives alone."""
    for n in (1, 2, 7, 10, 16, 17, 33, 64, 65, 100, 1025):
        x, dy = (normal((40, n), dtype, generator).to(dtype) for _ in range(2))
        y = torch.stack([softmax(row, 0) for row in x])
        dx = torch.stack([softmax_backward(*pair, 0) for pair in zip(dy, y, strict=True)])
        for count in [*range(1, 20), 31, 32, 33, 40]:
            for start in (0, 40 - count):
                part = slice(start, start + count)
                what = f"softmax {dtype} {isa}, rows {start} to {start + count} of {n}"
                assert_same_bits(softmax(x[part], 1), y[part], what)
                assert_same_bits(softmax_backward(dy[part], y[part], 1), dx[part], f"{what}, gradient")
        what, slack = f"softmax {dtype} {isa}, columns 3 to 36 of {n}", softmax_slack(dtype, 1, y[3:36])
        assert_same_bits(softmax(columns_of(x)[:, 3:36], 0).t(), y[3:36], what, slack)


@each_member
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((9001, 10), 1),  # short rows, in tiles
        ((1531, 64), 1),
        ((1009, 101), 1),  # long rows
        ((5, 20011), 1),  # rows longer than a thread's least share
        ((3, 21, 37, 41), 1),  # columns
        ((2000, 51), 0),
        ((40, 50, 51), 1),
        ((1, 100003), 0),  # rows of one element
    ],
    ids=str,
)
def test_threads(shape: tuple[int, ...], dim: int, member: Member, dtype: torch.dtype, generator: torch.Generator) -> None:
    x, dy = (normal(shape, dtype, generator).to(dtype) for _ in range(2))
    y = member.forward(x, dim)
    dx = member.backward(dy, y, dim)
    assert x.numel() > 2 * 32768
    # Rows and layouts of their own, as one thread sees them.
    for at in (0, shape[1 - dim] // 2, shape[1 - dim] - 1) if len(shape) == 2 else ():
        alone = member.forward(x.select(1 - dim, at).clone(), 0)
        slack = member.slack(dtype, 0, alone) if dim == 0 else None
        assert_same_bits(y.select(1 - dim, at), alone, f"{member} {dtype} {shape}, row {at}", slack)
    for count in THREAD_COUNTS:
        torch.set_num_threads(count)
        what = f"{member} {dtype} {shape}, dim {dim}, {count} threads"
        assert_same_bits(member.forward(x, dim), y, what)
        assert_same_bits(member.backward(dy, y, dim), dx, f"{what}, gradient")
        flipped = x.transpose(0, -1).contiguous().transpose(0, -1)
        assert_same_bits(member.forward(flipped, dim), y, f"{what}, transposed in memory", member.slack(dtype, dim, y))


# As long as one buffer, one block of the sum or several; as wide as a panel or two, and not whole vectors.
@each_member
@pytest.mark.parametrize("n", [568, 1025, 2111, 4096])
def test_long_columns(n: int, member: Member, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Columns too long for a buffer, of so many neighbours that they are read from where they lie."""
    for outer, inner in [(1, 64), (2, 67), (3, 130), (1, 530)]:
        x, dy = (normal((outer, n, inner), dtype, generator).to(dtype) for _ in range(2))
        rows, dy_rows = (t.transpose(1, 2).contiguous() for t in (x, dy))
        y_rows = member.forward(rows, 2)
        y, what = y_rows.transpose(1, 2).contiguous(), f"{member} {dtype} {isa}, {outer} of {n} rows of {inner}"
        assert_same_bits(member.forward(x, 1), y, what, member.slack(dtype, 1, y))
        dx = member.backward(dy_rows, y_rows, 2).transpose(1, 2)
        assert_same_bits(member.backward(dy, y, 1), dx, f"{what}, gradient", member.slack(dtype, 1, y, dy))


@pytest.mark.cpu_only("the CPU's kernels, with the CPU's sanitizer")
def test_nothing_is_touched_that_is_not_the_tensors(tmp_path: Path) -> None:
    """Nor beyond a buffer of the kernels' own."""
    source = (ROOT / "csrc" / "cpu" / f"{BEST_ISA}.cpp").read_text()
    assert source.count('#include "table.h"') == 1
    source = source.replace('#include "table.h"', '#include "softmax_bounds.cpp"')
    program = tmp_path / "softmax_bounds"
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-g1", "-Wno-psabi", "-fsanitize=address", "-x", "c++", "-"]
    folders = [f"-I{ROOT / 'csrc' / 'cpu'}", f"-I{ROOT / 'tests'}"]
    subprocess.run([*command, *folders, "-o", program], input=source, text=True, check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[0]) > 1000


def test_expanded_gradients(dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """A dy of stride 0 is that of a sum or a mean."""
    for shape, dim in [((7, 10), 1), ((7, 100), 1), ((10, 67), 0), ((2, 21, 5, 7), 1)]:
        y = softmax(normal(shape, dtype, generator).to(dtype), dim)
        number = torch.tensor(1.7, dtype=dtype)
        along = normal((shape[-1],), dtype, generator).to(dtype)
        for name, dy in [
            ("a number", number.expand(shape)),
            ("a row", along.expand(shape)),
            ("a column", y[..., :1].expand(shape)),
        ]:
            what = f"softmax gradient {dtype} {isa} {shape}, dy is {name}"
            assert_same_bits(softmax_backward(dy, y, dim), softmax_backward(dy.contiguous(), y, dim), what)
            permuted = y.transpose(0, 1).contiguous().transpose(0, 1)
            plain, slack = softmax_backward(dy.contiguous(), y, dim), softmax_slack(dtype, dim, y, dy)
            assert_same_bits(softmax_backward(dy, permuted, dim), plain, f"{what}, y transposed", slack)


# ---- dim -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", range(5))
def test_implicit_dim(along: Row, rank: int, generator: torch.Generator) -> None:
    """Torch's choice, with torch's warning, at the line of the caller."""
    x = torch.randn((2, 3, 4, 5)[:rank], generator=generator)
    with pytest.warns(UserWarning, match="Implicit dimension choice") as theirs:
        expected = getattr(F, along.name)(x)
    calls = [lambda: along.function(x), lambda: along.function(x, None), lambda: along.function(x, dim=None)]
    if along.name == "softmax":
        calls.append(lambda: fastact.softmax(x, masked_rows="zero"))
        with pytest.warns(UserWarning, match="Implicit dimension choice"):
            reference = fastact.softmax(x, temperature=torch.tensor(1.0), masked_rows="zero")
        torch.testing.assert_close(reference, expected)
    for call in calls:
        with pytest.warns(UserWarning, match="Implicit dimension choice") as ours:
            y = call()
        assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
        assert ours[0].filename == __file__
        assert ours[0].lineno == inspect.getsourcelines(call)[1]
        # Over the wrong dim they would differ in the first digit: the tolerance is that of float32.
        torch.testing.assert_close(y, expected)


@pytest.mark.cpu_only("a process of its own, which computes there")
def test_one_element_warning(along: Row, tmp_path: Path) -> None:
    """Once per process, whatever the filters: it names the trap and what to use."""
    always = along.reference(torch.zeros(1), 0).item()
    program = f"""
        import warnings
        import torch, fastact
        along, module = fastact.{along.name}, fastact.{along.class_name}
        x = torch.tensor([[3.0], [-2.0]], requires_grad=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            along(torch.zeros(2, 3), 1), along(torch.tensor(1.0), 0)
            assert not caught, "a dimension of more than one element, or none"
            y = along(x, 1)  # this line
            along(x, 1)
            along(torch.zeros(1), 0)
            module(dim=-1)(x)
        y.backward(torch.tensor([[5.0], [7.0]]))
        print(*[w.category.__name__ for w in caught])
        print(*[w.message for w in caught])
        print(*[open(w.filename).read().splitlines()[w.lineno - 1] for w in caught])
        print(y.tolist(), x.grad.tolist())
    """
    # From a file, so that a warning finds its line.
    path = tmp_path / "program.py"
    path.write_text(inspect.cleandoc(program))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "UserWarning"
    for words in (along.name, "one element", "dim 1", f"always {always:g}", "gradient always 0", "sigmoid"):
        assert words in lines[1]
    assert lines[2].endswith("# this line")
    assert lines[3] == f"[[{always}], [{always}]] [[0.0], [0.0]]"


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 3, 4), (2, 3, 4, 5), (3, 0), (0,)], ids=str)
def test_dim_out_of_range(along: Row, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The exception and the words of torch."""
    x = torch.zeros(shape, dtype=dtype)
    rank = max(len(shape), 1)
    for dim in (rank, -rank - 1, 100, -100, 2**62, 2**63 - 1, -(2**63)):
        with pytest.raises(IndexError) as theirs:
            getattr(torch, along.name)(x, dim)
        for call in (along.function, along.op, lambda x, dim: along.backward_op(x, x, dim)):
            with pytest.raises(IndexError) as ours:
                call(x, dim)
            assert str(ours.value).partition("\n")[0] == str(theirs.value).partition("\n")[0]
        with pytest.raises(IndexError):
            along.function(x.to("meta"), dim)


# ---- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_dtype_argument(along: Row, wanted: torch.dtype, dtype: torch.dtype, generator: torch.Generator) -> None:
    """x is cast first; its gradient comes back in its own dtype."""
    x = normal((4, 9), dtype, generator).to(dtype).requires_grad_()
    dy = normal((4, 9), wanted, generator).to(wanted)
    for call in [
        lambda f, x: f(x, 1, dtype=wanted),
        lambda f, x: f(x, dim=1, dtype=wanted),
        lambda f, x: f(x, -1, dtype=wanted),
    ]:
        y, plain = call(along.function, x), call(getattr(F, along.name), x)
        assert y.dtype == plain.dtype == wanted
        assert_same_bits(y.detach(), along.op(x.detach().to(wanted), 1), f"{along.name} of {dtype} as {wanted}")
        (dx,), (plain_dx,) = (torch.autograd.grad(out, x, dy) for out in (y, plain))
        assert dx.dtype == plain_dx.dtype == dtype
        expected = along.backward_op(dy, along.op(x.detach().to(wanted), 1), 1).to(dtype)
        assert_same_bits(dx, expected, f"{along.name} gradient of {dtype} as {wanted}")
    assert_same_bits(along.function(x.detach(), 1, wanted), y.detach(), "by position")


@pytest.mark.parametrize("source", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_dtype_argument_of_integers(along: Row, source: torch.dtype, dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 1, 3], [2, 0, 0, 1]]).to(source)
    y = along.function(x, 1, dtype=dtype)
    assert y.dtype == getattr(F, along.name)(x, 1, dtype=dtype).dtype == dtype
    assert_same_bits(y, along.op(x.to(dtype), 1), f"{along.name} of {source} as {dtype}")


def test_dtype_none_is_that_of_x(along: Row, dtype: torch.dtype) -> None:
    assert along.function(torch.zeros(3, dtype=dtype), 0, dtype=None).dtype == dtype
    assert along.function(torch.zeros(3, dtype=dtype), 0, None).dtype == dtype


def test_best_isa_is_in_use() -> None:
    """So that tests without that axis test what users get."""
    assert fastact.build_info()["isa"] == BEST_ISA
