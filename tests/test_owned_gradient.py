"""The backward writes into the incoming gradient where nobody else can see that, and never where somebody can."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import dlpack

import fastact
from fastact import memory

pytestmark = pytest.mark.cpu_only("no GPU writes in place")

MIB = 1 << 20
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": fastact.sigmoid,
    "relu": fastact.relu,
    "leaky_relu, input saved": lambda x: fastact.leaky_relu(x, -0.5),
    "tanh": fastact.tanh,
    "scaled_sigmoid": lambda x: fastact.scaled_sigmoid(x, 2.0, 3.0),
    "elu": fastact.elu,
    "softmax": lambda x: fastact.softmax(x, -1),
    "softmax at a temperature": lambda x: fastact.softmax(x, -1, temperature=0.7),
    "log_softmax": lambda x: fastact.log_softmax(x, -1),
}
# From malloc, from torch's allocator, and from the pool.
SHAPES = [(3, 7), (40, 1000), (300, 1001)]


@pytest.fixture(params=OPS.values(), ids=list(OPS))
def op(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=SHAPES, ids=str)
def x(request: pytest.FixtureRequest, generator: torch.Generator) -> Tensor:
    return torch.randn(request.param, generator=generator).requires_grad_()


class Give(torch.autograd.Function):
    """The identity, whose backward hands on what `given` makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, given: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.given = given
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.given(dy), None


def expected(op: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor) -> Tensor:
    """By the registered op, whose arguments are never written."""
    y = op(x)
    assert y.grad_fn is not None
    return torch.autograd.grad(y, x, dy.clone(), create_graph=True)[0].detach()


def test_it_does_where_the_gradient_is_its_own(op: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
    """No block is asked for: the product's gradient comes from torch, and the result is in the same place."""
    x = torch.randn(300, 1001, generator=generator).requires_grad_()
    weight = torch.randn(x.shape, generator=generator)
    z = (op(x * 1) * weight).sum()
    before = memory.stats()
    z.backward()
    after = memory.stats()
    assert (after["hits"], after["misses"]) == (before["hits"], before["misses"])
    assert x.grad is not None
    assert torch.equal(x.grad, expected(op, x, weight))


# What follows the activation, in torch's own nodes: gradients that are views, shared, expanded, of another layout.
GRAPHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda y, w: y * w,
    "sum": lambda y, w: y.sum() * w,
    "expanded": lambda y, w: y.expand(2, *y.shape) * w,
    "transposed": lambda y, w: y.t() * w.t(),
    "both halves of one": lambda y, w: torch.cat([y, y]) * torch.cat([w, -3 * w]),
    "stacked": lambda y, w: torch.stack([y * 2, y]) * w,
    "rows": lambda y, w: sum(row * (k + 1) for k, row in enumerate((y * w).unbind()[:4])),  # type: ignore[return-value]
    "part": lambda y, w: (y * w)[1:, 2:],
    "added": lambda y, w: (y + w.requires_grad_()) * w.detach(),
    "itself": lambda y, w: y * y * w,
    "itself, added": lambda y, w: (y + y) * w,
    "reshaped": lambda y, w: y.reshape(-1) * w.reshape(-1),
    "softmax after it": lambda y, w: fastact.softmax(y, 0) * w,
    "relu after it": lambda y, w: fastact.relu(y) * w,
}


@pytest.mark.parametrize("graph", GRAPHS.values(), ids=list(GRAPHS))
def test_any_graph(
    op: Callable[[Tensor], Tensor], graph: Callable[[Tensor, Tensor], Tensor], x: Tensor, generator: torch.Generator
) -> None:
    weight = torch.randn(x.shape, generator=generator)
    leaf = op(x.detach()).requires_grad_()
    (dy,) = torch.autograd.grad(graph(leaf, weight).sum(), leaf)
    y = op(x)
    z = graph(y, weight).sum()
    z.backward(retain_graph=True)
    assert x.grad is not None
    assert torch.equal(x.grad, expected(op, x, dy))
    z.backward()
    assert torch.equal(x.grad, 2 * expected(op, x, dy))


