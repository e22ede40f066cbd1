"""Gradients of every order, in both modes and in place; and that computing them changes nothing that anyone can see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import ALONG_DIM, DTYPES, ELEMENTWISE, INTEGER, module_class, parameter_sets, smooth_reference, softmax_slack
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

import fastact
from fastact import _registry

# torch itself calls it, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

Unary = Callable[[Tensor], Tensor]

# Name: (shape of a contiguous leaf, the view of it that the activation gets). No dimension that softmax takes has one element,
# because over that the gradient is 0 whatever the formula.
LAYOUTS: dict[str, tuple[tuple[int, ...], Unary]] = {
    "contiguous": ((3, 4), lambda x: x),
    "strided": ((4, 6), lambda x: x[1:, ::2]),
    "0-dim": ((), lambda x: x),
    "empty": ((2, 0, 3), lambda x: x),
    "channels_last": ((2, 2, 2, 3), lambda x: x.permute(0, 3, 1, 2)),
    "transposed": ((4, 3), lambda x: x.t()),
    "expanded": ((1, 4), lambda x: x.expand(3, 4)),
    "three dims": ((2, 3, 4), lambda x: x),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)

WAYS = ["function", "module", "Function"]
each_way = pytest.mark.parametrize("way", WAYS)


def arguments(row: _registry.Row, rank: int) -> list[tuple[Any, ...]]:
    """What may follow x: every parameter set; for softmax the first, middle, last and negative dims."""
    if row in ELEMENTWISE:
        return parameter_sets(row)
    return [(dim,) for dim in sorted({0, rank // 2, rank - 1, -1, -rank})] if rank else [(0,), (-1,)]


def calling(row: _registry.Row, way: str, values: tuple[Any, ...]) -> Unary:
    """The activation with these arguments, called in one of WAYS."""
    if way == "module":
        module: Unary = module_class(row)(*values)
        return module
    function = row.function if way == "function" else getattr(fastact.autograd, row.class_name).apply
    return lambda x: function(x, *values)


def inplace_calls(row: _registry.Row, values: tuple[float, ...]) -> dict[str, Callable[[Tensor], object]]:
    """Every way to overwrite x with the activation of x."""
    op = getattr(torch.ops.fastact, row.name + "_")
    calls: dict[str, Callable[[Tensor], object]] = {"op": lambda x: op(x, *values)}
    public = _registry.rows[_registry.function_of(row.name)]
    if "inplace" in public.arguments and f"result_{row.name}" not in _registry.variants:
        calls["function"] = lambda x: public.function(x, *values, inplace=True)
        calls["module"] = module_class(public)(*values, inplace=True)
    return calls


def saves_a_copy(row: _registry.Row, values: tuple[Any, ...]) -> bool:
    """Whether its module, which works in place, does: test_in_place_saves_the_result."""
    return row.name.startswith("result_") and row.saves_input(*values)


def draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values of both signs and of magnitude 0.1 to 2: off the kinks, by far more than finite differences reach."""
    magnitude = 0.1 + 1.9 * torch.rand(shape, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (sign * magnitude).to(dtype)


def draw_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return draw(tuple(x.shape), generator, x.dtype)


def with_gaps(x: Tensor) -> Tensor:
    """The same elements, no two of them neighbours."""
    return torch.stack([x, x], -1)[..., 0]


def gradient(function: Unary, x: Tensor, dy: Tensor) -> Tensor:
    """dy times the Jacobian of the function at x, in x's layout."""
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(function(leaf), leaf, dy)
    return dx


def bits(x: Tensor) -> Tensor:
    """A copy of the elements in order, as integers of their size."""
    return x.detach().reshape(-1).clone().view(INTEGER[x.element_size()])


def assert_bits(actual: Tensor, expected: Tensor, x: Tensor, case: object) -> None:
    """The same dtype, shape and bits; else the message names the first element that differs."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), case
    different = (bits(actual) != bits(expected)).nonzero()
    if different.numel():
        i = int(different[0])
        element = [t.detach().reshape(-1)[i].item() for t in (x, expected, actual)]
        pytest.fail(f"{case} {actual.dtype}: {different.numel()} of {actual.numel()} elements differ; at flat index {i} "
                    "x={!r} expected={!r} actual={!r}".format(*element))  # fmt: skip


def assert_near(actual: Tensor, expected: Tensor, x: Tensor, case: object, *, rtol: float, atol: float) -> None:
    """Within atol + rtol |expected|, in float64; else the message names the worst element."""
    assert actual.shape == expected.shape, case
    if not actual.numel():
        return
    a, e = (t.detach().double().reshape(-1) for t in (actual, expected))
    excess = (a - e).abs() - (atol + rtol * e.abs())
    i = int(excess.nan_to_num(nan=torch.inf).argmax())
    assert excess[i] <= 0, (
        f"{case} {actual.dtype}: worst at flat index {i}, x={x.detach().reshape(-1)[i].item()!r} "
        f"expected={e[i].item()!r} actual={a[i].item()!r}"
    )


@contextmanager
def case(*facts: object) -> Iterator[None]:
    """Lets a failure inside say what it was about."""
    try:
        yield
    except Exception as error:
        error.add_note(" ".join(map(str, facts)))
        raise


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """The tensors that autograd keeps for what runs inside."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


# ---- Derivatives -------------------------------------------------------------------------------------------------------


@each_way
@each_layout
def test_gradcheck(any_row: _registry.Row, layout: str, way: str, generator: torch.Generator) -> None:
    shape, view = LAYOUTS[layout]
    # An autograd.Function without a jvp has no forward mode.
    forward_mode = way != "Function"
    for values in arguments(any_row, view(torch.empty(shape)).dim()):
        f = calling(any_row, way, values)
        leaf = draw(shape, generator).requires_grad_()

        def through_view(x: Tensor, f: Unary = f) -> Tensor:
            return f(view(x))

        with case(values):
            assert gradcheck(
                through_view,
                leaf,
                check_forward_ad=forward_mode,
                check_batched_grad=True,
                check_batched_forward_grad=forward_mode,
            )
            dy = with_gaps(draw_like(view(leaf), generator)).requires_grad_()
            assert gradgradcheck(
                through_view,
                leaf,
                dy,
                check_fwd_over_rev=forward_mode,
                check_batched_grad=True,
            )


@each_layout
def test_gradcheck_of_backward_ops(any_row: _registry.Row, layout: str, generator: torch.Generator) -> None:
    """The backward op is a differentiable function of two tensors, whichever of them wants a gradient."""
    shape, view = LAYOUTS[layout]
    for values in arguments(any_row, view(torch.empty(shape)).dim()):
        for wanted in [(True, True), (True, False), (False, True)]:
            leaves = [draw(shape, generator).requires_grad_(want) for want in wanted]

            def through_view(dy: Tensor, saved: Tensor, values: tuple[Any, ...] = values) -> Tensor:
                # Two tensors in different layouts, where the view is not contiguous itself.
                result: Tensor = any_row.backward_op(view(dy), view(saved).contiguous(), *values)
                return result

            with case(values, wanted):
                assert gradcheck(through_view, leaves, check_forward_ad=True)
                assert gradgradcheck(through_view, leaves, check_fwd_over_rev=True)


def test_gradcheck_in_place(row: _registry.Row, generator: torch.Generator) -> None:
    for values in parameter_sets(row):
        if row.saves_input(*values):
            continue  # raises: test_in_place_without_the_input
        for name, call in inplace_calls(row, values).items():
            for layout, (shape, view) in LAYOUTS.items():
                leaf = draw(shape, generator).requires_grad_()

                def through_clone(x: Tensor, call: Any = call, view: Unary = view) -> Tensor:
                    y = view(x).clone()
                    call(y)
                    return y

                with case(values, name, layout):
                    assert gradcheck(through_clone, leaf)
                    assert gradgradcheck(through_clone, leaf, draw_like(view(leaf), generator).requires_grad_())


def test_three_orders_against_the_reference(any_row: _registry.Row, generator: torch.Generator) -> None:
    """Tighter than finite differences can be: both sides are formulas in float64, tens of roundings long."""
    x = draw((3, 4), generator)
    weight = draw((3, 4), generator)
    for values in arguments(any_row, 2):
        derivatives = {}
        for function in (any_row.function, smooth_reference(any_row)):
            leaf = x.clone().requires_grad_()
            y = function(leaf, *values)
            # A square, so that rows of straight pieces too have a second derivative.
            result, found = (weight * y * y).sum(), []
            for _ in range(3):
                (gradient,) = torch.autograd.grad(result, leaf, create_graph=True, materialize_grads=True)
                found.append(gradient)
                result = (weight * gradient * (1 + leaf)).sum()
            derivatives[function] = found
        for order, (actual, expected) in enumerate(zip(*derivatives.values(), strict=True), 1):
            # atol: sums of terms of size up to about 100, which may cancel.
            assert_near(actual, expected, x, (any_row.name, values, "order", order), rtol=1e-11, atol=1e-12)


def test_second_order_in_every_dtype(any_row: _registry.Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Reverse over reverse, and forward over reverse in the same direction: a Hessian is symmetric, so they are the same."""
    x, dy, ddx = (draw((5, 7), generator, dtype) for _ in range(3))
    for values in arguments(any_row, 2):
        found = []
        for function, to in ((any_row.function, dtype), (smooth_reference(any_row), torch.float64)):
            leaf, grad_out = (t.to(to, copy=True).requires_grad_() for t in (x, dy))
            (dx,) = torch.autograd.grad(function(leaf, *values), leaf, grad_out, create_graph=True)
            # dx does not depend on x where the pieces are straight.
            second = torch.autograd.grad(dx, [leaf, grad_out], ddx.to(to), materialize_grads=True)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(leaf, ddx.to(to))
                (dx_dual,) = torch.autograd.grad(function(dual, *values), dual, grad_out.detach(), create_graph=True)
                tangent = forward_ad.unpack_dual(dx_dual).tangent
            results = [t.detach() for t in (dx, *second, torch.zeros_like(dx) if tangent is None else tangent)]
            assert {t.dtype for t in results} == {to}, (any_row.name, values, to)
            found.append(results)
        names = ("dx", "reverse over reverse, of x", "reverse over reverse, of dy", "forward over reverse")
        for name, actual, expected in zip(names, *found, strict=True):
            # The output is kept rounded to the dtype, and every factor of a formula rounds again: some ten roundings of
            # numbers of the size of the largest derivative, which may cancel.
            atol = 16 * torch.finfo(dtype).eps * float(expected.abs().max())
            assert_near(actual, expected, x, (any_row.name, values, name), rtol=0, atol=atol)


def test_forward_mode_equals_reverse_mode(any_row: _registry.Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    """But for log_softmax, every row has a symmetric Jacobian, and both modes run the same kernel on it: the same bits."""
    if any_row.name == "log_softmax":
        return  # test_forward_mode_of_log_softmax
    for layout, (shape, view) in LAYOUTS.items():
        x, t = (view(draw(shape, generator, dtype)) for _ in range(2))
        for values in arguments(any_row, x.dim()):
            f = calling(any_row, "function", values)
            with forward_ad.dual_level():
                y, tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t)))
            assert_bits(y, f(x), x, (any_row.name, values, layout, "primal"))
            assert_bits(tangent, gradient(f, x, t), x, (any_row.name, values, layout, "tangent"))


def test_forward_mode_of_log_softmax(dtype: torch.dtype, generator: torch.Generator) -> None:
    """t - sum(exp(y) t), of the output as it is kept: beyond that a few roundings of the compute type, and the last."""
    for layout, (shape, view) in LAYOUTS.items():
        x, t = (view(draw(shape, generator, dtype)) for _ in range(2))
        for dim in sorted({0, -1}):
            with forward_ad.dual_level():
                y, tangent = forward_ad.unpack_dual(fastact.log_softmax(forward_ad.make_dual(x, t), dim))
            assert_bits(y, fastact.log_softmax(x, dim), x, (layout, dim, "primal"))
            wide = t.double()
            expected = wide - (y.double().exp() * wide).sum(dim, keepdim=True)
            unit = torch.finfo(dtype).eps if dtype.itemsize == 2 else 16 * torch.finfo(dtype).eps
            assert tangent.dtype == dtype
            assert_near(tangent, expected, x, (layout, dim, "tangent"), rtol=unit, atol=2 * unit)


@pytest.mark.parametrize("of_a_view", [False, True], ids=["whole", "view"])
def test_forward_mode_in_place(row: _registry.Row, of_a_view: bool, generator: torch.Generator) -> None:
    x, t = draw((4, 6), generator), draw((4, 6), generator)
    part = (slice(1, 3), slice(None, None, 2)) if of_a_view else (slice(None),)
    for values in parameter_sets(row):
        for name, call in inplace_calls(row, values).items():
            with case(row.name, values, name), forward_ad.dual_level():
                dual = forward_ad.make_dual(x.clone(), t.clone())
                call(dual[part])
                primal, tangent = forward_ad.unpack_dual(dual)
                expected, expected_tangent = x.clone(), t.clone()
                expected[part] = row.op(x[part], *values)
                saved = x if row.saves_input(*values) else expected
                expected_tangent[part] = row.backward_op(t[part], saved[part], *values)
                assert_bits(primal, expected, x, (row.name, values, name, "primal"))
                assert_bits(tangent, expected_tangent, x, (row.name, values, name, "tangent"))


# ---- What is kept ------------------------------------------------------------------------------------------------------


@each_layout
@each_way
def test_one_tensor_is_saved(any_row: _registry.Row, layout: str, way: str, generator: torch.Generator) -> None:
    shape, view = LAYOUTS[layout]
    for values in arguments(any_row, view(torch.empty(shape)).dim()):
        if saves_a_copy(any_row, values):
            continue
        x = view(draw(shape, generator)).detach().requires_grad_()
        with saved_tensors() as kept:
            y = calling(any_row, way, values)(x)
        wanted = x if any_row.saves_input(*values[: len(any_row.parameters)]) else y
        assert [(t.data_ptr(), t.shape) for t in kept] == [(wanted.data_ptr(), wanted.shape)], (any_row.name, values)


def test_in_place_saves_the_result(row: _registry.Row, generator: torch.Generator) -> None:
    for values in parameter_sets(row):
        for name, call in inplace_calls(row, values).items():
            x = draw((3, 4), generator).requires_grad_().clone()
            before = x.detach().clone()
            with saved_tensors() as kept:
                call(x)
            (saved,) = kept
            if row.saves_input(*values):  # a copy, since x itself is overwritten
                assert saved.data_ptr() != x.data_ptr(), (row.name, values, name)
                assert_bits(saved.detach(), before, before, (row.name, values, name))
            else:
                assert saved.data_ptr() == x.data_ptr(), (row.name, values, name)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext], ids=lambda mode: mode.__name__)
@each_way
def test_nothing_is_saved_without_need(
    any_row: _registry.Row, way: str, mode: Callable[[], AbstractContextManager[Any]], generator: torch.Generator
) -> None:
    for values in arguments(any_row, 2):
        x = draw((3, 4), generator).requires_grad_(mode is not nullcontext)
        with saved_tensors() as kept, mode():
            y = calling(any_row, way, values)(x)
        assert kept == [], (any_row.name, values)
        assert not y.requires_grad, (any_row.name, values)
        assert y.grad_fn is None, (any_row.name, values)
        assert y.is_inference() == (mode is torch.inference_mode), (any_row.name, values)


# ---- Nothing else changes ------------------------------------------------------------------------------------------------

# How the output goes on: each gives backward a dy that shares memory with something else, in its own way.
ROUTES: dict[str, Unary] = {
    "as it is": lambda y: y,
    "through a view": lambda y: y.view(-1),
    "through a transposed view": lambda y: y.t(),
    "into a sum with a branch": lambda y: y + 2 * y,
    "into a sum of everything": lambda y: y.sum(),
    "into a sum of rows": lambda y: y.sum(0),
}


@pytest.mark.parametrize("watched", [False, True], ids=["unwatched", "watched"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(5, 7), (50, 1000)], ids=["one thread", "threads"])
def test_backward_changes_nothing(
    any_row: _registry.Row, shape: tuple[int, int], route: str, watched: bool, generator: torch.Generator
) -> None:
    """Watched: hooks and retain_grad hold on to dy, so that it is not backward's own. Unwatched: nobody but the caller may."""
    for values in arguments(any_row, 2):
        x = draw(shape, generator, torch.float32).requires_grad_()
        before = x.detach().clone()
        seen: list[tuple[Tensor, Tensor]] = []
        with saved_tensors() as kept:
            y = any_row.function(x, *values)
        kept_before = [t.detach().clone() for t in kept]
        y_before = y.detach().clone()
        if watched:
            y.retain_grad()
            y.register_hook(lambda dy, seen=seen: seen.append((dy, dy.clone())))
        out = ROUTES[route](y)
        dy = draw_like(out, generator)
        dy_before = dy.clone()
        out.backward(dy)

        about = (any_row.name, values)
        assert_bits(x, before, before, (*about, "x"))
        assert_bits(y, y_before, before, (*about, "y"))
        assert_bits(dy, dy_before, dy_before, (*about, "dy"))
        for tensor, earlier in zip(kept, kept_before, strict=True):
            assert_bits(tensor, earlier, before, (*about, "saved"))
        assert x.grad is not None
        others = [y, dy, *kept]
        if watched:
            assert y.grad is not None
            ((hooked, hooked_before),) = seen
            assert_bits(hooked, hooked_before, before, (*about, "hooked dy"))
            assert_bits(y.grad, hooked_before, before, (*about, "y.grad"))
            others += [y.grad, hooked]
        assert x.grad.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in others}, about
        # Whatever backward owned, the gradient is that of a dy that nobody else has.
        y = any_row.function(x, *values)
        (own,) = torch.autograd.grad(ROUTES[route](y), y, dy)
        assert_bits(x.grad, gradient(calling(any_row, "function", values), x, own.clone()), before, (*about, "x.grad"))


def test_ops_change_no_argument(any_row: _registry.Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    for layout, (shape, view) in LAYOUTS.items():
        for values in arguments(any_row, view(torch.empty(shape)).dim()):
            x, dy, saved = (view(draw(shape, generator, dtype)) for _ in range(3))
            before = [bits(t) for t in (x, dy, saved)]
            versions = [t._version for t in (x, dy, saved)]
            any_row.op(x, *values)
            any_row.backward_op(dy, saved, *values)
            after = [bits(t) for t in (x, dy, saved)]
            assert all(map(torch.equal, after, before)), (any_row.name, values, layout)
            assert [t._version for t in (x, dy, saved)] == versions, (any_row.name, values, layout)


@each_way
def test_graph_lives_once_unless_retained(any_row: _registry.Row, way: str, generator: torch.Generator) -> None:
    for values in arguments(any_row, 2):
        x, dy, ddx = (draw((3, 4), generator).requires_grad_(want) for want in (True, True, False))
        y = calling(any_row, way, values)(x)
        first, second = (torch.autograd.grad(y, x, dy, create_graph=True)[0] for _ in range(2))
        assert_bits(first, second, x, (any_row.name, values))
        again = [torch.autograd.grad(first, dy, ddx, retain_graph=keep)[0] for keep in (True, False)]
        assert_bits(again[0], again[1], x, (any_row.name, values, "second order"))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(first, dy, ddx)
        torch.autograd.grad(y, x, dy)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, x, dy)


@each_way
def test_overwritten_saved_tensor_is_noticed(any_row: _registry.Row, way: str, generator: torch.Generator) -> None:
    for values in arguments(any_row, 2):
        if saves_a_copy(any_row, values):
            continue
        x = draw((3, 4), generator).requires_grad_().clone()
        y = calling(any_row, way, values)(x)
        saved, other = (x, y) if any_row.saves_input(*values[: len(any_row.parameters)]) else (y, x)
        dy = draw_like(y, generator)
        result = y * 1
        with torch.no_grad():
            other.mul_(2)  # is not needed
        torch.autograd.grad(result, x, dy, retain_graph=True)
        with torch.no_grad():
            saved.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(result, x, dy)


# ---- In place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_in_place_result(
    row: _registry.Row, dtype: torch.dtype, mode: Callable[[], AbstractContextManager[Any]], generator: torch.Generator
) -> None:
    for values in parameter_sets(row):
        for name, call in inplace_calls(row, values).items():
            for layout, (shape, view) in LAYOUTS.items():
                if layout == "expanded":
                    continue  # raises: test_in_place_refuses
                base = draw(shape, generator, dtype)
                expected = base.clone()
                view(expected).copy_(row.op(view(base), *values))
                x, about = view(base), (row.name, values, name, layout)
                before = x.clone()
                with mode():
                    result = call(x)
                assert result is (None if name == "op" else x), about
                assert x._version == base._version == 1, about
                assert not x.requires_grad, about
                # The base too: what lies between the elements of x stays.
                assert_bits(base, expected, base, about)
                assert_bits(x, view(expected), before, about)


