"""torch.compile, torch.export and the tracers under them: one graph, without a break, and the same numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from conftest import PUBLIC_ROWS, parameter_sets
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

import fastact
from fastact import _registry, modules

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what torch's compiler imports and calls
    pytest.mark.filterwarnings("ignore:.*Cudagraphs:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with fastact.compiler.opaque():
        yield
    torch._dynamo.reset()


def calls(row: _registry.Row) -> list[dict[str, Any]]:
    """Keyword arguments of the public function."""
    if row.along_dim:
        more = [{"dim": 0, "temperature": 0.5, "masked_rows": "zero"}] if row.parameters else []
        return [{"dim": 0}, {"dim": -1}, {"dim": 1, "dtype": torch.float64}, *more]
    given = [dict(zip(row.parameters, values, strict=True)) for values in parameter_sets(row)[:2]]
    if "precise_grad" in row.arguments:
        given.append({"precise_grad": True})
    return given


def operators(graph: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "call_method")]


def graph_of(f: Callable[..., Any], *args: Tensor) -> list[str]:
    """The operators of the one graph that Dynamo makes of f."""
    backend = EagerAndRecordGraphs()
    torch.compile(f, backend=backend, fullgraph=True)(*args)
    (graph,) = backend.graphs
    return operators(graph)


def test_traces_as_plain_torch(public_row: _registry.Row) -> None:
    """What Inductor gets is what it would get of torch's own function: so it fuses as it would, and is as fast."""
    x = torch.randn(3, 4)
    for given in calls(public_row):
        plain = graph_of(lambda t, given=given: public_row.reference(t, **given), x)
        assert graph_of(lambda t, given=given: public_row.function(t, **given), x) == plain
        assert not [name for name in plain if "fastact" in name]


def models(library: Any) -> nn.Module:
    layers: list[nn.Module] = []
    for name in sorted(modules.__all__):
        cls = getattr(library, name, None)
        layers.append(nn.Linear(8, 8))
        if cls is not None and hasattr(nn, name):
            layers.append(cls(dim=1) if name.endswith("oftmax") else cls())
    return nn.Sequential(*layers)


def test_modules_trace_as_their_twins() -> None:
    x = torch.randn(2, 8)
    assert graph_of(models(fastact), x) == graph_of(models(nn), x)


def test_compiles_once(public_row: _registry.Row) -> None:
    given = calls(public_row)[0]
    counter = CompileCounter()
    compiled = torch.compile(lambda t: public_row.function(t, **given) * 2, backend=counter, fullgraph=True)
    for _ in range(4):
        compiled(torch.randn(3, 4))
    assert counter.frame_count == 1
    counter = CompileCounter()
    compiled = torch.compile(lambda t: public_row.function(t, **given) * 2, backend=counter, fullgraph=True, dynamic=True)
    for n in range(3, 9):
        x = torch.randn(n, n + 4)
        assert torch.equal(compiled(x), public_row.reference(x, **given) * 2)
    assert counter.frame_count == 1


def test_the_first_argument_has_torchs_name_too(public_row: _registry.Row) -> None:
    given = calls(public_row)[0]
    x = torch.randn(3, 4)
    compiled = torch.compile(lambda t: public_row.function(input=t, **given), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), public_row.reference(x, **given))
    twice = torch.compile(lambda t: public_row.function(x=t, input=t, **given), backend="eager")
    with pytest.raises(TypeError):
        twice(x)


def test_autograd_functions_compile(any_row: _registry.Row, generator: torch.Generator) -> None:
    """With the op in the graph, in whose backward its parameters tell what is saved."""
    function = getattr(fastact.autograd, any_row.class_name)
    for values in [(1,)] if any_row.along_dim else [(), *parameter_sets(any_row)]:
        found = []
        torch._dynamo.reset()
        for f in (function.apply, torch.compile(lambda *a: function.apply(*a), backend="aot_eager", fullgraph=True)):
            x = torch.randn(3, 4, generator=generator.manual_seed(1))
            leaf = x.clone().requires_grad_()
            y = f(leaf, *values)
            found.append((f(x, *values), y.detach(), torch.autograd.grad(y.sin().sum(), leaf)[0]))
        # The same kernels in the same order: the same bits.
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, msg=lambda text, values=values: f"{values}: {text}")


def everything(x: Tensor) -> Tensor:
    """All activations, each between other work, with what tells them apart."""
    for k, row in enumerate(PUBLIC_ROWS):
        given = calls(row)[0]
        x = x + row.function(x * (1 + k / 8), **given)
    return x


