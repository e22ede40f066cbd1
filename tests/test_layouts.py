"""A result does not depend on where its input lies in memory, on what lies around it, or on how many threads there are.

Every comparison is bit for bit, with the result for a fresh contiguous tensor of the same values. Only softmax on CUDA, whose
sums follow the order of the elements in memory, may give another last digit in another layout: see `softmax_slack`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ELEMENTWISE, THREAD_COUNTS, bits, parameter_sets, softmax_slack
from torch import Tensor

from fastact import _C
from fastact._registry import Row

GRAIN = 32768  # elements from which several threads share the work, whatever the op


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """Unless a test asks for more: most inputs are small, and on a busy machine threads wait for one another."""
    torch.set_num_threads(1)


def assert_same_bits(actual: Tensor, expected: Tensor, what: str, x: Tensor | None = None, slack: Tensor | None = None) -> None:
    """With a slack: the same to within it."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    wrong = bits(actual) != bits(expected)
    if slack is not None:
        largest = torch.finfo(expected.dtype).max  # an infinity is next to it
        distance = (actual.double().clamp(-largest, largest) - expected.double().clamp(-largest, largest)).abs()
        wrong &= ~(distance <= slack) & ~(actual.isnan() & expected.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        shown = f"x = {x[at].item()!r}, " if x is not None else ""
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: {shown}"
            f"expected {expected[at].item()!r}, got {actual[at].item()!r}"
        )