def test_in_place_refuses(row: _registry.Row, generator: torch.Generator) -> None:
    for values in parameter_sets(row):
        for name, call in inplace_calls(row, values).items():
            leaf = draw((3, 4), generator).requires_grad_()
            row_of_leaf = draw((3, 4), generator).requires_grad_()
            overlapping = draw((1, 4), generator)
            parts = draw((3, 4), generator).requires_grad_().clone()
            with torch.no_grad():
                made_without_grad = parts[1:]
            refused = {
                "a leaf Variable that requires grad": leaf,
                "a view of a leaf Variable that requires grad": row_of_leaf[1],
                "refers to a single memory location": overlapping.expand(3, 4),
                "function that returns multiple views": parts.unbind(0)[1],
                "view was created in no_grad mode": made_without_grad,
            }
            for message, x in refused.items():
                before, version = x.detach().clone(), x._version
                # torch's own ops say the same.
                for overwrite in (torch.sigmoid_, call):
                    with case(row.name, values, name), pytest.raises(RuntimeError, match=message):
                        overwrite(x)
                assert_bits(x, before, before, (row.name, values, name, message))
                assert x._version == version, (row.name, values, name, message)


def test_in_place_on_a_view(row: _registry.Row, generator: torch.Generator) -> None:
    """The base changes, and knows how: values and gradients are those of a part written back."""
    views: dict[str, Unary] = {
        "all": lambda x: x,
        "slice": lambda x: x[1:3],
        "steps": lambda x: x[:, ::2],
        "transposed": lambda x: x.t(),
        "column": lambda x: x[:, 3],
        "view of a view": lambda x: x.t()[2:, 1:].unsqueeze(0),
    }
    for values in parameter_sets(row):
        if row.saves_input(*values):
            continue  # raises: test_in_place_without_the_input
        for name, call in inplace_calls(row, values).items():
            for which, view in views.items():
                x, dy, weight = (draw((4, 6), generator) for _ in range(3))
                found = []

                def write_back(part: Tensor, values: tuple[float, ...] = values) -> None:
                    part.copy_(row.op(part.clone(), *values))

                for overwrite in (call, write_back):
                    leaf = x.clone().requires_grad_()
                    base = leaf * weight
                    part = view(base)
                    overwrite(part)
                    # Through the base and through the view, which both have a new history.
                    result = (base * dy).sum() + (part * part).sum()
                    found.append((base, part, *torch.autograd.grad(result, leaf)))
                for what, actual, expected in zip(("base", "view", "gradient"), *found, strict=True):
                    about = (row.name, values, name, which, what)
                    # Not assert_bits: a gradient of zero may differ in its sign, as the two graphs add in different orders.
                    assert_near(actual, expected, view(x) if what == "view" else x, about, rtol=0, atol=0)