@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"mode": "reduce-overhead"}], ids=str)
def test_inductor(options: dict[str, Any], generator: torch.Generator) -> None:
    compiled = torch.compile(everything, fullgraph=True, **options)
    for rows in (5, 7) if options.get("dynamic") else (5,):
        x = torch.randn(rows, 12, generator=generator, dtype=torch.float64).requires_grad_()
        dy = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
        results = []
        for f in (everything, compiled):
            y = f(x)
            results.append((y, *torch.autograd.grad(y, x, dy)))
        # A chain of a dozen functions, each with its own few ULP on either side, and slopes that multiply these, at times by
        # some thousands.
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.cpu_only("Dynamo makes tensors of numbers, which it can look into only there")
def test_opaque_keeps_the_kernel(public_row: _registry.Row) -> None:
    x = torch.randn(3, 4)
    for given in calls(public_row):
        with fastact.compiler.opaque(public_row.name):
            names = graph_of(lambda t, given=given: public_row.function(t, **given), x)
            expected = _registry.variants["precise_" + public_row.name] if given.get("precise_grad") else public_row
            assert [name for name in names if "fastact" in name] == [f"fastact.{expected.name}.default"]
            other = next(row for row in PUBLIC_ROWS if row is not public_row)
            assert "fastact" not in str(graph_of(lambda t, other=other: other.function(t, **calls(other)[0]), x))


def test_opaque_runs_the_kernel_under_inductor(generator: torch.Generator) -> None:
    x = torch.randn(6, 50, generator=generator).requires_grad_()
    dy = torch.randn(6, 50, generator=generator)
    with fastact.compiler.opaque("softmax"):
        y = torch.compile(lambda t: fastact.softmax(t, dim=1), fullgraph=True)(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    expected = fastact.softmax(x, dim=1)
    assert torch.equal(y, expected)
    assert torch.equal(dx, torch.autograd.grad(expected, x, dy)[0])


def test_opaque_serves_what_the_kernel_cannot_by_the_reference() -> None:
    with fastact.compiler.opaque(*_registry.rows):
        assert "fastact" not in str(graph_of(lambda t: fastact.sigmoid(t), torch.arange(3)))
        assert "fastact" not in str(graph_of(lambda t: fastact.relu(t * 1, inplace=True), torch.randn(3)))


def test_opaque_puts_back_what_was_set() -> None:
    from fastact import _transforms

    fastact.compiler.opaque("softmax")
    assert _transforms.opaque == {"softmax"}
    with fastact.compiler.opaque("tanh", "relu"):
        assert _transforms.opaque == {"tanh", "relu"}
    assert _transforms.opaque == {"softmax"}
    with pytest.raises(ValueError, match="no activation is called 'gelu'"):
        fastact.compiler.opaque("gelu")
    assert _transforms.opaque == {"softmax"}
    fastact.compiler.opaque()
    assert not _transforms.opaque


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = models(fastact)
        self.last = fastact.ScaledSigmoid(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(fastact.tanh(self.inner(x)))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # of torch 2.11's own load()
@pytest.mark.parametrize("strict", [False, True])
def test_export_and_reload(strict: bool) -> None:
    model, x = Model().eval(), torch.randn(3, 8)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (3, 5):
        x = torch.randn(rows, 8)
        # Strict export traces plain torch, the other one our ops: each has its own few ULP in every layer.
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(any_row: _registry.Row, mode: str) -> None:
    x = torch.randn(3, 4)
    values = (1,) if any_row.along_dim else parameter_sets(any_row)[0]

    def f(t: Tensor) -> tuple[Tensor, ...]:
        t = t.requires_grad_()
        y = any_row.function(t, *values)
        return y, *torch.autograd.grad(y.sin().sum(), t)

    graph = make_fx(f, tracing_mode=mode)(x)
    ours = [name for name in operators(graph) if "fastact" in name]
    assert ours == [f"fastact.{any_row.name}.default", f"fastact.{any_row.name}_backward.default"]
    other = torch.randn(3, 4)
    for got, expected in zip(graph(other), f(other), strict=True):
        assert torch.equal(got, expected)


def test_aot_autograd(any_row: _registry.Row) -> None:
    values = (1,) if any_row.along_dim else parameter_sets(any_row)[0]
    graphs: list[list[str]] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(operators(graph))
        return make_boxed_func(graph)

    f = aot_function(lambda t: any_row.function(t, *values).sin(), record)
    x = torch.randn(3, 4).requires_grad_()
    y = f(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    expected = any_row.function(x, *values).sin()
    assert torch.equal(y, expected)
    torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0], rtol=2.0**-22, atol=2.0**-24)
    assert f"fastact.{any_row.name}.default" in graphs[0]
    assert f"fastact.{any_row.name}_backward.default" in graphs[1]


def test_import_does_not_bring_the_compiler() -> None:
    """Dynamo takes seconds to import: it is told of the functions when somebody else imports it, before or after."""
    import subprocess
    import sys

    after = "import sys, torch, fastact; assert 'torch._dynamo' not in sys.modules; "
    before = "import sys, torch, torch._dynamo, fastact; "
    use = "print(torch.compile(fastact.relu, backend='eager', fullgraph=True)(torch.ones(2)).tolist())"
    for program in (after + use, before + use):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
        assert done.stdout.strip() == "[1.0, 1.0]", done.stderr
