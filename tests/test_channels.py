"""Activations with parameters per channel: values, the sums of their gradients, layouts, autograd, functions and modules."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, LAYOUTS, THREAD_COUNTS, bits, each_layout
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastact
from fastact import _C, channels

# torch itself calls it, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

NAMES = list(channels.functions)
each_name = pytest.mark.parametrize("name", NAMES)

# Lines along memory, long, short and of more than one unit of work; columns, few, many, more than a tile; one dim, none.
SHAPES = [
    *((), (1,), (7,), (5000,), (3, 1), (4, 3), (1, 40), (70, 17), (200, 3), (40, 513), (700, 5), (2, 0, 3), (0, 3)),
    *((2, 3, 5), (3, 40, 4), (2, 3, 31), (2, 3, 32), (2, 5, 7, 7), (3, 2, 50, 100), (2, 1, 6, 6)),
]


def op(name: str) -> Any:
    return getattr(torch.ops.fastact, name).default


def backward_op(name: str) -> Any:
    return getattr(torch.ops.fastact, name + "_backward").default


def arity(name: str) -> int:
    return len(inspect.signature(channels.references[name]).parameters) - 1


def channel_count(shape: tuple[int, ...]) -> int:
    return shape[1] if len(shape) > 1 else 1


def parameter_sizes(name: str, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """For all and per channel, in every combination."""
    return list(itertools.product(sorted({1, channel_count(shape)} - {0}), repeat=arity(name)))


@pytest.fixture
def random(generator: torch.Generator) -> Callable[..., Tensor]:
    def make(shape: tuple[int, ...] | int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return make


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


def assert_same_bits(actual: Tensor, expected: Tensor, what: Any) -> None:
    """NaN is NaN, whatever its payload."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), what
    wrong = (bits(actual) != bits(expected)) & ~(actual.isnan() & expected.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {at}: "
            f"expected {expected[at].item()!r}, got {actual[at].item()!r}"
        )


# ---- Values --------------------------------------------------------------------------------------------------------------

# The same arithmetic for a single number: of these, other tests hold the accuracy.
SINGLE: dict[str, Callable[..., Tensor]] = {
    "prelu": lambda x, weight: torch.where(x > 0, x, (weight.to(wide := compute_type(x)) * x.to(wide)).to(x.dtype)),
    "channel_scaled_sigmoid": lambda x, scale, slope: torch.ops.fastact.scaled_sigmoid(x, scale.item(), slope.item()),
}


def compute_type(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.itemsize > 2 else torch.float32


@each_name
@each_layout
def test_forward_is_that_of_each_channel(name: str, layout: str, dtype: torch.dtype, isa: str, random: Any) -> None:
    for shape in SHAPES:
        x = LAYOUTS[layout](random(shape, dtype))
        for sizes in parameter_sizes(name, shape):
            parameters = [random(size, dtype) for size in sizes]
            y = channels.functions[name](x, *parameters)
            expected = torch.empty_like(x)
            for c in range(channel_count(shape)):
                own = [p[c if len(p) > 1 else 0] for p in parameters]
                part = x[:, c] if x.dim() > 1 else x
                (expected[:, c] if x.dim() > 1 else expected).copy_(SINGLE[name](part.contiguous(), *own))
            assert_same_bits(y, expected, (name, layout, dtype, isa, shape, sizes))


def test_prelu_is_torchs_bit_for_bit(dtype: torch.dtype, isa: str, random: Any) -> None:
    """Forward, and dx, of every 16-bit number; of the special ones in wider types."""
    if dtype.itemsize == 2:
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).reshape(-1, 4, 8)
    else:
        info = torch.finfo(dtype)
        special = [0.0, -0.0, math.inf, -math.inf, math.nan, info.tiny, -info.tiny, -info.max, info.max]
        x = torch.cat([torch.tensor(special, dtype=dtype).repeat(40), random(24, dtype)]).reshape(-1, 4, 8)
    dy = random(x.shape, dtype)
    for weight in (random(4, dtype), random(1, dtype), torch.tensor([0.0, -0.0, math.inf, math.nan], dtype=dtype)):
        assert_same_bits(fastact.prelu(x, weight), F.prelu(x, weight), "forward")
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(F.prelu(leaf, weight), leaf, dy)
        assert_same_bits(torch.autograd.grad(fastact.prelu(leaf, weight), leaf, dy)[0], expected, "dx")