def random_values(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Of all signs and sizes, finite: NaN is what guards are made of."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 4
    return (x * 10.0 ** torch.randint(-3, 3, shape, generator=generator)).clamp(-6e4, 6e4).to(dtype)


def arguments(row: Row, dim: int = -1) -> tuple[float, ...]:
    """What the ops of a row take after the tensors."""
    return tuple(row.parameters.values()) if row in ELEMENTWISE else (dim,)


def all_arguments(row: Row) -> list[tuple[float, ...]]:
    return parameter_sets(row) if row in ELEMENTWISE else [(-1,)]


def saved_for(row: Row, x: Tensor, *args: float) -> Tensor:
    return x if row in ELEMENTWISE and row.saves_input(*args) else row.op(x, *args)


def slack_of(row: Row, dim: float, y: Tensor, dy: Tensor | None = None) -> Tensor | None:
    """What another layout may change: of elementwise activations nothing, on any device."""
    return None if row in ELEMENTWISE else softmax_slack(y.dtype, int(dim), y, dy, logarithm=row.name == "log_softmax")


# ---- Offsets, lengths, guards ----------------------------------------------------------------------------------------

OFFSETS, LENGTHS = range(16), range(131)
WIDTH = 192  # of a guarded buffer: a multiple of a cache line for every dtype, so that offset 0 is aligned


def guarded(values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The first n values at every offset, each in a buffer of its own that is NaN elsewhere; the buffers and the slices."""
    position = torch.arange(WIDTH) - torch.tensor(OFFSETS)[:, None, None]
    inside = (position >= 0) & (position < torch.tensor(LENGTHS)[:, None])
    buffers = torch.where(inside, values[position.clamp(0, len(values) - 1)], math.nan)
    slices = [
        buffers.as_strided((n,), (1,), (offset * len(LENGTHS) + n) * WIDTH + offset) for offset in OFFSETS for n in LENGTHS
    ]
    assert buffers.data_ptr() % 64 == 0
    return buffers, slices


def check_slices(results: list[Tensor], expected: list[Tensor], what: str) -> None:
    """expected: for every length; results: for every offset and length."""
    actual = torch.cat(results)
    wanted = torch.cat(expected).repeat(len(OFFSETS))
    if actual.numel() == wanted.numel() and torch.equal(bits(actual), bits(wanted)):
        return
    for (offset, n), result in zip(itertools.product(OFFSETS, LENGTHS), results, strict=True):
        assert_same_bits(result, expected[n], f"{what}, offset {offset}, length {n}")
    raise AssertionError(f"{what}: wrong lengths")


def test_offsets(any_row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Inputs that start anywhere in a vector, forward: nothing beyond them is read into the result."""
    args = arguments(any_row)
    values = random_values((WIDTH,), dtype, generator)
    buffers, slices = guarded(values)
    before = buffers.clone()
    if any_row in ELEMENTWISE:  # whole vectors, which have no tail
        expected = [any_row.op(values, *args)[:n] for n in LENGTHS]
    else:
        expected = [any_row.op(values[:n].clone(), *args) for n in LENGTHS]
    what = f"{any_row.name} {dtype} {isa}"
    check_slices([any_row.op(x, *args) for x in slices], expected, what)
    assert_same_bits(buffers, before, f"{what}: the input")


def test_offsets_backward(any_row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """The same for dy and for the saved tensor, each alone and both at different offsets."""
    args = arguments(any_row)
    what = f"{any_row.name} {dtype} {isa}"
    x, grads = (random_values((WIDTH,), dtype, generator) for _ in range(2))
    # The front of softmax's output is not one itself, which does not matter here.
    kept = saved_for(any_row, x, *args)
    saved_buffers, saved = guarded(kept)
    dy_buffers, dy = guarded(grads)
    before = saved_buffers.clone(), dy_buffers.clone()
    plain_saved, plain_dy = ([t[:n].clone() for n in LENGTHS] for t in (kept, grads))
    if any_row in ELEMENTWISE:
        expected = [any_row.backward_op(grads, kept, *args)[:n] for n in LENGTHS]
    else:
        expected = [any_row.backward_op(g, s, *args) for g, s in zip(plain_dy, plain_saved, strict=True)]
    reversed_saved = [saved[offset * len(LENGTHS) + n] for offset in reversed(OFFSETS) for n in LENGTHS]
    for part, gs, ss in [
        ("dy", dy, plain_saved * len(OFFSETS)),
        ("saved", plain_dy * len(OFFSETS), saved),
        ("both", dy, reversed_saved),
    ]:
        check_slices(
            [any_row.backward_op(g, s, *args) for g, s in zip(gs, ss, strict=True)], expected, f"{what}, {part} at an offset"
        )
    assert_same_bits(saved_buffers, before[0], f"{what}: the saved tensor")
    assert_same_bits(dy_buffers, before[1], f"{what}: dy")


def test_offsets_in_place(row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Nothing beyond the tensor is written."""
    args = arguments(row)
    values = random_values((WIDTH,), dtype, generator)
    buffers, slices = guarded(values)
    expected, _ = guarded(row.op(values, *args))
    in_place = getattr(torch.ops.fastact, row.name + "_")
    for x in slices:
        in_place(x, *args)
    assert_same_bits(buffers, expected, f"{row.name} {dtype} {isa} in place; (offset, length, position)")


def test_guarded_rows(any_row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Matrices between NaN: their last rows are where a kernel that takes several rows at a time might reach too far."""
    args = arguments(any_row)
    for rows, n in itertools.product([1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33], [1, 2, 3, 7, 8, 9, 10, 16, 21, 33, 63, 64, 65]):
        x = random_values((rows, n), dtype, generator)
        buffer = torch.full((rows * n + 200,), math.nan, dtype=dtype)
        inside = buffer[101 : 101 + rows * n].view(rows, n)
        inside.copy_(x)
        before = buffer.clone()
        what = f"{any_row.name} {dtype} {isa}, {rows} rows of {n}"
        y = any_row.op(x, *args)
        assert_same_bits(any_row.op(inside, *args), y, what, x)
        dx = any_row.backward_op(x, saved_for(any_row, x, *args), *args)
        assert_same_bits(any_row.backward_op(inside, saved_for(any_row, inside, *args), *args), dx, f"{what}, gradient", x)
        assert_same_bits(buffer, before, f"{what}: the input")


# ---- Layouts ---------------------------------------------------------------------------------------------------------


def every_other(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x in every second place of `dims`, with NaN between."""
    wide = torch.full([2 * s + 1 if d in dims else s for d, s in enumerate(x.shape)], math.nan, dtype=x.dtype)
    view = wide[tuple(slice(1, None, 2) if d in dims else slice(None) for d in range(x.dim()))]
    return view.copy_(x)


def padded(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x in the middle of a larger tensor of NaN."""
    wide = torch.full([s + 3 if d in dims else s for d, s in enumerate(x.shape)], math.nan, dtype=x.dtype)
    view = wide[tuple(slice(1, 1 + s) if d in dims else slice(None) for d, s in enumerate(x.shape))]
    return view.copy_(x)


def lone_dims(x: Tensor) -> Tensor:
    """x with dimensions of one element whose strides mean nothing."""
    return x.as_strided((1, *x.shape, 1), (7, *x.stride(), 12345))


def negative_view(x: Tensor) -> Tensor:
    """x as the imaginary part of a conjugate: strided, and its elements are stored with the other sign."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The values of a 4-D tensor in other layouts."""
    yield "contiguous", x.clone()
    for order in itertools.permutations(range(4)):
        inverse = [order.index(d) for d in range(4)]
        yield f"stored in the order {order}", x.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)
    yield "channels_last", x.clone(memory_format=torch.channels_last)
    for dims in [(0,), (1,), (2,), (3,), (1, 3), (0, 1, 2, 3)]:
        yield f"every other of {dims}", every_other(x, dims)
        yield f"padded in {dims}", padded(x, dims)
    yield "a column of the last dim", padded(x[..., None], (4,))[..., 0]
    yield "every other, transposed", every_other(x.transpose(1, 3), (2,)).transpose(1, 3)
    yield "padded channels_last", padded(x.permute(0, 2, 3, 1), (3,)).permute(0, 3, 1, 2)
    if x.dtype in (torch.float64, torch.float32):
        yield "real part", torch.complex(x, torch.full_like(x, math.nan)).real
        yield "negative view", negative_view(x)


def test_layouts(any_row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    x = random_values((3, 5, 4, 6), dtype, generator)
    for args in all_arguments(any_row) if any_row in ELEMENTWISE else [(dim,) for dim in range(-4, 4)]:
        expected = any_row.op(x, *args)
        slack = None if any_row in ELEMENTWISE else slack_of(any_row, args[0], expected)
        for name, view in layouts(x):
            before = view.clone()
            what = f"{any_row.name}{args} {dtype} {isa}, {name}"
            assert_same_bits(any_row.op(view, *args), expected, what, x, slack)
            assert_same_bits(view, before, f"{what}: the input")
        x5, e5 = lone_dims(x), lone_dims(expected)
        args5 = args if any_row in ELEMENTWISE else (args[0] % 4 + 1,)
        assert_same_bits(any_row.op(x5, *args5), e5, f"{any_row.name}{args} {dtype} {isa}, dims of one element", x5)


def test_layouts_backward(any_row: Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Every layout of dy with every layout of the saved tensor."""
    x = random_values((3, 5, 4, 6), dtype, generator)
    dy = random_values((3, 5, 4, 6), dtype, generator)
    args = arguments(any_row, dim=1)
    saved = saved_for(any_row, x, *args)
    expected = any_row.backward_op(dy, saved, *args)
    slack = slack_of(any_row, 1, saved, dy)
    saved_layouts = list(layouts(saved))
    for dy_name, dy_view in layouts(dy):
        for saved_name, saved_view in saved_layouts:
            what = f"{any_row.name} {dtype}, dy {dy_name}, saved {saved_name}"
            assert_same_bits(any_row.backward_op(dy_view, saved_view, *args), expected, what, slack=slack)
        assert_same_bits(dy_view, dy, f"{any_row.name} {dtype}, dy {dy_name}: dy after backward")
    for saved_name, saved_view in saved_layouts:
        assert_same_bits(saved_view, saved, f"{any_row.name} {dtype}, saved {saved_name}: the saved tensor after backward")


def test_layouts_in_place(row: Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    """The input's elements are written, and no other of its storage."""
    x = random_values((3, 5, 4, 6), dtype, generator)
    args = arguments(row)
    expected = row.op(x, *args)
    in_place = getattr(torch.ops.fastact, row.name + "_")
    for name, view in layouts(x):
        storage = torch.empty(0, dtype=dtype).set_(view.untyped_storage())
        expected_storage = storage.clone()
        expected_storage.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(
            -expected if view.is_neg() else expected
        )
        before = view.stride(), view._version
        in_place(view, *args)
        what = f"{row.name} {dtype} in place, {name}"
        assert_same_bits(view, expected, what, x)
        assert_same_bits(storage, expected_storage, f"{what}: the whole storage")
        assert (view.stride(), view._version) == (before[0], before[1] + 1), what


def expanded(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Tensors some of whose elements are one in memory."""
    yield "a number", x[0, 0, 0, 0].expand(x.shape)
    for dim in range(4):
        yield f"expanded in {dim}", x.narrow(dim, 1, 1).expand(x.shape)
    yield "expanded in 0 and 2", x[:1, :, :1].expand(x.shape)
    yield "a new first dim", x[0].expand(x.shape)
    yield "expanded and transposed", x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)[:, :1].expand(x.shape)
    yield "windows", x.flatten()[:30].unfold(0, 6, 1)[:20].view(5, 4, 6).expand(x.shape)
    yield "step 0 and 2", x.flatten().as_strided(x.shape, (0, 1, 2, 3))


def test_expanded(any_row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """As inputs, as saved tensors and, what y.sum().backward() gives, as dy."""
    x = random_values((3, 5, 4, 6), dtype, generator)
    dy = random_values((3, 5, 4, 6), dtype, generator)
    args = arguments(any_row, dim=2)
    y = any_row.op(x, *args)
    for name, view in expanded(x):
        plain = view.contiguous().clone()
        what = f"{any_row.name} {dtype} {isa}, {name}"
        plain_y = any_row.op(plain, *args)
        assert_same_bits(any_row.op(view, *args), plain_y, what, plain, slack_of(any_row, 2, plain_y))

        def compare(pair: tuple[Tensor, Tensor], plain_pair: tuple[Tensor, Tensor], what: str) -> None:
            actual, expected = (any_row.backward_op(*tensors, *args) for tensors in (pair, plain_pair))
            assert_same_bits(actual, expected, what, plain_pair[0], slack_of(any_row, 2, plain_pair[1], plain_pair[0]))

        compare((dy, view), (dy, plain), f"{what}, as saved")
        for layout, saved in [("", y), (" to channels_last", y.contiguous(memory_format=torch.channels_last))]:
            compare((view, saved), (plain, y), f"{what}, as dy{layout}")
        compare((view, view), (plain, plain), f"{what}, as dy and saved")
        assert_same_bits(view, plain, f"{what}: the input")


def test_in_place_on_shared_elements_is_refused(row: Row, dtype: torch.dtype) -> None:
    x = torch.ones(1, dtype=dtype)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"):
        getattr(torch.ops.fastact, row.name + "_")(x.expand(4), *arguments(row))
    assert x.item() == 1


# ---- Random layouts and strides --------------------------------------------------------------------------------------


def draw(choices: list[int], generator: torch.Generator) -> int:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def random_layout(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A slice, with steps, of a permuted tensor of 0 to 5 dimensions, some of one or no elements, some expanded."""
    sizes = [draw([0, 1, 1, 2, 2, 3, 3, 4, 5, 7, 9], generator) for _ in range(draw([0, 1, 2, 2, 3, 3, 4, 4, 5], generator))]
    starts, steps = ([draw([low, low, low, 1, 2], generator) for _ in sizes] for low in (0, 1))
    if draw([0, 1], generator):
        starts, steps = [0] * len(sizes), [1] * len(sizes)
    base = [start + size * step for start, size, step in zip(starts, sizes, steps, strict=True)]
    x = random_values(tuple(base), dtype, generator)
    x = x[tuple(slice(start, None, step) for start, step in zip(starts, steps, strict=True))]
    x = x.permute(torch.randperm(x.dim(), generator=generator).tolist())
    if draw([0, 0, 1], generator):
        x = x.expand([draw([1, 3], generator) if size == 1 else size for size in x.shape])
    return x


def is_dense(x: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def strides(x: Tensor) -> list[int]:
    """Where they mean something: the stride of a dimension of one element is never used."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size != 1]


def test_random_layouts(any_row: Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    dense = 0
    for k in range(200):
        x = random_layout(dtype, generator)
        args = arguments(any_row, draw(list(range(-max(x.dim(), 1), max(x.dim(), 1))), generator))
        what = f"{any_row.name}{args} {dtype}, layout {k}: sizes {tuple(x.shape)}, strides {x.stride()}"
        plain = x.clone(memory_format=torch.contiguous_format)
        before, version = plain.clone(), x._version
        y = any_row.op(x, *args)
        expected = any_row.op(plain, *args)
        assert_same_bits(y, expected, what, plain, None if any_row in ELEMENTWISE else slack_of(any_row, args[0], expected))
        dense += is_dense(x)
        if any_row in ELEMENTWISE:
            assert y.stride() == torch.sigmoid(x).stride() or is_dense(x), f"{what}: result has strides {y.stride()}"
        if x.numel() and is_dense(x):
            assert strides(y) == strides(x), f"{what}: result has strides {y.stride()}"

        # A gradient in a layout of its own.
        order = torch.randperm(x.dim(), generator=generator).tolist()
        dy = random_values(tuple(x.permute(order).shape), dtype, generator).permute([order.index(d) for d in range(x.dim())])
        saved = saved_for(any_row, x, *args)
        dx = any_row.backward_op(dy, saved, *args)
        # The same saved values, so that only the layouts differ.
        plain_dx = any_row.backward_op(dy.contiguous(), saved.clone(memory_format=torch.contiguous_format), *args)
        slack = None if any_row in ELEMENTWISE else slack_of(any_row, args[0], saved, dy)
        assert_same_bits(dx, plain_dx, f"{what}, gradient", plain, slack)
        assert_same_bits(x, before, f"{what}: the input")
        assert x._version == version, f"{what}: the input's version"
    # So that both kinds stay among what is drawn.
    assert 20 < dense < 180


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_memory_format_goes_through(any_row: Row, memory_format: torch.memory_format, generator: torch.Generator) -> None:
    """Forward and backward, as in a convolutional network."""
    x = random_values((2, 3, 4, 5), torch.float32, generator).contiguous(memory_format=memory_format).requires_grad_()
    args = arguments(any_row, dim=1)
    y = any_row.op(x, *args)
    assert y.is_contiguous(memory_format=memory_format)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.is_contiguous(memory_format=memory_format)


# ---- Position, neighbours, chunks ------------------------------------------------------------------------------------


def test_position_and_neighbours(row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Shuffled, in chunks of 37 and one by one, each element gives what it gave."""
    x, dy = (random_values((2050,), dtype, generator) for _ in range(2))
    order = torch.randperm(len(x), generator=generator)
    for args in parameter_sets(row):
        what = f"{row.name}{args} {dtype} {isa}"

        def forward(x: Tensor, dy: Tensor, args: tuple[float, ...] = args) -> Tensor:
            return row.op(x, *args)

        def backward(x: Tensor, dy: Tensor, args: tuple[float, ...] = args) -> Tensor:
            return row.backward_op(dy, saved_for(row, x, *args), *args)

        for way, f in [("forward", forward), ("backward", backward)]:
            whole = f(x, dy)
            assert_same_bits(f(x[order], dy[order]), whole[order], f"{what} {way}, shuffled", x[order])
            chunks = [f(*pair) for pair in zip(x.split(37), dy.split(37), strict=True)]
            assert_same_bits(torch.cat(chunks), whole, f"{what} {way}, in chunks", x)
            singles = [f(*pair) for pair in zip(x[:300].split(1), dy[:300].split(1), strict=True)]
            assert_same_bits(torch.cat(singles), whole[:300], f"{what} {way}, one by one", x)
            numbers = [f(*pair) for pair in zip(x[:300].unbind(), dy[:300].unbind(), strict=True)]
            assert_same_bits(torch.stack(numbers), whole[:300], f"{what} {way}, 0-dim", x)


# ---- Threads ---------------------------------------------------------------------------------------------------------


def with_threads(count: int, f: Callable[[], Tensor]) -> Tensor:
    torch.set_num_threads(count)
    try:
        return f()
    finally:
        torch.set_num_threads(1)


@pytest.mark.cpu_only("the threads of the CPU")
def test_threads_are_used() -> None:
    """Else the tests below would compare one thread with itself."""
    torch.set_num_threads(3)
    assert _C.parallel_threads() == 3


@pytest.mark.parametrize("size", [GRAIN - 1, GRAIN, GRAIN + 1, 2 * GRAIN + 1, 3 * GRAIN - 1, 100003])
def test_threads(row: Row, dtype: torch.dtype, size: int, generator: torch.Generator) -> None:
    """Against the same elements in chunks that one thread computes."""
    x, dy = (random_values((size,), dtype, generator) for _ in range(2))
    args = arguments(row)
    in_place = getattr(torch.ops.fastact, row.name + "_")
    y = torch.cat([row.op(part, *args) for part in x.split(9973)])
    saved = x if row.saves_input(*args) else y
    dx = torch.cat([row.backward_op(g, s, *args) for g, s in zip(dy.split(9973), saved.split(9973), strict=True)])
    # Not aligned, and every other element: the copy that this takes is shared among threads too.
    slice_, sparse = torch.cat([x[:1], x])[1:], torch.stack([x, x], 1)[:, 0]
    x_before, dy_before = x.clone(), dy.clone()
    for count in THREAD_COUNTS:
        what = f"{row.name} {dtype}, {size} elements, {count} threads"
        for name, view in [("contiguous", x), ("at an offset", slice_), ("every other", sparse)]:
            assert_same_bits(with_threads(count, lambda view=view: row.op(view, *args)), y, f"{what}, {name}", x)
        assert_same_bits(with_threads(count, lambda: row.backward_op(dy, saved, *args)), dx, f"{what}, gradient", x)
        target = torch.cat([torch.full((16,), math.nan, dtype=dtype), x, torch.full((16,), math.nan, dtype=dtype)])
        with_threads(count, lambda target=target: in_place(target[16:-16], *args))
        assert_same_bits(target[16:-16], y, f"{what}, in place", x)
        assert target[:16].isnan().all(), f"{what}, in place: written before the tensor"
        assert target[-16:].isnan().all(), f"{what}, in place: written beyond the tensor"
    assert_same_bits(x, x_before, f"{row.name} {dtype}: the input")
    assert_same_bits(dy, dy_before, f"{row.name} {dtype}: dy")


@pytest.mark.parametrize(
    ("shape", "order"),
    [((7, 33, 29, 31), (0, 2, 3, 1)), ((317, 331), (1, 0)), ((3, 5, 7, 1009), (2, 0, 3, 1))],
    ids=["channels_last", "transposed", "permuted"],
)
def test_threads_and_layouts(row: Row, shape: tuple[int, ...], order: tuple[int, ...], generator: torch.Generator) -> None:
    x, dy = (random_values(shape, torch.float32, generator) for _ in range(2))
    inverse = [order.index(d) for d in range(len(shape))]
    permuted_x, permuted_dy = (t.permute(order).contiguous().permute(inverse) for t in (x, dy))
    args = arguments(row)
    y = row.op(x, *args)
    saved = saved_for(row, x, *args)
    dx = row.backward_op(dy, saved, *args)
    assert x.numel() > 2 * GRAIN
    for count in THREAD_COUNTS:
        what = f"{row.name} {shape} {order}, {count} threads"
        result = with_threads(count, lambda: row.op(permuted_x, *args))
        assert_same_bits(result, y, what, x)
        assert result.stride() == permuted_x.stride(), what
        for way, g, s in [
            ("both", permuted_dy, permuted_x if row.saves_input(*args) else result),
            ("dy", permuted_dy, saved),
            ("saved", dy, permuted_x if row.saves_input(*args) else result),
            ("step 2", torch.stack([dy, dy], -1)[..., 0], result),
        ]:
            if way == "step 2" and row.saves_input(*args):
                continue
            got = with_threads(count, lambda g=g, s=s: row.backward_op(g, s, *args))
            assert_same_bits(got, dx, f"{what}, gradient, permuted: {way}", x)


# ---- Empty and 0-dim -------------------------------------------------------------------------------------------------

EMPTY = [
    (0,), (0, 0), (1, 0), (0, 1), (3, 0), (0, 3), (2, 0, 3), (0, 2, 3), (2, 3, 0), (1, 1, 0), (0, 0, 0), (2, 0, 3, 4),
    (2, 3, 0, 4), (2, 3, 4, 0), (0, 3, 4, 5), (1, 0, 1, 1), (2, 0, 0, 2), (1, 2, 3, 4, 0), (0, 64), (65, 0),
]  # fmt: skip


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(any_row: Row, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    args = arguments(any_row)
    for x in [torch.zeros(shape, dtype=dtype), torch.zeros(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])]:
        x.requires_grad_()
        y = any_row.op(x, *args)
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert y.stride() == torch.sigmoid(x).stride()
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert dx.shape == x.shape
        assert dx.dtype == dtype
        assert any_row.backward_op(torch.zeros(shape, dtype=dtype).expand(shape), y.detach(), *args).shape == y.shape
        if any_row in ELEMENTWISE:
            getattr(torch.ops.fastact, any_row.name + "_")(x.detach(), *args)
    # And the next call works.
    one = torch.ones(3, dtype=dtype)
    assert any_row.op(one, *args).isfinite().all()


def test_zero_dim(any_row: Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    x, dy = (random_values((), dtype, generator) for _ in range(2))
    for args in all_arguments(any_row):
        what = f"{any_row.name}{args} {dtype} {isa}"
        y = any_row.op(x, *args)
        assert y.stride() == ()
        assert_same_bits(y, any_row.op(x.reshape(1), *args)[0], what, x)
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(any_row.op(leaf, *args), leaf, dy)
        saved = saved_for(any_row, x, *args)
        assert_same_bits(dx, any_row.backward_op(dy.reshape(1), saved.reshape(1), *args)[0], f"{what}, gradient", x)


# ---- Through autograd ------------------------------------------------------------------------------------------------


def test_gradients_in_any_layout(any_row: Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    """As autograd hands them on: what a sum, a transposition, a slice or a padding makes of a gradient."""
    x = random_values((3, 5, 4, 6), dtype, generator).requires_grad_()
    weights = random_values((3, 5, 4, 6), dtype, generator)
    args = arguments(any_row, dim=1)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda y: y.sum(),
        "mean over 2": lambda y: (y.sum(2) * weights[:, :, 0]).sum(),
        "transposed": lambda y: (y.transpose(1, 3) * weights.transpose(1, 3).contiguous()).sum(),
        "slice": lambda y: (y[:, ::2, 1:3] * weights[:, ::2, 1:3]).sum(),
        "channels_last": lambda y: (y * weights.contiguous(memory_format=torch.channels_last)).sum(),
        "flip": lambda y: (y.flip(3) * weights).sum(),
        "diagonal": lambda y: y.diagonal(0, 1, 3).sum(),
        "one element": lambda y: y[1, 2, 3, 4],
    }
    for name, way in ways.items():
        y = any_row.op(x, *args)
        y.retain_grad()
        (dx,) = torch.autograd.grad(way(y), x, retain_graph=True)
        leaf = y.detach().requires_grad_()
        (dy,) = torch.autograd.grad(way(leaf), leaf)
        saved = saved_for(any_row, x.detach(), *args)
        expected = any_row.backward_op(dy.contiguous().clone(), saved, *args)
        slack = slack_of(any_row, 1, saved, dy)
        assert_same_bits(dx, expected, f"{any_row.name} {dtype}, gradient of {name}", x.detach(), slack)
        # Once more over the same graph: nothing that was kept has changed.
        (again,) = torch.autograd.grad(way(y), x)
        assert_same_bits(again, dx, f"{any_row.name} {dtype}, gradient of {name}, again")
