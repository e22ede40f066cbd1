"""Maxout: bit for bit torch's max over groups, its index, its gradient; layouts, autograd, bad calls, the module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYOUTS, THREAD_COUNTS, bits, each_layout
from torch import Tensor, nn

import fastact

op, backward_op = torch.ops.fastact.maxout.default, torch.ops.fastact.maxout_backward.default

# Shape, pieces, dim: neighbours in memory and far apart, more than one unit of work, tails, one group, one piece, none.
CASES = [
    *(((4,), 2, 0), ((6,), 6, 0), ((5, 7), 1, 1), ((600, 6), 3, 1), ((3, 510), 255, 1), ((40, 8), 2, -1), ((0, 4), 2, 1)),
    *(
        ((2, 6, 5), 2, 1),
        ((2, 4, 70, 70), 2, 1),
        ((3, 4, 7, 6), 2, -1),
        ((3, 4, 7, 6), 4, 1),
        ((8, 3, 5), 4, 0),
        ((2, 0, 3), 2, 1),
    ),
]


def reference(x: Tensor, pieces: int, dim: int = 1) -> Any:
    dim %= x.dim()
    return x.unflatten(dim, (x.shape[dim] // pieces, pieces)).max(dim + 1)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Whole ones, so that many are equal, some -0.0; with NaN and infinities."""
    x = torch.randint(-2, 3, shape, generator=generator).to(torch.float64)
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, -0.0, x)
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.where(torch.rand(shape, generator=generator) < 0.05, value, x)
    return x.to(dtype)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@each_layout