KEEPERS: dict[str, Callable[[Tensor, list[Any]], Tensor]] = {
    "the tensor": lambda g, kept: kept.append(g) or g,
    "a view": lambda g, kept: kept.append(g.view(-1)) or g,
    "detached": lambda g, kept: kept.append(g.detach()) or g,
    "an array": lambda g, kept: kept.append(g.numpy()) or g,
    "dlpack": lambda g, kept: kept.append(dlpack.to_dlpack(g)) or g,
    "the storage": lambda g, kept: kept.append(g.untyped_storage()) or g,
    "of an array": lambda g, kept: kept.append(g.numpy().copy()) or torch.from_numpy(kept[-1]),
    "lazily cloned": lambda g, kept: kept.append(g.clone()) or torch._lazy_clone(kept[-1]),
    "part of another": lambda g, kept: kept.append(torch.cat([g, g])) or kept[-1][: len(g)],
    "expanded": lambda g, kept: kept.append(g.flatten()[:1].clone()) or kept[-1].expand_as(g),
    "transposed": lambda g, kept: kept.append(g.t().contiguous()) or kept[-1].t(),
    "in shared memory": lambda g, kept: kept.append(g.clone().share_memory_()) or kept[-1],
}


def as_tensor(kept: Any) -> Tensor:
    if isinstance(kept, torch.UntypedStorage):
        return torch.tensor([], dtype=torch.float32).set_(kept)
    if isinstance(kept, Tensor):
        return kept
    return torch.from_dlpack(kept) if hasattr(kept, "__dlpack__") else dlpack.from_dlpack(kept)


@pytest.mark.parametrize("keep", KEEPERS.values(), ids=list(KEEPERS))
def test_what_others_hold_is_not_written(
    op: Callable[[Tensor], Tensor], keep: Callable[[Tensor, list[Any]], Tensor], x: Tensor, generator: torch.Generator
) -> None:
    dy = torch.randn(x.shape, generator=generator)
    kept: list[Any] = []
    copies: list[Tensor] = []
    given: list[Tensor] = []

    def hand_on(_: Tensor) -> Tensor:
        gradient = keep(dy.clone(), kept)
        copies.append(as_tensor(kept[0]).clone() if type(kept[0]).__name__ != "PyCapsule" else dy.clone())
        given.append(gradient.clone())
        return gradient

    Give.apply(op(x), hand_on).sum().backward()
    assert torch.equal(as_tensor(kept[0]), copies[0])
    assert x.grad is not None
    assert torch.equal(x.grad, expected(op, x, given[0]))


def test_hooks(op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> None:
    """Of the tensor and of the node, before and after: what they were shown stays as it was."""
    dy = torch.randn(x.shape, generator=generator)
    shown: list[Tensor] = []
    y = op(x)
    y.register_hook(lambda g: shown.append(g))
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda gradients: shown.append(gradients[0]))
    y.grad_fn.register_hook(lambda _, gradients: shown.append(gradients[0]))
    Give.apply(y, lambda _: dy.clone()).sum().backward()
    assert len(shown) == 3
    assert all(torch.equal(g, dy) for g in shown)


