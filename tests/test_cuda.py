"""The kernels on a GPU: against those of the CPU, in streams and graphs, beyond 2^31 elements, over every float32 number.

It names its devices itself, so that it runs with `--device cpu` too, wherever there is a GPU and a build for it.
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BEST_ISA, DTYPES, ELEMENTWISE, SEED, STAND_IN, bits, parameter_sets
from test_accuracy import misrounded_at_most
from torch import Tensor, nn
from ulp import exact_parameters, forward_sweep, patterns

import fastact
from fastact import _C, _registry
from fastact._registry import Row
from fastact.bench import __main__ as program
from fastact.bench import cases as cases_module
from fastact.bench.report import Report
from fastact.bench.timing import CallTimer, CudaTimer

MISSING = None
if not torch.cuda.is_available():
    MISSING = "torch finds no CUDA device here"
elif fastact.build_info()["cuda"] is None:
    MISSING = f"this fastact was built without CUDA: {fastact.build_info()['cuda_missing']}"
needs_cuda = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

CUDA = torch.device("cuda", 0)
GIB = 1 << 30

softmax = torch.ops.fastact.softmax
softmax_backward = torch.ops.fastact.softmax_backward

Call = Callable[[], Any]


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    """Normal numbers on the GPU, of any shape and dtype: made in place, so that 4 GiB of them take 4 GiB."""
    generator = torch.Generator(CUDA).manual_seed(SEED)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA).normal_(std=scale, generator=generator)

    return normal


def often(count: int) -> int:
    """How often to do what a GPU might do in another way the next time."""
    return 2 if STAND_IN else count


def arguments(row: Row, dim: int = -1) -> tuple[Any, ...]:
    return tuple(row.parameters.values()) if row in ELEMENTWISE else (dim,)


def saved_for(row: Row, x: Tensor, *args: float) -> Tensor:
    return x if row in ELEMENTWISE and row.saves_input(*args) else row.op(x, *args)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str, *, any_nan: bool = False) -> None:
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    wrong = bits(actual) != bits(expected)
    if any_nan:  # payloads and signs of NaN mean nothing
        wrong &= ~(actual.isnan() & expected.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        pytest.fail(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: "
            f"expected {expected[at].item()!r}, got {actual[at].item()!r}"
        )


# ---- Against the CPU -------------------------------------------------------------------------------------------------


def wide_inputs(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """On the CPU: all of float16, four million of float32, a prime apart, and of float64 random bits and what matters."""
    if dtype != torch.float64:
        return torch.cat(list(patterns(dtype, 1021 if dtype == torch.float32 else 1, device="cpu")))
    words = torch.randint(-(2**63), 2**63 - 1, (1 << 20,), generator=generator, device="cpu").view(dtype)
    exponents = torch.rand(1 << 20, generator=generator, dtype=dtype, device="cpu") * 40 - 30
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 5e-324, -5e-324, -708.396, -708.4, -745.2, -746.0, 0.625, -0.625]
    near = torch.cat([exponents.exp2(), -exponents.exp2(), torch.tensor(special, dtype=dtype, device="cpu")])
    return torch.cat([words, near])


@needs_cuda
@pytest.mark.exhaustive
@pytest.mark.parametrize("wide", [torch.float64, torch.float32, torch.float16], ids=["float64", "float32", "float16"])
def test_bits_of_the_cpu(row: Row, wide: torch.dtype, request: pytest.FixtureRequest) -> None:
    """All but bfloat16 take the same formulas on both: forward, backward, in place, for every set of parameters."""
    if BEST_ISA == "baseline":
        pytest.skip("this CPU has no fused multiply-add, which the formulas take on a GPU and on other CPUs")
    _C.use_isa("avx2")  # AVX-512 takes tanh from a table
    request.addfinalizer(lambda: _C.use_isa(BEST_ISA))
    generator = torch.Generator("cpu").manual_seed(SEED)
    x = wide_inputs(wide, generator)
    dy = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(wide)
    for values in parameter_sets(row):
        what = f"{row.name}{values} {wide}"
        y = row.op(x, *values)
        on_gpu = row.op(x.to(CUDA), *values)
        assert_same_bits(on_gpu.cpu(), y, what, any_nan=True)
        saved = x if row.saves_input(*values) else y
        dx = row.backward_op(dy, saved, *values)
        assert_same_bits(row.backward_op(dy.to(CUDA), saved.to(CUDA), *values).cpu(), dx, f"{what} gradient", any_nan=True)
        in_place = x.to(CUDA)
        getattr(torch.ops.fastact, row.name + "_")(in_place, *values)
        assert_same_bits(in_place, on_gpu, f"{what} in place")


@needs_cuda
@pytest.mark.parametrize("n", [1, 7, 1000, 4097, 70001])
def test_softmax_is_near_that_of_the_cpu(n: int, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    """The sums are made in another order, each with a unit for every addition at most; 16-bit results may be neighbours."""
    x, dy = draw(3, n, dtype=dtype, scale=3.0), draw(3, n, dtype=dtype)
    y = softmax(x.cpu(), 1)
    unit = torch.finfo(dtype if dtype.itemsize > 2 else torch.float32).eps / 2
    relative = unit * (2 * 64 + 2 * 30) + (torch.finfo(dtype).eps if dtype.itemsize == 2 else 0)  # 30: |x - max| at most
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    wide = y.double()
    assert ((softmax(x, 1).cpu().double() - wide).abs() <= relative * wide + tiny).all()
    dx = softmax_backward(dy.cpu(), y, 1).double()
    product = (wide * dy.cpu().double()).abs()
    slack = relative * (product + wide * product.sum(1, keepdim=True)) + tiny
    assert ((softmax_backward(dy, y.to(CUDA), 1).cpu().double() - dx).abs() <= slack).all()


# ---- Every number ----------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.exhaustive
def test_every_float32_input(row: Row) -> None:
    """All 2^32, against float64 on the same GPU; with gradual underflow."""
    values = exact_parameters(row)[0]
    worst = forward_sweep(row, values, patterns(torch.float32, chunk=1 << 26, device=CUDA))
    print(f"{row.name}{values} float32 on {torch.cuda.get_device_name(CUDA)}, 2^32 inputs: {worst}")
    assert worst.error <= row.ulp, f"{row.name}{values}: {worst}"


@needs_cuda
@pytest.mark.exhaustive
def test_every_float32_input_of_tanh_and_sigmoid_beyond_the_measure() -> None:
    """Odd bit for bit; and exactly 0 where the exact value rounds to that, which no number of ULP says."""
    for x in patterns(torch.float32, chunk=1 << 26, device=CUDA):
        y, opposite = torch.ops.fastact.tanh(x), torch.ops.fastact.tanh(-x)
        assert_same_bits(-opposite, y, "tanh(-x)", any_nan=True)
        y = torch.ops.fastact.sigmoid(x)
        # 2^-150 = e^-103.97...: half of the smallest subnormal number.
        assert (y[x < -103.98] == 0).all()
        assert (y[(x > -103.97) & (x < 0)] > 0).all()
        assert (y[x > 17.4] == 1).all()  # e^-17.4 is less than half the distance of 1 from its neighbour, 2^-25
        assert torch.equal(y.isnan(), x.isnan())


@needs_cuda
@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_every_16_bit_input(row: Row, dtype16: torch.dtype) -> None:
    for values in exact_parameters(row):
        worst = forward_sweep(row, values, patterns(dtype16, device=CUDA))
        print(f"{row.name}{values} {dtype16}: {worst.misrounded} of 65,536 misrounded, the worst {worst}")
        most = misrounded_at_most(values, dtype16)
        assert worst.misrounded <= most, f"{row.name}{values} {dtype16}: {worst.misrounded}, the worst {worst}"
        # Of two neighbours the other one: were it further, the error would be above 1; and it lies nearly in the middle.
        assert worst.error <= 0.5 + 2.0**-9, f"{row.name}{values} {dtype16}: {worst}"


# ---- Softmax, every length -------------------------------------------------------------------------------------------


def check_softmax(x: Tensor, dy: Tensor, dim: int, what: str) -> None:
    """Forward and backward against float64 on the GPU; all elements finite.

    In units of the compute type: |x - max| from the subtraction (2.5 times that with the approximate exponential of 16-bit
    types), as much again for its weighted mean in the sum; 16 for exponentials, reciprocal and product; one for each addition,
    of which there are at most 64 up to some 10^5 elements, and one more for every 2^13 elements. For float64 the reference
    rounds as often.
    """
    dtype = x.dtype
    unit = torch.finfo(dtype if dtype.itemsize > 2 else torch.float32).eps / 2
    additions = min(x.shape[dim], 64 + x.shape[dim] // 2**13)
    wide = x.double()
    distance = wide.amax(dim, keepdim=True) - wide
    term = (-distance).exp()
    y = term / term.sum(dim, keepdim=True)  # not torch.softmax, which may add one after the other
    factor = {8: 2.0, 4: 1.0, 2: 2.5}[dtype.itemsize]
    units = factor * (distance + (y * distance).sum(dim, keepdim=True) + 16 + additions)
    vanishing = 708.396 if dtype == torch.float64 else 87.3365
    smallest = torch.finfo(dtype if dtype.itemsize > 2 else torch.float32).smallest_normal * 2 * unit
    bound = y * unit * units + torch.where(distance * (1 + 4 * unit) > vanishing, y, 0) + 2 * smallest
    if dtype.itemsize == 2:  # rounded once more: half a step, which of small numbers is that of the subnormal ones
        bound = bound * 1.01 + torch.finfo(dtype).eps / 2 * y + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    actual = softmax(x, dim)
    error = ((actual.double() - y).abs() / bound).max()
    assert error <= 1, f"{what}: off by {float(error):.3g} bounds"

    kept = actual.double()
    gradient = dy.double()
    product = gradient * kept
    dx = kept * (gradient - product.sum(dim, keepdim=True))
    sum_error = product.abs().sum(dim, keepdim=True) * unit * factor * (additions + 2)
    bound = 1.001 * kept * (sum_error + 4 * unit * (gradient.abs() + product.abs().sum(dim, keepdim=True)))
    bound = bound + (2 + x.shape[dim]) * smallest
    if dtype.itemsize == 2:
        bound = bound + torch.finfo(dtype).eps / 2 * dx.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    error = ((softmax_backward(dy, actual, dim).double() - dx).abs() / bound).max()
    assert error <= 1, f"{what}, gradient: off by {float(error):.3g} bounds"


def spoilt(rows: Tensor) -> Tensor:
    """Before each row of a matrix one of -inf, and after it one with a NaN at a place of its own."""
    masked, poisoned = torch.full_like(rows, -math.inf), rows.clone()
    count, n = rows.shape
    poisoned[torch.arange(count, device=rows.device), torch.arange(count, device=rows.device) * 7 % n] = math.nan
    return torch.stack([masked, rows, poisoned], 1).flatten(0, 1)


def misaligned(t: Tensor) -> Tensor:
    """The same values one element beyond an aligned address, between NaN."""
    buffer = torch.full((t.numel() + 2,), math.nan, dtype=t.dtype, device=t.device)
    return buffer[1:-1].copy_(t.flatten()).view(t.shape)


def check_rows(n: int, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    """Rows of n along memory: their values; and their bits wherever they lie, and beside rows of -inf and of NaN."""
    what = f"softmax {dtype}, rows of {n}"
    x, dy = draw(3, n, dtype=dtype, scale=3.0), draw(3, n, dtype=dtype)
    check_softmax(x, dy, 1, what)
    y = softmax(x, 1)
    dx = softmax_backward(dy, y, 1)
    assert_same_bits(softmax(misaligned(x), 1), y, f"{what}, misaligned")
    assert_same_bits(softmax_backward(misaligned(dy), y, 1), dx, f"{what}, gradient, dy misaligned")
    assert_same_bits(softmax_backward(dy, misaligned(y), 1), dx, f"{what}, gradient, y misaligned")
    among = softmax(spoilt(x), 1)
    assert_same_bits(among[1::3], y, f"{what}, among others")
    assert among[0::3].isnan().all(), f"{what}: a row of -inf is not NaN"
    assert among[2::3].isnan().all(), f"{what}: NaN does not reach the whole row"
    among = softmax_backward(spoilt(dy), y.repeat_interleave(3, 0), 1)
    assert_same_bits(among[1::3], dx, f"{what}, gradient, among others")
    assert among[2::3].isnan().all(), f"{what}, gradient: NaN does not reach the whole row"


@needs_cuda
@pytest.mark.exhaustive
@pytest.mark.parametrize("start", range(1, 2101, 300))
def test_softmax_of_every_length(start: int, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    for n in range(start, start + 300):
        check_rows(n, dtype, draw)


# Where a row passes from one warp to several, to a cluster, to more than a cluster holds; for float64 at half of that.
EDGES = [2**k + d for k in range(11, 20) for d in (-1, 0, 1)] + [30576, 50257, 300001, 1000000, 3000017]


@needs_cuda
@pytest.mark.exhaustive
def test_softmax_of_long_rows(dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    for n in EDGES:
        check_rows(n, dtype, draw)


ACROSS = [*range(2, 41), 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000, 1025, 4096, 4097, 8193, 65537, 262145]


@needs_cuda
@pytest.mark.exhaustive
@pytest.mark.parametrize("inner", [2, 3, 8, 31, 33, 64, 130, 1000])
def test_softmax_across_memory(inner: int, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    """Rows that lie across memory: right, and the same in a larger tensor and at another address."""
    for n in ACROSS:
        if n * inner > 10**7:
            continue
        what = f"softmax {dtype}, rows of {n}, {inner} side by side"
        x, dy = draw(2, n, inner, dtype=dtype, scale=3.0), draw(2, n, inner, dtype=dtype)
        check_softmax(x, dy, 1, what)
        y = softmax(x, 1)
        dx = softmax_backward(dy, y, 1)
        assert_same_bits(softmax(x[1], 0), y[1], f"{what}, the second alone")
        assert_same_bits(softmax(misaligned(x), 1), y, f"{what}, misaligned")
        assert_same_bits(softmax_backward(misaligned(dy), misaligned(y), 1), dx, f"{what}, gradient, misaligned")
        clean = [k for k in range(inner) if k != inner // 2]
        x[0, n // 2, inner // 2] = math.nan
        x[1, :, inner // 2] = -math.inf
        spoilt_y = softmax(x, 1)
        assert_same_bits(spoilt_y[:, :, clean], y[:, :, clean], f"{what}, beside NaN")
        assert spoilt_y[:, :, inner // 2].isnan().all(), f"{what}: NaN and -inf do not give rows of NaN"


@needs_cuda
def test_softmax_along_every_dim(dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    for shape in [(70,), (5, 70), (3, 4, 5, 6), (2, 1, 33, 1, 17), (7, 1), (1, 7)]:
        x, dy = draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype)
        for dim in range(-len(shape), len(shape)):
            check_softmax(x, dy, dim, f"softmax {dtype} {shape}, dim {dim}")


@needs_cuda
@pytest.mark.parametrize("n", [2, 10, 64, 1000, 4099, 40000, 300001])
def test_softmax_of_huge_numbers(n: int, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    """Where neighbouring numbers are further apart than an exponential reaches: nothing overflows on the way."""
    size = min(1e14, torch.finfo(dtype).max)
    equal = torch.full((2, n), size, dtype=dtype, device=CUDA)
    equal[1] *= -1
    want = torch.full((2, n), 1 / n, dtype=torch.float64, device=CUDA).to(dtype)
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of subnormal numbers, which 1 / n may be
    assert ((softmax(equal, 1).double() - want.double()).abs() <= torch.finfo(dtype).eps * want.double() + step).all()
    x = (draw(4, n, dtype=torch.float32).clamp(-0.99, 0.99) * size).to(dtype)
    x[2:, n // 3] = size
    check_softmax(x, draw(4, n, dtype=dtype), 1, f"softmax {dtype} of numbers up to {size:g}, rows of {n}")


# ---- Runs, streams, graphs -------------------------------------------------------------------------------------------

# (shape, dim): parts of a warp, a warp, a block, a cluster, longer; across memory, few and many, and longer.
SHAPES = [
    ((1000, 10), 1), ((300, 200), 1), ((50, 2049), 1), ((20, 8192), 1), ((5, 50257), 1), ((2, 262144), 1), ((2, 1000003), 1),
    ((40, 21, 67), 1), ((1000, 64), 0), ((3, 5000, 33), 1), ((300000, 8), 0),
]  # fmt: skip


@needs_cuda
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
def test_every_run_gives_the_same_bits(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, draw: Callable[..., Tensor]
) -> None:
    x, dy = draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype)
    y = softmax(x, dim)
    dx = softmax_backward(dy, y, dim)
    differ = torch.zeros((), dtype=torch.int64, device=CUDA)
    for _ in range(often(50)):
        differ += (bits(softmax(x, dim)) != bits(y)).sum()
        differ += (bits(softmax_backward(dy, y, dim)) != bits(dx)).sum()
    assert int(differ) == 0, f"softmax {dtype} {shape}, dim {dim}"


def every_call(row: Row, x: Tensor, dy: Tensor, dim: int = 1) -> list[Tensor]:
    """Forward, backward and both through autograd."""
    args = arguments(row, dim)
    y = row.op(x, *args)
    dx = row.backward_op(dy, saved_for(row, x, *args), *args)
    leaf = x.detach().requires_grad_()
    return [y, dx, torch.autograd.grad(row.function(leaf, *args), leaf, dy)[0]]


# A row for a warp, a block, a cluster, and one in three launches with memory of its own.
STREAM_SHAPES = [(64, 100), (16, 5000), (2, 100000), (2, 600001)]
each_stream_shape = pytest.mark.parametrize("shape", STREAM_SHAPES, ids=str)


@needs_cuda
@each_stream_shape
def test_side_stream(any_row: Row, shape: tuple[int, int], draw: Callable[..., Tensor]) -> None:
    """In a stream that waits for its input: what is launched in another one finds zeros."""
    values, dy = draw(*shape), draw(*shape)
    expected = every_call(any_row, values, dy)
    x = torch.zeros_like(values)
    assert not torch.equal(any_row.op(x, *arguments(any_row, 1)), expected[0])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream(CUDA)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: some 10 ms, in which the host launches all that follows
        x.copy_(values)
        actual = every_call(any_row, x, dy)
    stream.synchronize()
    for what, a, e in zip(("forward", "backward", "autograd"), actual, expected, strict=True):
        assert_same_bits(a, e, f"{any_row.name} {what} of {shape} in a side stream")


@needs_cuda
@each_stream_shape
def test_graph(any_row: Row, shape: tuple[int, int], draw: Callable[..., Tensor]) -> None:
    """Captured once, replayed 100 times with other inputs; torch says so, as a warning, when it captures nothing."""
    x, dy = draw(*shape), draw(*shape)
    stream = torch.cuda.Stream(CUDA)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        every_call(any_row, x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = every_call(any_row, x, dy)
    for number in range(often(100)):
        x.copy_(draw(*shape))
        dy.copy_(draw(*shape))
        for result in results:
            result.fill_(math.nan)
        graph.replay()
        for result, expected in zip(results, every_call(any_row, x, dy), strict=True):
            assert_same_bits(result, expected, f"{any_row.name} of {shape}, replay {number}")


@needs_cuda
@each_stream_shape
def test_calls_do_not_wait_for_the_device(any_row: Row, shape: tuple[int, int], draw: Callable[..., Tensor]) -> None:
    """They return while what was launched before them still runs; and torch itself notices no synchronisation."""
    x, dy = draw(*shape), draw(*shape)
    every_call(any_row, x, dy)  # loads the kernels
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(200_000_000)  # some 0.1 s
        busy.record()
        every_call(any_row, x, dy)
        waited = busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert not waited, f"{any_row.name} of {shape} waits for the device"


@needs_cuda
@pytest.mark.parametrize("shape", [(300, 64), (5, 3, 1001), (2, 600001)], ids=str)
@pytest.mark.parametrize("name", ["prelu", "channel_scaled_sigmoid", "maxout"])
def test_parameters_and_maxout_in_streams_and_graphs(name: str, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> None:
    """In a stream that waits for its input, without waiting itself; the same in every run; and captured."""
    function = getattr(fastact, name)
    count = 0 if name == "maxout" else len(inspect.signature(function).parameters) - 1
    others = [draw(shape[1]).requires_grad_() for _ in range(count)] or [next(k for k in (3, 2, 1) if shape[1] % k == 0)]
    values, dy = draw(*shape), draw(*shape)

    def call(x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = function(leaf, *others)
        wanted = [t for t in (leaf, *others) if isinstance(t, Tensor)]
        return [y.detach(), *torch.autograd.grad(y, wanted, dy[:, : y.shape[1]].contiguous())]

    def check(actual: list[Tensor], expected: list[Tensor], where: str) -> None:
        for a, e in zip(actual, expected, strict=True):
            assert_same_bits(a, e, f"{name} of {shape} {where}")

    expected = call(values)
    for _ in range(often(20)):
        check(call(values), expected, "once more")
    x = torch.zeros_like(values)
    torch.cuda.synchronize()
    stream, busy = torch.cuda.Stream(CUDA), torch.cuda.Event()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s, in which the host launches all that follows
        busy.record()
        x.copy_(values)
        actual = call(x)
        waited = busy.query()
    stream.synchronize()
    assert not waited, f"{name} of {shape} waits for the device"
    check(actual, expected, "in a side stream")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(x)
    for number in range(often(20)):
        x.copy_(draw(*shape))
        graph.replay()
        check(results, call(x), f"replay {number}")


@needs_cuda
@pytest.mark.parametrize("library", [fastact, nn])
def test_a_watched_step_does_not_wait_for_the_device(library: types.ModuleType) -> None:
    """Nor does torch notice a synchronisation, in the step or at its end; a report waits, and has all counts."""
    model = nn.Sequential(nn.Linear(64, 64), library.ReLU(), nn.Linear(64, 64), library.Tanh(), library.Softmax(1)).to(CUDA)
    x = torch.randn(256, 64, device=CUDA)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    with fastact.monitor(model, sample=None) as watch:
        step()
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        busy = torch.cuda.Event()
        try:
            torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s, in which the host launches all that follows
            busy.record()
            for _ in range(3):
                step()
            waited = busy.query()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not waited, "a watched step waits for the device"
    for layer in watch.history().layers:
        for side in (layer.output, layer.gradient_in, layer.gradient_out):
            assert side.count.tolist() == [256 * 64] * 4


@needs_cuda
def test_python_threads_in_streams_of_their_own(any_row: Row, draw: Callable[..., Tensor]) -> None:
    x, dy = draw(64, 5000), draw(64, 5000)
    expected = every_call(any_row, x, dy)
    torch.cuda.synchronize()
    wrong: list[str] = []

    def work() -> None:
        stream = torch.cuda.Stream(CUDA)
        with torch.cuda.stream(stream):
            for _ in range(often(50)):
                results = every_call(any_row, x, dy)
                if not all(map(torch.equal, results, expected)):
                    wrong.append(threading.current_thread().name)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


# ---- Memory ----------------------------------------------------------------------------------------------------------


def allocated(call: Call) -> tuple[int, int]:
    """How often the call asks torch for GPU memory, and for how many bytes."""
    call()
    before = torch.cuda.memory_stats(CUDA)
    kept = call()
    after = torch.cuda.memory_stats(CUDA)
    del kept
    return tuple(after[key] - before[key] for key in ("allocation.all.allocated", "requested_bytes.all.allocated"))


@needs_cuda
def test_nothing_is_allocated_but_the_result(any_row: Row, dtype: torch.dtype, draw: Callable[..., Tensor]) -> None:
    args = arguments(any_row, 1)
    shapes = [(64, 100), (1 << 20, 3)]
    if any_row not in ELEMENTWISE:
        # The second is a row for a block; the third for a cluster of blocks, without which it takes memory of its own.
        shapes = [(64, 100), (7, 5000), (2, 60000)] if torch.cuda.get_device_capability(CUDA) >= (9, 0) else [(64, 100)]
    for shape in shapes:
        x, dy = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
        saved = saved_for(any_row, x, *args)
        size = x.numel() * x.element_size()
        assert allocated(lambda x=x: any_row.op(x, *args)) == (1, size)
        assert allocated(lambda dy=dy, saved=saved: any_row.backward_op(dy, saved, *args)) == (1, size)
        if any_row in ELEMENTWISE:
            in_place = getattr(torch.ops.fastact, any_row.name + "_")
            assert allocated(lambda x=x, in_place=in_place: in_place(x, *args)) == (0, 0)


@needs_cuda
def test_memory_is_given_back(any_row: Row, draw: Callable[..., Tensor]) -> None:
    """Of rows so long that they take some besides the result."""
    x, dy = draw(2, 600001), draw(2, 600001)
    args = arguments(any_row, 1)
    before = torch.cuda.memory_allocated(CUDA)
    for _ in range(often(20)):
        any_row.backward_op(dy, any_row.op(x, *args), *args)
    assert torch.cuda.memory_allocated(CUDA) == before


@needs_cuda
def test_out_of_memory_is_torchs_error(any_row: Row) -> None:
    """And the next call works."""
    args = arguments(any_row)
    with pytest.raises(torch.OutOfMemoryError):
        any_row.op(torch.ones(1, device=CUDA).expand(2**44), *args)
    assert any_row.op(torch.ones(3, device=CUDA), *args).isfinite().all()


# ---- Devices ---------------------------------------------------------------------------------------------------------


@needs_cuda
def test_another_device_than_the_current_one(any_row: Row, draw: Callable[..., Tensor]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU: a second one is needed")
    x, dy = draw(64, 100), draw(64, 100)
    expected = every_call(any_row, x, dy)
    for result, wanted in zip(every_call(any_row, x.to("cuda:1"), dy.to("cuda:1")), expected, strict=True):
        assert result.device == torch.device("cuda", 1)
        assert_same_bits(result.to(CUDA), wanted, f"{any_row.name} on the second GPU")
    assert torch.cuda.current_device() == 0
    with pytest.raises(RuntimeError, match=r"dy is on cuda:1 .*cuda:0"):
        any_row.backward_op(x.to("cuda:1"), x, *arguments(any_row))


@needs_cuda
def test_tensors_on_different_devices_are_refused(any_row: Row, draw: Callable[..., Tensor]) -> None:
    x = draw(3, 4)
    args = arguments(any_row)
    before = x.clone()
    for dy, saved, words in [(x.cpu(), x, "dy is on cpu .*cuda:0"), (x, x.cpu(), "dy is on cuda:0 .*cpu")]:
        with pytest.raises(RuntimeError, match=words):
            any_row.backward_op(dy, saved, *args)
    leaf = x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"(?i)device|cpu"):
        torch.autograd.grad(any_row.function(leaf, *args), leaf, torch.ones(3, 4, device="cpu"))
    assert_same_bits(x.detach(), before, "the input")


@needs_cuda
def test_empty_tensors_launch_nothing_that_fails(any_row: Row, dtype: torch.dtype) -> None:
    """A launch of no blocks is an error, which the next call that looks for one would report as its own."""
    shapes = [
        (0,), (0, 0), (1, 0), (0, 1), (3, 0), (0, 3), (2, 0, 3), (0, 2, 3), (2, 3, 0), (1, 1, 0), (0, 0, 0), (2, 0, 3, 4),
        (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 4, 5), (1, 0, 1, 1), (2, 0, 0, 2), (1, 2, 3, 4, 0), (0, 64), (65, 0),
    ]  # fmt: skip
    for shape in shapes:
        for dim in range(len(shape)) if any_row not in ELEMENTWISE else [0]:
            x = torch.zeros(shape, dtype=dtype, device=CUDA)
            args = arguments(any_row, dim)
            assert any_row.op(x, *args).shape == x.shape
            assert any_row.backward_op(x, x, *args).shape == x.shape
            if any_row in ELEMENTWISE:
                getattr(torch.ops.fastact, any_row.name + "_")(x, *args)
    y = any_row.op(torch.ones(3, dtype=dtype, device=CUDA), *arguments(any_row))
    torch.cuda.synchronize()
    assert y.isfinite().all()


@pytest.mark.skipif(
    not torch.cuda.is_available() or fastact.build_info()["cuda"] is not None, reason="needs a GPU, and a build without CUDA"
)
def test_build_without_cuda_leaves_gpu_tensors_to_torch() -> None:
    code = """