def special_numbers(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.0, -0.0, 1.0, -1.0, 50.0, -50.0, 2000.0, -2000.0, math.inf, -math.inf, math.nan], dtype=dtype)


@each_name
def test_special_values(name: str, dtype: torch.dtype, isa: str) -> None:
    """Infinities and NaN come out, and go into the gradients, where they do in the reference."""
    x = special_numbers(dtype)[:, None]
    for numbers in itertools.product([1.0, -2.0, 0.0, math.inf, math.nan], repeat=arity(name)):
        parameters = [torch.tensor([number], dtype=dtype) for number in numbers]
        results = []
        for function, kind in ((channels.functions[name], dtype), (channels.references[name], torch.float64)):
            leaves = [t.to(kind, copy=True).requires_grad_() for t in (x, *parameters)]
            y = function(*leaves)
            found = [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]
            results.append([t.to(dtype) for t in found])
        for what, (actual, expected) in enumerate(zip(*results, strict=True)):
            if what > 0:
                # inf where the reference, with its 1 - s of 0, has NaN; or the other way round, as the order of a sum has it.
                assert torch.equal(actual.isfinite(), expected.isfinite()), (name, numbers, what)
                actual, expected = actual.nan_to_num(0, 0, 0), expected.nan_to_num(0, 0, 0)
            # The reference loses the digits of 1 - s where s is near 1; x, of up to 2000, multiplies what is lost.
            torch.testing.assert_close(
                actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=2000 * torch.finfo(torch.float64).eps, equal_nan=True
            )


# ---- Gradients -----------------------------------------------------------------------------------------------------------

Array = np.ndarray


def extended(t: Tensor) -> Array:
    return t.detach().double().cpu().numpy().astype(np.longdouble)


def prelu_terms(dy: Array, x: Array, weight: Array) -> tuple[Array, list[Array], Array]:
    return np.where(x > 0, dy, weight * dy), [np.where(x > 0, 0, x * dy)], np.zeros_like(x)


def sigmoid_terms(dy: Array, x: Array, scale: Array, slope: Array) -> tuple[Array, list[Array], Array]:
    z = slope * x
    s, rest = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    dz = dy * scale * s * rest
    return dz * slope, [dy * s, dz * x], np.abs(z)


# dx, what each element adds to the gradient of each parameter, and |z|: the units that rounding the argument of exp costs.
TERMS: dict[str, Callable[..., tuple[Array, list[Array], Array]]] = {
    "prelu": prelu_terms,
    "channel_scaled_sigmoid": sigmoid_terms,
}


def broadcast(p: Tensor, x: Tensor) -> Array:
    wide = extended(p)
    return wide.reshape([-1 if d == 1 else 1 for d in range(x.dim())]) if wide.size > 1 else wide.reshape(())


def half_step(value: Array, dtype: torch.dtype) -> Array:
    info = torch.finfo(dtype)
    return np.maximum(np.abs(value) * info.eps / 2, info.tiny * info.eps)


@each_name
def test_gradients_are_accurate(name: str, dtype: torch.dtype, isa: str, random: Any) -> None:
    """Within the roundings of the formula: a dozen and |z| units for each element; in a sum, one more for each addition a lane
    makes within a block, at most kChunk of csrc/kernels.h / 2 lanes (CUDA: fewer); at the end one rounding to the dtype.
    """
    if dtype == torch.float64 and np.finfo(np.longdouble).nmant < 60:
        pytest.skip("no floating-point type here is wider than float64, so that nothing can judge it")
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    tiny = float(torch.finfo(compute_type(torch.empty(0, dtype=dtype))).tiny)
    for shape in [(5000,), (40, 70), (2, 3, 50, 60), (30, 3, 4)]:
        x, dy = random(shape, dtype) * 3, random(shape, dtype)
        for sizes in parameter_sizes(name, shape):
            parameters = [random(size, dtype) for size in sizes]
            got = backward_op(name)(dy, x, *parameters)
            dx, terms, z = TERMS[name](extended(dy), extended(x), *(broadcast(p, x) for p in parameters))
            error = np.abs(dx) * unit * (12 + z) + half_step(dx, dtype) + 8 * tiny * (1 + np.abs(extended(dy)))
            assert (np.abs(extended(got[0]) - dx) <= error).all(), (name, shape, sizes, "dx")
            for k, (p, term) in enumerate(zip(parameters, terms, strict=True)):
                axes = tuple(d for d in range(x.dim()) if d != 1 or len(p) == 1)
                total, size = term.sum(axes).reshape(-1), (np.abs(term) * (12 + z)).sum(axes).reshape(-1)
                additions = min(2048, x.numel())
                error = size * unit + np.abs(term).sum(axes).reshape(-1) * unit * additions + 2 * half_step(total, dtype)
                # One parameter for all beside one per channel: the sums of the channels are rounded before they are added.
                error += np.abs(term).sum() * torch.finfo(dtype).eps * (len(p) == 1 and max(sizes) > 1)
                assert (np.abs(extended(got[1 + k]) - total) <= error).all(), (name, shape, sizes, k)