def test_retained_gradients_and_graphs(op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> None:
    dy = torch.randn(x.shape, generator=generator)
    y = op(x)
    y.retain_grad()
    z = Give.apply(y, lambda _: dy.clone()).sum()
    z.backward(retain_graph=True)
    assert y.grad is not None
    assert x.grad is not None
    assert torch.equal(y.grad, dy)
    first = x.grad.clone()
    z.backward()
    assert torch.equal(y.grad, 2 * dy)
    assert torch.equal(x.grad, 2 * first)


def test_gradients_asked_for(op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> None:
    """torch.autograd.grad: the one given, and that of the activation's output, which it returns as well."""
    dy = torch.randn(x.shape, generator=generator)
    given = dy.clone()
    y = op(x)
    (dx,) = torch.autograd.grad(y, x, given, retain_graph=True)
    assert torch.equal(given, dy)
    z = Give.apply(y, lambda _: dy.clone()).sum()
    of_y, of_x = torch.autograd.grad(z, (y, x))
    assert torch.equal(of_y, dy)
    assert torch.equal(of_x, dx)


def test_one_gradient_for_two(op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> None:
    """An addition hands the same tensor to both sides, whichever comes first."""
    dy = torch.randn(x.shape, generator=generator)
    for swapped in (False, True):
        other = torch.zeros_like(x).requires_grad_()
        y = op(x)
        z = other + y if swapped else y + other
        Give.apply(z, lambda _: dy.clone()).sum().backward()
        assert other.grad is not None
        assert torch.equal(other.grad, dy)
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    Give.apply(op(a) + op(b), lambda _: dy.clone()).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(a.grad, expected(op, a, dy))


def test_a_view_of_a_gradient_that_is_still_wanted(
    op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator
) -> None:
    """The tensor has no other reference, but its storage has: the gradient of the other summand, whose turn comes later."""
    dy = torch.randn(x.shape, generator=generator)
    a, b = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    later = op(b).view(-1)
    ((op(a).view(-1) + later) * dy.view(-1)).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(b.grad, expected(op, b, dy))
    assert torch.equal(a.grad, b.grad)


def test_second_derivatives(op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> None:
    dy = torch.randn(x.shape, generator=generator)
    fresh = []
    z = Give.apply(op(x), lambda _: fresh.append(dy.clone()) or fresh[-1])
    (dx,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    assert torch.equal(fresh[0], dy)
    assert torch.equal(dx.detach(), expected(op, x, dy))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, on first use
def test_forward_mode_over_reverse_mode(op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> None:
    """A gradient that has a tangent goes the long way."""
    dy, tangent = (torch.randn(x.shape, generator=generator) for _ in range(2))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(dy.clone(), tangent)
        (dx,) = torch.autograd.grad(op(x), x, dual)
        primal, derivative = torch.autograd.forward_ad.unpack_dual(dx)
        assert torch.equal(primal, expected(op, x, dy))
        assert derivative is not None
        torch.testing.assert_close(derivative, expected(op, x, tangent))


def test_anomaly_mode(op: Callable[[Tensor], Tensor], x: Tensor, generator: torch.Generator) -> None:
    dy = torch.randn(x.shape, generator=generator)
    kept = []
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        Give.apply(op(x), lambda _: kept.append(dy.clone()) or kept[-1]).sum().backward()
    assert torch.equal(kept[0], dy)


def test_saved_tensor_hooks_that_give_the_gradient_back(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """The unpacked tensor and the gradient are one."""
    memo: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: memo.append(t.detach().clone()), lambda _: memo[0]):
        y = op(x)
    before = memo[0].clone()
    (dx,) = torch.autograd.grad(Give.apply(y, lambda _: memo[0]).sum(), x)
    assert torch.equal(memo[0], before)
    assert dx.data_ptr() != memo[0].data_ptr()


def test_a_chain_needs_no_block() -> None:
    """Eight layers: the gradient stays where it came."""
    x = torch.randn(MIB, requires_grad=True)
    y = x * 1
    for _ in range(8):
        y = fastact.tanh(y)
    z = (y * 2).sum()
    before = memory.stats()
    z.backward()
    after = memory.stats()
    assert (after["hits"], after["misses"]) == (before["hits"], before["misses"])


@pytest.mark.parametrize("mode", ["profiler", "dispatch mode"])
def test_watched_calls_go_through_the_dispatcher(mode: str) -> None:
    code = """
import sys, torch, fastact
from torch.utils._python_dispatch import TorchDispatchMode
seen = []
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        seen.append(str(function))
        return function(*args, **(kwargs or {}))
x = torch.randn(5, requires_grad=True)
if sys.argv[1] == "dispatch mode":
    with Watch():
        fastact.relu(x.detach())
        (fastact.relu(x) * 2).sum().backward()
else:
    with torch.profiler.profile() as profile:
        fastact.relu(x.detach())
        (fastact.relu(x) * 2).sum().backward()
    seen = [event.name for event in profile.events()]
names = [name.replace("fastact.", "fastact::").removesuffix(".default") for name in seen]
assert names.count("fastact::relu") == 2, names
assert names.count("fastact::relu_backward") == 1, names
"""
    done = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-600:]


def test_other_calls_do_not() -> None:
    """A kernel put in the place of ours is not asked: the way that saves a third of a small call is taken."""
    code = """
import warnings, torch, fastact
warnings.simplefilter("ignore")
library = torch.library.Library("fastact", "IMPL")
library.impl("relu", lambda x: torch.full_like(x, 7), "CPU")
library.impl("relu_backward", lambda dy, y: torch.full_like(dy, 7), "CPU")
x = torch.ones(5, requires_grad=True)
assert torch.ops.fastact.relu(x.detach()).tolist() == [7] * 5
assert fastact.relu(x.detach()).tolist() == [1] * 5
with torch.no_grad():
    assert fastact.relu(x).tolist() == [1] * 5
y = fastact.relu(x)
assert y.tolist() == [7] * 5
(y * 2).sum().backward()
assert x.grad.tolist() == [2] * 5
with torch.autocast("cpu"):
    assert fastact.relu(x.detach()).tolist() == [7] * 5
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-600:]
