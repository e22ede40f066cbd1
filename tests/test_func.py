"""torch.func: every transform, alone and one inside another, gives with a kernel what it gives with plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import ALL_ROWS, parameter_sets, smooth_reference
from torch import Tensor
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import fastact
from fastact import _registry

Function = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def no_slow_fallback() -> Iterator[None]:
    """A missing batching rule is an error here, as every warning is, but for two that torch itself causes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch.jit.script` is deprecated", DeprecationWarning)
        warnings.filterwarnings("ignore", r"Attempted to insert a get_attr Node", UserWarning)  # linearize
        yield


def scalar(f: Function) -> Function:
    return lambda x: f(x).square().sum()


# What is made of a function of x, whose shape is (3, 4, 5).
TRANSFORMS: dict[str, Callable[[Function, Tensor], Any]] = {
    "grad": lambda f, x: grad(scalar(f))(x),
    "vjp": lambda f, x: vjp(f, x)[1](x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "linearize": lambda f, x: linearize(f, x)[1](x.cos()),
    "jacrev": lambda f, x: jacrev(f)(x[0]),
    "jacfwd": lambda f, x: jacfwd(f)(x[0]),
    "hessian": lambda f, x: hessian(scalar(f))(x[0, 0]),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(scalar(f)))(x[0, 0]),
    "grad of grad": lambda f, x: grad(lambda t: grad(scalar(f))(t).sum())(x),
    "jvp of jvp": lambda f, x: jvp(lambda t: jvp(f, (t,), (x.cos(),))[1], (x,), (x.sin(),)),
    "vmap": lambda f, x: vmap(f)(x),
    "vmap over the last dim": lambda f, x: vmap(f, in_dims=-1, out_dims=1)(x),
    "vmap in chunks": lambda f, x: vmap(f, in_dims=1, chunk_size=3)(x),
    "vmap of vmap": lambda f, x: vmap(vmap(f, in_dims=1), in_dims=1)(x),
    "vmap of grad": lambda f, x: vmap(grad(scalar(f)))(x),
    "vmap of jvp": lambda f, x: vmap(lambda t, u: jvp(f, (t,), (u,)), in_dims=(1, 0))(x, x.movedim(1, 0).cos()),
    "vmap of hessian": lambda f, x: vmap(hessian(scalar(f)))(x[0]),
    "grad of vmap": lambda f, x: grad(lambda t: scalar(vmap(f, in_dims=1))(t))(x),
}


def calls(row: _registry.Row) -> list[tuple[Any, ...]]:
    return [(0,), (-1,)] if row.along_dim else parameter_sets(row)[:3]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(any_row: _registry.Row, transform: str, generator: torch.Generator) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator)
    make = TRANSFORMS[transform]
    for values in calls(any_row):
        reference = smooth_reference(any_row)
        expected = make(lambda t, values=values, reference=reference: reference(t, *values), x)
        actual = make(lambda t, values=values: any_row.function(t, *values), x)
        # Sums of products of a few numbers, each good to some 2^-50; relative to a value of about 1.
        torch.testing.assert_close(
            actual,
            expected,
            rtol=2.0**-44,
            atol=2.0**-44,
            msg=lambda m, values=values: f"{any_row.name}{values} {transform}: {m}",
        )


def test_the_kernel_runs_once_for_a_batch(any_row: _registry.Row, generator: torch.Generator) -> None:
    """vmap calls the op with the whole batch, wherever that lies, and copies nothing elementwise."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(6, 7, 8, generator=generator)
    values = calls(any_row)[0]
    for in_dims in (0, 1, 2):
        seen.clear()
        with Watch():
            vmap(lambda t: any_row.function(t, *values), in_dims=in_dims, out_dims=in_dims)(x)
        assert seen.count(any_row.op.default) == 1, f"{any_row.name} in_dims {in_dims}: {seen}"
        assert not [func for func in seen if "clone" in str(func) or "copy" in str(func)], f"{any_row.name}: {seen}"


def test_backward_op_batched_in_different_places(any_row: _registry.Row, generator: torch.Generator) -> None:
    x, dy = (torch.rand(3, 4, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    values = calls(any_row)[0]
    for dims in ((0, 0), (1, 1), (0, None), (None, 0), (None, 2)):
        # What is batched along dim d is `x` with that dim taken from the front.
        batched = [
            t if d is None else t.unsqueeze(0).repeat(2, 1, 1, 1).movedim(0, d) for t, d in zip((dy, x), dims, strict=True)
        ]
        got = vmap(lambda a, b: any_row.backward_op(a, b, *values), in_dims=dims)(*batched)
        expected = any_row.backward_op(dy, x, *values)
        for each in got:
            torch.testing.assert_close(each, expected, rtol=2.0**-48, atol=2.0**-50, msg=f"{any_row.name} {dims}")


def test_backward_op_batched_in_two_places(any_row: _registry.Row, generator: torch.Generator) -> None:
    dy, x = (torch.rand(3, 3, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    values = calls(any_row)[0]
    got = vmap(lambda a, b: any_row.backward_op(a, b, *values), in_dims=(2, 0))(dy, x)
    for k in range(3):
        expected = any_row.backward_op(dy[:, :, k].contiguous(), x[k], *values)
        torch.testing.assert_close(got[k], expected, rtol=2.0**-48, atol=2.0**-50, msg=any_row.name)


def test_in_place_under_vmap(row: _registry.Row, generator: torch.Generator) -> None:
    x = torch.randn(3, 4, 5, generator=generator)
    values = parameter_sets(row)[0]

    def f(t: Tensor) -> Tensor:
        t = t * 1
        row.inplace_op(t, *values)
        return t

    assert torch.equal(vmap(f, in_dims=1, out_dims=1)(x), row.op(x, *values))


def test_in_place_under_functionalize(row: _registry.Row, generator: torch.Generator) -> None:
    """A view of x overwritten, so that the rest of x is to follow; and what comes from outside, which is written to."""
    x = torch.randn(3, 4, generator=generator)
    values = parameter_sets(row)[0]
    outside = x.clone()

    def f(t: Tensor) -> Tensor:
        t = t * 1
        row.inplace_op(t[1], *values)
        row.inplace_op(outside, *values)
        return t

    graph = make_fx(functionalize(f))(x.clone())
    expected = x.clone()
    expected[1] = row.op(x[1], *values)
    for g in (functionalize(f), graph):
        outside.copy_(x)
        assert torch.equal(g(x), expected)
        assert torch.equal(outside, row.op(x, *values))
    targets = [node.target for node in graph.graph.nodes]
    assert row.op.default in targets


along_dim = pytest.mark.parametrize("softmax_row", [row for row in ALL_ROWS if row.along_dim], ids=lambda row: row.name)


@along_dim
@pytest.mark.parametrize("dim", [0, -1])
def test_softmax_of_one_number_under_vmap(softmax_row: _registry.Row, dim: int) -> None:
    x = torch.randn(5)
    expected = vmap(lambda t: softmax_row.reference(t, dim))(x)
    assert torch.equal(vmap(lambda t: softmax_row.op(t, dim))(x), expected)
    assert torch.equal(vmap(grad(lambda t: softmax_row.op(t, dim)))(x), torch.zeros(5))


@along_dim
@pytest.mark.parametrize("dim", [1, -2, 7])
def test_dim_out_of_range_under_vmap(softmax_row: _registry.Row, dim: int) -> None:
    with pytest.raises(IndexError, match="Dimension out of range"):
        vmap(lambda t: softmax_row.op(t, dim))(torch.randn(3, 4))


def test_per_sample_gradients(generator: torch.Generator) -> None:
    """The use that people have for all this: a gradient per sample, through a module, equals a loop over the samples."""
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), fastact.Sigmoid(), torch.nn.Linear(8, 3), fastact.Softmax(dim=-1)
    ).double()
    x = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample,)).square().sum()

    batched = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for k, sample in enumerate(x):
        for name, expected in grad(loss)(parameters, sample).items():
            torch.testing.assert_close(batched[name][k], expected, rtol=2.0**-44, atol=2.0**-48)