# Parameters with which every term is a multiple of a power of two for whole x and dy, so that sums have no rounding.
EXACT: dict[str, Callable[[Tensor, Tensor], tuple[list[float], list[Tensor]]]] = {
    "prelu": lambda dy, x: ([0.5], [torch.where(x > 0, 0, x * dy)]),
    "channel_scaled_sigmoid": lambda dy, x: ([2.0, 0.0], [dy / 2, dy * x / 2]),
}


@each_name
@each_layout
def test_sums_miss_nothing(name: str, layout: str, dtype: torch.dtype, isa: str, generator: torch.Generator) -> None:
    """Of whole numbers: they are what they should be to the last bit, before the one rounding to the dtype."""
    for shape in SHAPES:
        x, dy = (torch.randint(-3, 4, shape, generator=generator).to(torch.float64) for _ in range(2))
        numbers, terms = EXACT[name](dy, x)
        inputs = [LAYOUTS[layout](t.to(dtype)) for t in (dy, x)]
        for size in sorted({1, channel_count(shape)}):
            parameters = [torch.full((size,), number, dtype=dtype) for number in numbers]
            got = backward_op(name)(*inputs, *parameters)
            for k, term in enumerate(terms):
                total = term.sum().reshape(1) if size == 1 else term.sum([d for d in range(term.dim()) if d != 1])
                assert_same_bits(got[1 + k] + 0.0, total.to(dtype) + 0.0, (name, layout, shape, size, k))


def test_lanes_without_an_element_add_nothing(dtype: torch.dtype, isa: str) -> None:
    """0 in such a lane times an infinite slope would be NaN."""
    for shape in [(n,) for n in range(1, 36)] + [(n, 2) for n in range(1, 20)]:
        x, slope = torch.ones(shape, dtype=dtype), torch.full((channel_count(shape),), math.inf, dtype=dtype)
        _, scale_gradient, _ = backward_op("channel_scaled_sigmoid")(x, x, torch.ones_like(slope), slope)
        assert scale_gradient.tolist() == [shape[0]] * channel_count(shape), shape


@each_name
def test_gradients_do_not_depend_on_threads(name: str, dtype: torch.dtype, random: Any) -> None:
    for shape in [(300001,), (3000, 70), (5, 3, 200, 200), (200, 40, 5)]:
        x, dy = random(shape, dtype), random(shape, dtype)
        for size in {1, channel_count(shape)}:
            parameters = [random(size, dtype) for _ in range(arity(name))]
            found = []
            for count in THREAD_COUNTS:
                torch.set_num_threads(count)
                found.append([op(name)(x, *parameters), *backward_op(name)(dy, x, *parameters)])
            for other in found[1:]:
                for what, (a, b) in enumerate(zip(found[0], other, strict=True)):
                    assert_same_bits(b, a, (name, shape, size, what))


@each_name
def test_only_what_is_wanted(name: str, random: Any, isa: str) -> None:
    """The rest is None; what is wanted has the bits it has beside the rest."""
    for shape in [(4, 3, 5), (4, 3, 40), (2, 0, 3)]:
        x, dy = random(shape, torch.float32), random(shape, torch.float32)
        parameters = [random(shape[1] or 1, torch.float32) for _ in range(arity(name))]
        whole = backward_op(name)(dy, x, *parameters)
        for wanted in itertools.product([False, True], repeat=1 + arity(name)):
            got = backward_op(name)(dy, x, *parameters, wanted)
            for want, a, b in zip(wanted, got, whole, strict=True):
                assert (a is not None) == want
                if a is not None:
                    assert_same_bits(a, b, (name, shape, wanted))