def test_is_torchs_bit_for_bit(layout: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Values, which of equal ones, and the gradient with all its zeros."""
    for shape, pieces, dim in CASES:
        x = LAYOUTS[layout](numbers(shape, dtype, generator)).detach().requires_grad_()
        y, index = op(x, pieces, dim)
        expected = reference(x, pieces, dim)
        assert torch.equal(index.long(), expected.indices), (shape, pieces, dim)
        assert index.dtype == torch.uint8
        same = (bits(y) == bits(expected.values)) | (y.isnan() & expected.values.isnan())
        assert same.all(), (shape, pieces, dim)
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
        for gradient in (dy, LAYOUTS["reversed"](dy), LAYOUTS["gaps"](dy)):
            (dx,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
            (wanted,) = torch.autograd.grad(expected.values, x, gradient, retain_graph=True)
            assert torch.equal(bits(dx), bits(wanted)), (shape, pieces, dim)


@each_layout
def test_strides_without_data(layout: str, generator: torch.Generator) -> None:
    """Those of the kernels, which keep the order of the dimensions in memory."""
    for shape, pieces, dim in CASES:
        x = LAYOUTS[layout](torch.rand(shape, generator=generator))
        meta = torch.empty_strided(x.shape, x.stride(), device="meta")
        y, index = op(x, pieces, dim)
        hollow, hollow_index = op(meta, pieces, dim)
        assert hollow.stride() == hollow_index.stride() == y.stride() == index.stride()
        assert hollow.shape == y.shape
        dx, hollow_dx = backward_op(y, index, pieces, dim), backward_op(hollow, hollow_index, pieces, dim)
        assert (hollow_dx.shape, hollow_dx.stride()) == (dx.shape, dx.stride())
        assert dx.shape == x.shape


def test_does_not_depend_on_threads(dtype: torch.dtype, generator: torch.Generator) -> None:
    for shape, pieces in [((30000, 6), 3), ((3, 8, 200, 100), 2)]:
        x = numbers(shape, dtype, generator)
        found = []
        for count in THREAD_COUNTS:
            torch.set_num_threads(count)
            y, index = op(x, pieces, 1)
            found.append((bits(y), index, bits(backward_op(y, index, pieces, 1))))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("shape", "pieces", "dim"), [((2, 6, 3), 2, 1), ((4, 6), 3, -1), ((6,), 6, 0)])
def test_gradcheck(shape: tuple[int, ...], pieces: int, dim: int, generator: torch.Generator) -> None:
    # All different, by more than gradcheck moves them.
    count = torch.Size(shape).numel()
    x = torch.randperm(count, generator=generator).to(torch.float64).reshape(shape).requires_grad_()

    def f(x: Tensor) -> Tensor:
        return fastact.maxout(x, pieces, dim)

    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: f(x) ** 2, x, check_fwd_over_rev=True, check_batched_grad=True)
    torch.testing.assert_close(torch.func.vmap(f)(x[None]), f(x)[None])
    torch.testing.assert_close(
        torch.func.hessian(lambda x: f(x).sin().sum())(x),
        torch.func.hessian(lambda x: reference(x, pieces, dim).values.sin().sum())(x),
    )


@each_layout
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_opcheck(layout: str, grad: bool, generator: torch.Generator) -> None:
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    checks = checks if grad else checks[:3]
    x = LAYOUTS[layout](torch.rand(2, 6, 3, generator=generator)).detach().requires_grad_(grad)
    index = op(x.detach(), 2, 1)[1]
    dy = torch.rand(2, 3, 3, generator=generator).requires_grad_(grad)
    for run, tensors in [(op, (x,)), (backward_op, (dy, index))]:
        assert torch.library.opcheck(run, (*tensors, 2, 1), test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


def test_saves_a_byte_per_result(generator: torch.Generator) -> None:
    saved: list[Tensor] = []
    x = torch.rand(4, 6, 5, generator=generator).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fastact.maxout(x, 3)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.uint8, y.shape)]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: fastact.maxout(x, 4), ValueError, "pieces must be positive and divide size 6 of dim 1, but is 4"),
        (lambda x: fastact.maxout(x, 0), ValueError, "pieces must be positive"),
        (lambda x: fastact.maxout(x, -2), ValueError, "pieces must be positive"),
        (lambda x: fastact.maxout(x, 2, 3), IndexError, "out of range"),
        (lambda x: fastact.maxout(x, 2, -4), IndexError, "out of range"),
        (lambda x: fastact.maxout(x[0, 0, 0], 1), IndexError, "no dimensions"),
        (lambda x: fastact.maxout(x, 2.0), TypeError, r"argument 'pieces' \(position 2\) must be int, not float"),
        (lambda x: fastact.maxout(x, True), TypeError, r"argument 'pieces' \(position 2\) must be int, not bool"),
        (lambda x: fastact.maxout(x, 2, np.float64(1)), TypeError, r"argument 'dim' \(position 3\) must be int, not float64"),
        (lambda x: fastact.maxout(x, 2, np.int64(3)), IndexError, "out of range"),
        (lambda x: fastact.maxout(x, 2**64), ValueError, "pieces must be positive"),
        (lambda x: fastact.maxout(x, 2, 2**63), ValueError, "Overflow"),  # as torch's unflatten
        (lambda x: fastact.maxout(x, 2, "a"), TypeError, r"argument 'dim' \(position 3\) must be int, not str"),
        (lambda x: fastact.maxout(x.tolist(), 2), TypeError, r"argument 'x' \(position 1\) must be Tensor, not list"),
        (lambda x: op(x, 4, 1), ValueError, "pieces is 4, which does not divide size 6 of dim 1"),
        (lambda x: op(x, 256, 1), ValueError, "pieces must be from 1 to 255"),
        (lambda x: op(x, 2, 3), IndexError, "out of range"),
        (lambda x: op(x.int(), 2, 1), NotImplementedError, "not implemented for 'Int'"),
        (lambda x: backward_op(x, x, 2, 1), RuntimeError, "index must be uint8"),
        (lambda x: backward_op(x, x[0].byte(), 2, 1), RuntimeError, "dy has shape"),
    ],
)
def test_bad_calls(make: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(torch.ones(2, 6, 3))


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_other_integers(number: Callable[[int], Any], generator: torch.Generator) -> None:
    """As torch's unflatten takes them."""
    x = torch.randn(2, 6, 4, generator=generator)
    for dim in (1, 2):
        expected = reference(x, 2, dim).values
        assert torch.equal(fastact.maxout(x, number(2), dim), expected)
        assert torch.equal(fastact.maxout(x, 2, number(dim)), expected)


def test_without_a_kernel_it_is_torchs(generator: torch.Generator) -> None:
    x = torch.randint(-9, 9, (2, 512, 3), generator=generator)
    for t, pieces in [(x, 2), (x.float(), 256), (x.byte(), 4)]:
        assert torch.equal(fastact.maxout(t, pieces), reference(t, pieces).values)


def test_torch_sees_it(generator: torch.Generator) -> None:
    """As a function that can be overridden, a subclass that stays itself, a graph of torch's own ops."""
    x = torch.rand(2, 6, generator=generator)

    class Labelled(Tensor):
        pass

    assert type(fastact.maxout(x.as_subclass(Labelled), 2)) is Labelled
    seen: list[Any] = []

    class Other:
        @staticmethod
        def __torch_function__(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
            seen.append((func, args[1:]))
            return "handled"

    assert fastact.maxout(Other(), 2, dim=1) == "handled"  # type: ignore[arg-type]
    assert seen == [(fastact.maxout, (2, 1))]
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x: fastact.maxout(x, 2) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), fastact.maxout(x, 2) + 1)
    assert "fastact" not in graphs[0]


def test_module(generator: torch.Generator) -> None:
    module = fastact.Maxout(3, dim=-1)
    assert repr(module) == "Maxout(pieces=3, dim=-1)"
    assert not module.state_dict()
    x = torch.rand(4, 5, 6, generator=generator)
    for m in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(m(x), fastact.maxout(x, 3, -1))
    network = nn.Sequential(nn.Linear(4, 12), fastact.Maxout(3), nn.Linear(4, 1))
    network(torch.rand(7, 4, generator=generator)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())