import warnings, torch, fastact
x = torch.linspace(-3, 3, 100, device="cuda")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [fastact.sigmoid(x), fastact.sigmoid(x), fastact.softmax(x, 0)]
assert [w.category for w in caught] == [UserWarning], caught
assert "built without CUDA" in str(caught[0].message)
assert all(map(torch.equal, results, [torch.sigmoid(x), torch.sigmoid(x), torch.softmax(x, 0)]))
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr


# ---- Beyond 2^31 elements --------------------------------------------------------------------------------------------

BEYOND = 2**31

# A bfloat16 result is within half a step, 2^-8 of itself; what float sums and exponentials are off by comes on top.
RELATIVE_BFLOAT16 = 2.0**-8 * 1.05


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Skips where the GPU has less free memory; gives back what the test took."""

    def need(gib: int) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(CUDA)[0]
        if free < gib * GIB:
            pytest.skip(f"needs {gib} GiB of free GPU memory; {free / GIB:.0f} GiB are free")

    yield need
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def chunks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


@needs_cuda
@pytest.mark.large
def test_elementwise_beyond_32_bits(row: Row, room: Callable[[int], None], draw: Callable[..., Tensor]) -> None:
    """Every chunk as it is alone; and some elements, around the places where an index could wrap, as they are one by one."""
    room(32)
    n = BEYOND + 2**20 + 3
    x, dy = draw(n, dtype=torch.bfloat16, scale=3.0), draw(n, dtype=torch.bfloat16)
    args = arguments(row)
    y = row.op(x, *args)
    saved = x if row.saves_input(*args) else y
    dx = row.backward_op(dy, saved, *args)
    for part in chunks(n, 2**28):
        assert_same_bits(row.op(x[part], *args), y[part], f"{row.name}, elements from {part.start}")
        assert_same_bits(row.backward_op(dy[part], saved[part], *args), dx[part], f"{row.name} gradient from {part.start}")
    for at in (0, 1, 2**30, BEYOND - 2, BEYOND - 1, BEYOND, BEYOND + 1, BEYOND + 2**20, n - 2, n - 1):
        assert_same_bits(row.op(x[at].clone(), *args), y[at], f"{row.name}, element {at}")
        wide = float(row.reference(x[at].double(), *args))
        assert float(y[at]) == pytest.approx(wide, rel=RELATIVE_BFLOAT16, abs=1e-30), f"{row.name}, element {at}"
    getattr(torch.ops.fastact, row.name + "_")(x, *args)
    for part in chunks(n, 2**28):
        assert_same_bits(x[part], y[part], f"{row.name} in place, elements from {part.start}")


@needs_cuda
@pytest.mark.large
@pytest.mark.parametrize("n", [BEYOND - 1, BEYOND + 2])
def test_softmax_of_one_row_beyond_32_bits(n: int, room: Callable[[int], None], draw: Callable[..., Tensor]) -> None:
    room(32)
    x = draw(n, dtype=torch.bfloat16)
    y = softmax(x, 0)
    largest = max(float(x[part].max()) for part in chunks(n, 2**26))
    total = sum(float((x[part].double() - largest).exp().sum()) for part in chunks(n, 2**26))
    for part in chunks(n, 2**26):
        expected = (x[part].double() - largest).exp() / total
        wrong = ((y[part].double() - expected).abs() > RELATIVE_BFLOAT16 * expected).nonzero()
        assert not len(wrong), f"{len(wrong)} wrong, the first at {part.start + int(wrong[0])} of {n}"
    dy = x  # as good as any other
    dot = sum(float((dy[part].double() * y[part].double()).sum()) for part in chunks(n, 2**26))
    dx = softmax_backward(dy, y, 0)
    for part in chunks(n, 2**26):
        gradient, kept = dy[part].double(), y[part].double()
        expected = kept * (gradient - dot)
        # The sum is of numbers below 8, of which some 600 additions each round by 2^-24.
        bound = RELATIVE_BFLOAT16 * expected.abs() + kept * 2.0**-13
        wrong = ((dx[part].double() - expected).abs() > bound).nonzero()
        assert not len(wrong), f"gradient: {len(wrong)} wrong, the first at {part.start + int(wrong[0])} of {n}"


@needs_cuda
@pytest.mark.large
def test_softmax_of_rows_of_one_element_beyond_32_bits(room: Callable[[int], None], draw: Callable[..., Tensor]) -> None:
    room(24)
    n = 2_200_000_000
    x = draw(n, 1, dtype=torch.bfloat16)
    y = softmax(x, 1)
    dx = softmax_backward(x, y, 1)
    for part in chunks(n, 2**28):
        assert (y[part] == 1).all(), f"from row {part.start}"
        assert (dx[part] == 0).all(), f"gradient from row {part.start}"


@needs_cuda
@pytest.mark.large
@pytest.mark.parametrize("shape", [(1_100_000_000, 2), (262_145, 8192)], ids=str)
def test_softmax_of_many_rows_beyond_32_bits(
    shape: tuple[int, int], room: Callable[[int], None], draw: Callable[..., Tensor]
) -> None:
    """Every chunk of rows as it is alone, and near the float64 value."""
    room(32)
    x, dy = draw(*shape, dtype=torch.bfloat16), draw(*shape, dtype=torch.bfloat16)
    y = softmax(x, 1)
    dx = softmax_backward(dy, y, 1)
    for part in chunks(shape[0], 2**26 // shape[1]):
        assert_same_bits(softmax(x[part], 1), y[part], f"rows from {part.start}")
        assert_same_bits(softmax_backward(dy[part], y[part], 1), dx[part], f"gradient, rows from {part.start}")
        expected = torch.softmax(x[part].double(), 1)
        assert ((y[part].double() - expected).abs() <= RELATIVE_BFLOAT16 * expected).all(), f"rows from {part.start}"


@needs_cuda
@pytest.mark.large
def test_softmax_across_memory_beyond_32_bits(room: Callable[[int], None], draw: Callable[..., Tensor]) -> None:
    room(32)
    shape = (2**16 + 3, 2**15 + 1)
    x, dy = draw(*shape, dtype=torch.bfloat16), draw(*shape, dtype=torch.bfloat16)
    y = softmax(x, 0)
    dx = softmax_backward(dy, y, 0)
    for part in chunks(shape[1], 1024):
        expected = torch.softmax(x[:, part].double(), 0)
        assert ((y[:, part].double() - expected).abs() <= RELATIVE_BFLOAT16 * expected).all(), f"columns from {part.start}"
        kept, gradient = y[:, part].double(), dy[:, part].double()
        expected = kept * (gradient - (gradient * kept).sum(0))
        bound = RELATIVE_BFLOAT16 * expected.abs() + kept * 2.0**-13
        assert ((dx[:, part].double() - expected).abs() <= bound).all(), f"gradient, columns from {part.start}"


# ---- The benchmark ---------------------------------------------------------------------------------------------------


@needs_cuda
def test_benchmark_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It runs to its end on small tensors of every activation; how long they take is no matter here."""
    monkeypatch.setattr(cases_module, "QUICK_CUDA_SIZES", (1, 100_003))
    monkeypatch.setattr(cases_module, "QUICK_CUDA_SOFTMAX_SHAPES", (("rows", (100, 33), -1), ("columns", (33, 100), 0)))
    monkeypatch.setattr(program, "CASE_SECONDS", {True: 0.0, False: 0.0})
    monkeypatch.setattr(CallTimer, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(CudaTimer, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(CudaTimer, "MOST_FLUSHES", 1)
    path = tmp_path / "report.json"
    dtypes = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    assert program.main(["--quick", "--device", "cuda", "--no-compile", "--dtypes", *dtypes, "--json", str(path)]) == 0
    assert "wall time per call" in capsys.readouterr().out
    report = Report.load(path)
    assert {row.op for row in report.rows} == set(_registry.rows)
    for row in report.rows:
        assert (row.call is not None) == (row.elements <= 65536)
        assert 0 < row.ours.median < 1


if not torch.cuda.is_available():  # at the end, so that the file is read in any case
    pytest.skip(str(MISSING), allow_module_level=True)