@each_name
@each_layout
def test_layouts_of_results(name: str, layout: str, random: Any) -> None:
    """Those of dense inputs are kept, also where there is no data; nothing that went in is changed."""
    for shape in [(3, 4), (2, 3, 4, 5), (2, 3, 1, 5)]:
        x, dy = (LAYOUTS[layout](random(shape, torch.float32)) for _ in range(2))
        other = random(shape, torch.float32)
        parameters = [random(3 if len(shape) > 2 else 4, torch.float32) for _ in range(arity(name))]
        for tensors, run in [((x,), op(name)), ((dy, x), backward_op(name)), ((other, x), backward_op(name))]:
            before = [t.clone() for t in tensors]
            results = run(*tensors, *parameters)
            first = results if isinstance(results, Tensor) else results[0]
            for t, b in zip(tensors, before, strict=True):
                assert torch.equal(t, b)
            hollow = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in tensors]
            meta = run(*hollow, *(p.to("meta") for p in parameters))
            without = meta if isinstance(meta, Tensor) else meta[0]
            assert (without.shape, without.stride()) == (first.shape, first.stride()), (shape, layout)
            if layout != "gaps":
                assert first.stride() == tensors[0].stride(), (shape, layout)


# ---- Autograd ------------------------------------------------------------------------------------------------------------


def leaves(name: str, random: Any, shape: tuple[int, ...], size: int) -> list[Tensor]:
    return [t.requires_grad_() for t in (random(shape), *(random(size) for _ in range(arity(name))))]