def test_in_place_where_the_input_is_needed(row: _registry.Row, generator: torch.Generator) -> None:
    """As out of place, bit for bit, though the input is overwritten; and the second derivative leads through its copy."""
    for values in parameter_sets(row):
        for name, call in inplace_calls(row, values).items():
            x, dy = draw((3, 4), generator).requires_grad_(), draw((3, 4), generator)
            y = x.clone()
            call(y)
            assert_bits(y, row.op(x, *values), x, (row.name, values, name))
            found = []
            for result in (y, row.op(x, *values)):
                (dx,) = torch.autograd.grad(result, x, dy, create_graph=True)
                found.append((dx, *torch.autograd.grad((dx * dx).sum(), x, materialize_grads=True, allow_unused=True)))
            with case(row.name, values, name):
                assert_bits(found[0][0], row.backward_op(dy, x if row.saves_input(*values) else y, *values), x, name)
                for actual, expected in zip(*found, strict=True):
                    assert_near(actual, expected, x, (row.name, values, name), rtol=2.0**-48, atol=2.0**-50)


def test_in_place_overwrites_what_others_saved(row: _registry.Row, generator: torch.Generator) -> None:
    for values in parameter_sets(row):
        for name, call in inplace_calls(row, values).items():
            x = draw((3, 4), generator).requires_grad_()
            kept_by_exp = x.exp()
            call(kept_by_exp)
            with (
                case(row.name, values, name),
                pytest.raises(RuntimeError, match=r"modified by an inplace operation"),
            ):
                kept_by_exp.sum().backward()


# ---- Wrong gradients -----------------------------------------------------------------------------------------------------


def test_wrong_grad_out(any_row: _registry.Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    saved = draw((3, 4), generator, dtype)
    values = arguments(any_row, 2)[0]
    for other in set(DTYPES) - {dtype}:
        with pytest.raises(RuntimeError, match=f"{any_row.name}_backward: dy has dtype"):
            any_row.backward_op(draw((3, 4), generator, other), saved, *values)
    for shape in [(4, 3), (4,), (1, 4), (3, 4, 1), (0,), ()]:
        with pytest.raises(RuntimeError, match=f"{any_row.name}_backward: dy has shape"):
            any_row.backward_op(draw(shape, generator, dtype), saved, *values)
    for pair in [(saved.to("meta"), saved), (saved, saved.to("meta"))]:
        with pytest.raises(RuntimeError, match=f"{any_row.name}_backward: dy is on"):
            any_row.backward_op(*pair, *values)
    # Nor is anything left behind that spoils the next call.
    assert any_row.backward_op(saved, saved, *values).shape == saved.shape


def test_grad_out_of_another_dtype_is_cast_by_autograd(any_row: _registry.Row, generator: torch.Generator) -> None:
    x, dy = (draw((3, 4), generator, torch.float32) for _ in range(2))
    for values in arguments(any_row, 2):
        f = calling(any_row, "function", values)
        assert_bits(gradient(f, x, dy.double()), gradient(f, x, dy), x, (any_row.name, values))


def test_undefined_grad_out(any_row: _registry.Row, generator: torch.Generator) -> None:
    """An output that the result does not depend on has a gradient of nothing, not of zeros, and costs no kernel."""

    class TwoOutputs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            ctx.set_materialize_grads(False)
            return y * 2, y * 3

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> None:
            return None

    for values in arguments(any_row, 2):
        x = draw((3, 4), generator).requires_grad_()
        result, _ = TwoOutputs.apply(any_row.function(x, *values))
        assert torch.autograd.grad(result.sum(), x, allow_unused=True) == (None,), (any_row.name, values)


# ---- The graph -----------------------------------------------------------------------------------------------------------


@each_way
def test_requires_grad_propagates(any_row: _registry.Row, way: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    for values in arguments(any_row, 2):
        f = calling(any_row, way, values)
        x = draw((3, 4), generator, dtype)
        for wanted in (False, True):
            y = f(x.requires_grad_(wanted))
            assert y.requires_grad is wanted, (any_row.name, values)
            assert (y.grad_fn is not None) is wanted, (any_row.name, values)
            assert not y._is_view(), (any_row.name, values)
        assert not f(x.detach()).requires_grad
        assert not y.detach().requires_grad
        with torch.no_grad(), torch.enable_grad():
            assert f(x).requires_grad


@each_way
def test_graph_names_the_activation(any_row: _registry.Row, way: str, generator: torch.Generator) -> None:
    """What printing grad_fn, profiles and anomaly mode show."""
    y = calling(any_row, way, arguments(any_row, 2)[0])(draw((3, 4), generator).requires_grad_())
    assert y.grad_fn is not None
    assert y.grad_fn.name() == any_row.class_name + "Backward"


@each_way
def test_hooks_fire(any_row: _registry.Row, way: str, generator: torch.Generator) -> None:
    for values in arguments(any_row, 2):
        x, dy = draw((3, 4), generator).requires_grad_(), draw((3, 4), generator)
        f = calling(any_row, way, values)
        fired = []
        y = f(x)
        assert y.grad_fn is not None
        y.register_hook(lambda g, fired=fired: fired.append("y"))
        y.grad_fn.register_prehook(lambda out, fired=fired: fired.append("before"))
        y.grad_fn.register_hook(lambda into, out, fired=fired: fired.append("after"))
        # A hook on x may replace its gradient.
        x.register_hook(lambda g, fired=fired: fired.append("x") or 2 * g)
        y.backward(dy)
        assert fired == ["y", "before", "after", "x"], (any_row.name, values)
        assert x.grad is not None
        assert_bits(x.grad, 2 * gradient(f, x, dy), x, (any_row.name, values))


def test_module_hooks_fire(any_row: _registry.Row, generator: torch.Generator) -> None:
    for values in arguments(any_row, 2):
        module = module_class(any_row)(*values)
        x, dy = draw((3, 4), generator).requires_grad_(), draw((3, 4), generator)
        fired: dict[str, Tensor] = {}
        module.register_forward_pre_hook(lambda m, args, fired=fired: fired.update(x=args[0]))
        module.register_forward_hook(lambda m, args, y, fired=fired: fired.update(y=y))
        module.register_full_backward_hook(lambda m, dx, dy, fired=fired: fired.update(dx=dx[0], dy=dy[0]))
        module(x).backward(dy)
        assert list(fired) == ["x", "y", "dx", "dy"], (any_row.name, values)
        assert x.grad is not None
        assert_bits(fired["dy"], dy, x, (any_row.name, values))
        assert_bits(fired["dx"], x.grad, x, (any_row.name, values))


@each_way
def test_anomaly_mode(any_row: _registry.Row, way: str, generator: torch.Generator) -> None:
    values = arguments(any_row, 2)[0]
    # Above 0: a ReLU passes no NaN below it.
    x, dy = draw((3, 4), generator).abs().requires_grad_(), draw((3, 4), generator)
    f = calling(any_row, way, values)
    expected = gradient(f, x, dy)
    dy_nan = dy.clone()
    dy_nan[:, :2] = torch.nan
    with torch.autograd.set_detect_anomaly(True):
        assert_bits(gradient(f, x, dy), expected, x, any_row.name)
        y = f(x)
        assert y.grad_fn is not None
        name = y.grad_fn.name()
        with (
            pytest.warns(UserWarning, match=f"Error detected in {name}. Traceback of forward call"),
            pytest.raises(RuntimeError, match=f"'{name}' returned nan values"),
        ):
            y.backward(dy_nan)


# ---- The layout of dy ------------------------------------------------------------------------------------------------------


def grad_outs(shape: tuple[int, int, int, int], generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    """One dy of this shape in every layout that backward may meet."""
    a, b, c, d = shape
    scattered = draw((2 * a, b, 3 * c, d + 1), generator, dtype)
    flat = draw((a * b * c * d + 1,), generator, dtype)
    return {
        "contiguous": draw(shape, generator, dtype),
        "not aligned": flat[1:].view(shape),
        "of y.sum()": draw((), generator, dtype).expand(shape),
        "of y.sum((0, 2))": draw((1, b, 1, d), generator, dtype).expand(shape),
        "channels_last": draw(shape, generator, dtype).contiguous(memory_format=torch.channels_last),
        "transposed": draw((d, b, c, a), generator, dtype).transpose(0, 3),
        "permuted": draw((c, a, d, b), generator, dtype).permute(1, 3, 0, 2),
        "sliced": scattered[::2, :, 1::3, 1:],
    }


def test_layout_of_grad_out(any_row: _registry.Row, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Whatever the layouts of dy and x, the gradient has the bits that it has with both contiguous."""
    shape = (4, 3, 5, 7)
    inputs = {
        "contiguous": draw(shape, generator, dtype),
        "channels_last": draw(shape, generator, dtype).contiguous(memory_format=torch.channels_last),
        "sliced": draw((4, 6, 5, 8), generator, dtype)[:, ::2, :, 1:],
    }
    for layout, x in inputs.items():
        for values in arguments(any_row, 4):
            f = calling(any_row, "function", values)
            for name, dy in grad_outs(shape, generator, dtype).items():
                expected = gradient(f, x.contiguous(), dy.contiguous())
                actual, about = gradient(f, x, dy), (any_row.name, values, isa, "x", layout, "dy", name)
                logarithm = any_row.name == "log_softmax"
                slack = softmax_slack(dtype, values[0], f(x), dy, logarithm=logarithm) if any_row in ALONG_DIM else None
                if slack is None:
                    assert_bits(actual, expected, x, about)
                else:
                    assert ((actual.double() - expected.double()).abs() <= slack).all(), about


def test_sum_backward(any_row: _registry.Row, dtype: torch.dtype, generator: torch.Generator) -> None:
    """The most common dy of all: one element, seen many times."""
    for values in arguments(any_row, 2):
        x = draw((37, 50), generator, dtype).requires_grad_()
        any_row.function(x, *values).sum().backward()
        assert x.grad is not None
        expected = gradient(calling(any_row, "function", values), x, torch.ones_like(x))
        assert_bits(x.grad, expected, x, (any_row.name, values))