@each_name
@pytest.mark.parametrize(("shape", "size"), [((2, 3, 4), 3), ((2, 3, 4), 1), ((5,), 1), ((), 1), ((3, 2), 2)])
def test_gradcheck(name: str, shape: tuple[int, ...], size: int, random: Any) -> None:
    inputs = leaves(name, random, shape, size)
    assert torch.autograd.gradcheck(
        channels.functions[name], inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        channels.functions[name], inputs, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def test_derivatives_at_zero(random: Any) -> None:
    """Up to the third, where the formula has a branch and the function has none: those of the reference."""
    name = "channel_scaled_sigmoid"
    inputs = [torch.zeros(2, 3, dtype=torch.float64).requires_grad_(), *leaves(name, random, (1, 3), 3)[1:]]
    found = []
    for f in (channels.functions[name], channels.references[name]):
        total, results = f(*inputs).sum(), []
        for _ in range(3):
            gradients = torch.autograd.grad(total, inputs, create_graph=True, materialize_grads=True)
            results += gradients
            total = sum((g * g).sum() + g.sum() for g in gradients)
        found.append(results)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@each_name
def test_transforms(name: str, random: Any) -> None:
    """torch.func over function and reference: the same numbers, to a few roundings."""
    f, reference = channels.functions[name], channels.references[name]
    x, dy = random((4, 3, 5)), random((4, 3, 5))
    parameters = [random(3) for _ in range(arity(name))]
    batched = [random((4, 3)) for _ in parameters]
    arguments = tuple(range(1 + len(parameters)))
    func = torch.func

    def per_sample(g: Any) -> Any:
        return func.vmap(func.grad(lambda x, *p: g(x[None], *p).sum(), argnums=arguments), (0, *[None] * len(parameters)))

    calls: list[Callable[[Any], Any]] = [
        lambda g: func.vmap(g, (0, *[None] * len(parameters)))(x.movedim(-1, 0), *parameters),
        lambda g: func.vmap(g, (2, *[None] * len(parameters)), 1)(x, *parameters),
        lambda g: func.vmap(g)(random((4, 2, 3)) * 0 + x[:, None, :, 0], *batched),
        lambda g: per_sample(g)(x, *parameters),
        lambda g: func.jvp(g, (x, *parameters), (dy, *(p.flip(0) for p in parameters))),
        lambda g: func.hessian(lambda *a: g(*a).sin().sum(), argnums=arguments)(x, *parameters),
        lambda g: func.jacfwd(func.jacrev(g, argnums=arguments), argnums=arguments)(x[:2, :, :2], *parameters),
    ]
    for call in calls:
        torch.testing.assert_close(call(f), call(reference))


@each_name
def test_gradients_made_differentiable_are_the_same(name: str, dtype: torch.dtype, random: Any) -> None:
    """With create_graph they are torch ops in the type that is computed in: off by roundings of the sums at most."""
    inputs = [random((20, 3, 7), dtype).requires_grad_(), *(random(3, dtype).requires_grad_() for _ in range(arity(name)))]
    y = channels.functions[name](*inputs)
    dy = random(y.shape, dtype)
    plain = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    graph = torch.autograd.grad(y, inputs, dy, create_graph=True)
    for a, b in zip(plain, graph, strict=True):
        assert b.requires_grad
        assert not a.requires_grad
        # Of 140 elements.
        unit = torch.finfo(compute_type(a)).eps
        torch.testing.assert_close(a, b.detach(), rtol=2 * torch.finfo(dtype).eps, atol=140 * unit)


@each_name
def test_backward_asks_for_what_is_needed(name: str, random: Any) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is backward_op(name):
                # Defaults are left out.
                seen.append(list(args[-1]) if isinstance(args[-1], list) else [True] * (1 + arity(name)))
            return func(*args, **(kwargs or {}))

    for needed in itertools.product([False, True], repeat=1 + arity(name)):
        if not any(needed):
            continue
        inputs = leaves(name, random, (2, 3, 4), 3)
        for t, need in zip(inputs, needed, strict=True):
            t.requires_grad_(need)
        y = channels.functions[name](*inputs)
        with Watch():
            y.sum().backward()
        assert seen.pop() == list(needed)
        assert [t.grad is not None for t in inputs] == list(needed)


@each_name
def test_inputs_overwritten_before_the_backward_are_noticed(name: str, random: Any) -> None:
    for which in range(1 + arity(name)):
        inputs = leaves(name, random, (2, 3), 3)
        hidden = [t * 1 for t in inputs]
        y = channels.functions[name](*hidden)
        hidden[which].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


# ---- Functions -----------------------------------------------------------------------------------------------------------


@each_name
@each_layout
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_opcheck(name: str, layout: str, grad: bool, random: Any) -> None:
    checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    checks = checks if grad else checks[:3]
    for size in (1, 3):
        x, dy = (LAYOUTS[layout](random((2, 3, 4), torch.float32)).detach().requires_grad_(grad) for _ in range(2))
        parameters = [random(size, torch.float32).requires_grad_(grad) for _ in range(arity(name))]
        for run, tensors in [(op(name), (x,)), (backward_op(name), (dy, x))]:
            result = torch.library.opcheck(run, (*tensors, *parameters), test_utils=checks)
            assert result == dict.fromkeys(checks, "SUCCESS")


@each_name
def test_wrong_types_are_named(name: str) -> None:
    names = list(inspect.signature(channels.functions[name]).parameters)
    right = [torch.ones(2, 3), *[torch.ones(3)] * arity(name)]
    for position, argument in enumerate(names):
        for wrong in (None, 1.0, [1.0, 2.0], "x"):
            given: list[Any] = [*right]
            given[position] = wrong
            with pytest.raises(
                TypeError, match=rf"{name}\(\): argument '{argument}' \(position {position + 1}\) must be Tensor"
            ):
                channels.functions[name](*given)
    with pytest.raises(TypeError, match="missing a required argument"):
        channels.functions[name](right[0])
    with pytest.raises(TypeError, match="too many positional arguments"):
        channels.functions[name](*right, right[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        channels.functions[name](*right, other=1)


WRONG_SHAPES = [((2, 3), (4,)), ((2, 3), (1, 3)), ((2, 3), (1, 1)), ((2, 3), (0,)), ((5,), (5,)), ((), (2,)), ((2, 3, 4), (4,))]


@each_name
@pytest.mark.parametrize(("shape", "wrong"), WRONG_SHAPES)
def test_wrong_shapes(name: str, shape: tuple[int, ...], wrong: tuple[int, ...]) -> None:
    """RuntimeError, as torch raises for prelu; with the argument's name, and from the op without data too."""
    names = list(inspect.signature(channels.functions[name]).parameters)[1:]
    x = torch.ones(shape)
    for position, argument in enumerate(names):
        parameters = [torch.ones(1) for _ in names]
        parameters[position] = torch.ones(wrong)
        with pytest.raises(RuntimeError, match=rf"{name}: {argument} "):
            channels.functions[name](x, *parameters)
        with pytest.raises(RuntimeError, match=rf"{name}: {argument} "):
            backward_op(name)(x.to("meta"), x.to("meta"), *(p.to("meta") for p in parameters))
        with pytest.raises(RuntimeError):
            channels.references[name](x, *parameters)


CALLS: dict[str, Callable[..., Any]] = {
    "mixed dtypes": lambda f, x, *p: f(x, *(q.double() for q in p)),
    "integers": lambda f, x, *p: f((x * 4).int(), *((q * 4).int() for q in p)),
    "integer x": lambda f, x, *p: f((x * 4).int(), *p),
    "complex": lambda f, x, *p: f(x.cfloat(), *(q.cfloat() for q in p)),
    "0-dim parameters": lambda f, x, *p: f(x, *(q[0] for q in p)),
    "0-dim x": lambda f, x, *p: f(x[0, 0], *(q[:1] for q in p)),
    "strided parameters": lambda f, x, *p: f(x, *(torch.stack([q, q], 1)[:, 1] for q in p)),
    "meta beside cpu": lambda f, x, *p: f(x.to("meta"), *p),
}


@each_name
@pytest.mark.parametrize("kind", CALLS)
def test_odd_calls_do_what_the_reference_does(name: str, kind: str, random: Any) -> None:
    x, parameters = random((2, 3), torch.float32), [random(3, torch.float32) for _ in range(arity(name))]
    outcomes = []
    for f in (channels.functions[name], channels.references[name]):
        try:
            outcomes.append(CALLS[kind](f, x, *parameters))
        except Exception as error:
            outcomes.append(type(error))
    if isinstance(outcomes[1], Tensor) and not outcomes[1].is_meta:
        torch.testing.assert_close(*outcomes)
    elif isinstance(outcomes[1], Tensor):
        assert (outcomes[0].shape, outcomes[0].dtype) == (outcomes[1].shape, outcomes[1].dtype)
    else:
        assert outcomes[0] is outcomes[1]


@each_name
def test_autocast_gives_the_references_dtype(name: str, random: Any) -> None:
    x, parameters = random((2, 3), torch.float32), [random(3, torch.float32).requires_grad_() for _ in range(arity(name))]
    with torch.autocast(DEVICE, torch.bfloat16):
        for given in (x, x.bfloat16(), x.double()):
            outcomes: list[Any] = []
            for f in (channels.functions[name], channels.references[name]):
                try:
                    y = f(given, *parameters)
                    outcomes.append((y.dtype, [g.dtype for g in torch.autograd.grad(y.sum(), parameters)]))
                except RuntimeError as error:
                    outcomes.append(type(error))
            assert outcomes[0] == outcomes[1], given.dtype


@each_name
def test_torch_function_sees_the_call(name: str, random: Any) -> None:
    seen: list[tuple[Any, tuple[Any, ...]]] = []

    def handle(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
        seen.append((func, (*args, *(kwargs or {}).values())))
        return "handled"

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, types, args, kwargs)

    class Other:
        __torch_function__ = staticmethod(handle)

    function = channels.functions[name]
    inputs: list[Any] = [random((2, 3)), *(random(3) for _ in range(arity(name)))]
    names = list(inspect.signature(function).parameters)
    with Mode():
        assert function(*inputs) == "handled"
        assert function(**dict(zip(names, inputs, strict=True))) == "handled"
    for position in range(len(inputs)):
        given = [*inputs]
        given[position] = Other()
        assert function(*given) == "handled"
    assert all(func is function and len(args) == len(inputs) for func, args in seen)
    assert len(seen) == 2 + len(inputs)

    class Labelled(Tensor):
        pass

    assert type(function(inputs[0].as_subclass(Labelled), *inputs[1:])) is Labelled


def test_what_the_quick_entry_takes(random: Any) -> None:
    class Mode(TorchFunctionMode):
        pass

    class Labelled(Tensor):
        pass

    prelu, maxout = _C.make_direct("prelu"), _C.make_direct("maxout")
    x, weight = random((2, 4)), random(4)
    assert torch.equal(prelu(x, weight), F.prelu(x, weight))
    assert torch.equal(prelu(x, nn.Parameter(weight)), F.prelu(x, weight))
    assert torch.equal(maxout(x, 2, 1), x.unflatten(1, (2, 2)).amax(2))
    others: list[tuple[Any, ...]] = [(x,), (x, weight, weight), (x, 0.5), (x, weight.float()), (x.int(), weight.int())]
    others += [(x.to_sparse(), weight), (x.as_subclass(Labelled), weight), (x, None)]
    if DEVICE != "cpu":
        others.append((x, weight.cpu()))
    for arguments in others:
        assert prelu(*arguments) is None
    for arguments in ((x, 2), (x, True, 1), (x, 2.0, 1), (x, 2**70, 1), (x, 2, None)):
        assert maxout(*arguments) is None
    with Mode():
        assert prelu(x, weight) is None
    x, weight = x.float(), nn.Parameter(weight.float())
    lowered = _C.make_direct("prelu", autocast=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(prelu(x, weight), F.prelu(x.double(), weight.double()).float())
        for given in (x, x.bfloat16()):
            y = lowered(given, weight)
            assert y is not None
            assert_same_bits(y, F.prelu(given, weight), "y")
        assert lowered(x.double(), weight) is None


def test_the_first_argument_has_torchs_name_too(random: Any) -> None:
    x, weight = random((2, 3)), random(3)
    expected = F.prelu(input=x, weight=weight)
    for call in (
        lambda: fastact.prelu(input=x, weight=weight),
        lambda: fastact.prelu(weight=weight, x=x),
        lambda: fastact.prelu(x, weight=weight),
        lambda: torch.compile(lambda t: fastact.prelu(input=t, weight=weight), backend="eager", fullgraph=True)(x),
    ):
        assert torch.equal(call(), expected)
    both = {"input": x, "x": x, "weight": weight}
    for given in (both, {"input": x}, {"weight": weight}, {"x": x, "wait": weight}, {"x": x, "weight": weight, "wait": weight}):
        with pytest.raises(TypeError, match="argument"):
            fastact.prelu(**given)
    for given in ({"input": x}, {"input": x, "weight": weight}, {"x": x, "weight": weight}):
        with pytest.raises(TypeError, match="argument"):
            fastact.prelu(x, **given)


@each_name
def test_compile_sees_the_reference(name: str, random: Any) -> None:
    """In one graph, of torch's own ops, which a compiler can fuse."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph

    inputs = [random((2, 3)), *(random(3) for _ in range(arity(name)))]
    compiled = torch.compile(lambda *a: channels.functions[name](*a) + 1, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), channels.references[name](*inputs) + 1)
    assert len(graphs) == 1
    assert "fastact" not in graphs[0]


@each_name
def test_functions_are_public(name: str) -> None:
    function = channels.functions[name]
    assert getattr(fastact, name) is getattr(fastact.functional, name) is function
    assert (function.__name__, function.__qualname__) == (name, name)
    assert pickle.loads(pickle.dumps(function)) is copy.deepcopy(function) is function
    assert inspect.signature(function) == inspect.signature(channels.references[name])
    for promised in ("Gradient", "Shape", "dtype", "Error"):
        assert promised in (function.__doc__ or "")
    names = "".join(f", Tensor {p}" for p in list(inspect.signature(function).parameters)[1:])
    assert str(op(name)._schema) == f"fastact::{name}(Tensor x{names}) -> Tensor"
    assert str(backward_op(name)._schema).startswith(f"fastact::{name}_backward(Tensor dy, Tensor x{names}, bool[")


# ---- Modules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{}, {"num_parameters": 3}, {"num_parameters": 3, "init": -0.5}, {"dtype": torch.float64}])
def test_prelu_is_its_twin(given: dict[str, Any], random: Any) -> None:
    module, twin = fastact.PReLU(**given), nn.PReLU(**given)
    assert isinstance(module, nn.PReLU)
    assert repr(module) == repr(twin)
    assert inspect.signature(fastact.PReLU) == inspect.signature(nn.PReLU)
    assert list(module.state_dict()) == list(twin.state_dict()) == ["weight"]
    with torch.no_grad():
        twin.weight.mul_(1.5)
    module.load_state_dict(twin.state_dict())
    nn.PReLU(**given).load_state_dict(module.state_dict())
    x = random((2, 3, 4), given.get("dtype", torch.float32))
    found = []
    for m in (module, twin):
        y = m(x)
        y.sum().backward()
        found.append((y.detach(), m.weight.grad))
    assert_same_bits(found[0][0], found[1][0], "y")
    torch.testing.assert_close(found[0][1], found[1][1])


def modules() -> list[nn.Module]:
    return [
        fastact.PReLU(3, -0.25),
        fastact.ScaledSigmoid(4.0, -0.5, learnable=True),
        fastact.ScaledSigmoid(4.0, -0.5, learnable=True, num_parameters=3),
    ]


@pytest.mark.parametrize("number", range(len(modules())))
def test_modules_copy_and_pickle(number: int, random: Any) -> None:
    module, x = modules()[number].eval(), random((2, 3), torch.float32)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(other) is type(module)
        assert repr(other) == repr(module)
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in module.named_parameters()]
        assert not any(a is b for a, b in zip(other.parameters(), module.parameters(), strict=True))
        assert torch.equal(other(x), module(x))
    new = modules()[number]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    new.load_state_dict(module.state_dict())
    assert torch.equal(new(x), module(x))
    # With parameters from outside, as torch.func hands them over.
    halved = {name: p.detach() / 2 for name, p in module.named_parameters()}
    expected = torch.func.functional_call(module, halved, x)
    new.load_state_dict(halved)
    assert torch.equal(new(x), expected)


def test_learnable_scaled_sigmoid(random: Any) -> None:
    module = fastact.ScaledSigmoid(4.0, -0.5, learnable=True, num_parameters=3)
    assert repr(module) == "ScaledSigmoid(learnable=True, num_parameters=3)"
    assert {name: p.tolist() for name, p in module.named_parameters()} == {"scale": [4.0] * 3, "slope": [-0.5] * 3}
    x = random((2, 3, 4), torch.float32)
    assert torch.equal(module(x), fastact.scaled_sigmoid(x, 4.0, -0.5))
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_learnable_scaled_sigmoid_takes_what_prelu_takes() -> None:
    """Keyword arguments of nn.PReLU; and parameters made without numbers get theirs, as such a model is set up."""
    module = fastact.ScaledSigmoid(4.0, -0.5, learnable=True, num_parameters=3, device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype is torch.float64 for p in module.parameters())
    module = module.to_empty(device=DEVICE)
    module.reset_parameters()
    assert {name: p.tolist() for name, p in module.named_parameters()} == {"scale": [4.0] * 3, "slope": [-0.5] * 3}
    assert all(p.requires_grad for p in module.parameters())
    fixed = fastact.ScaledSigmoid(4.0, -0.5, device="meta", dtype=torch.float64)
    fixed.reset_parameters()
    assert (fixed.scale, fixed.slope) == (4.0, -0.5)


def test_scaled_sigmoid_that_does_not_learn_is_as_it_was(random: Any) -> None:
    module = fastact.ScaledSigmoid(4.0, -0.5)
    assert repr(module) == "ScaledSigmoid(scale=4.0, slope=-0.5)"
    assert not module.state_dict()
    assert not list(module.parameters())
    assert (module.scale, module.slope) == (4.0, -0.5)
    x = random((2, 3), torch.float32)
    assert torch.equal(module(x), fastact.scaled_sigmoid(x, 4.0, -0.5))


def test_training_finds_the_parameters(generator: torch.Generator) -> None:
    """Gradient descent on both modules recovers the numbers that made the data."""
    x = torch.randn(512, 2, generator=generator) * 2
    for module, target in [
        (fastact.PReLU(2), functools.partial(F.prelu, weight=torch.tensor([0.5, -0.25]))),
        (
            fastact.ScaledSigmoid(learnable=True, num_parameters=2),
            lambda x: torch.tensor([2.0, 1.5]) * torch.sigmoid(torch.tensor([0.75, 2.0]) * x),
        ),
    ]:
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss = F.mse_loss(module(x), target(x))
            loss.backward()
            optimizer.step()
        # From about 0.1; Adam's last steps are far below this.
        assert loss.item() < 1e-4


@pytest.mark.parametrize("name", [*channels.functions, "maxout"])
def test_a_device_without_autocast(name: str) -> None:
    x = torch.ones(3, 4, device="meta")
    function = getattr(channels, name)
    count = len(inspect.signature(function).parameters) - 1
    given = (2, 1) if name == "maxout" else [torch.ones(4, device="meta")] * count
    for region in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with region:
            assert function(x, *given).is_meta
