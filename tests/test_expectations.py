"""What people do with torch's activations besides calling them: each works the same with ours.

docs/expectations.md is the list of it, with a link to every test.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_ROWS, DEVICE, PUBLIC_ROWS, module_class, parameter_sets
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import fastact
from fastact import _registry, modules

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.(trace|script|save|load|trace_method)` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
    pytest.mark.filterwarnings("ignore:fastact was built without CUDA:UserWarning"),
]


def values_of(row: _registry.Row) -> tuple[Any, ...]:
    return (0,) if row.along_dim else parameter_sets(row)[0]


def make_module(row: _registry.Row) -> nn.Module:
    return module_class(row)(*values_of(row))


# ---- Autocast ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def autocast() -> Iterator[Any]:
    """Turns autocast on for a device that need not be there: torch.autocast("cuda") would refuse."""
    on: list[str] = []

    def enable(device: str, dtype: torch.dtype) -> None:
        torch.set_autocast_enabled(device, True)
        torch.set_autocast_dtype(device, dtype)
        on.append(device)

    before = {device: torch.get_autocast_dtype(device) for device in ("cpu", "cuda")}
    yield enable
    for device in on:
        torch.set_autocast_enabled(device, False)
        torch.set_autocast_dtype(device, before[device])
    torch.clear_autocast_cache()


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast(any_row: _registry.Row, device: str, to: torch.dtype, autocast: Any) -> None:
    """The dtypes of torch's twins. Without data, which tells the same and needs no GPU."""
    with FakeTensorMode():
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            x = torch.empty(3, 4, dtype=dtype, device=device)
            autocast(device, to)
            expected = any_row.reference(x, *values_of(any_row)).dtype
            assert any_row.op(x, *values_of(any_row)).dtype == expected, f"{any_row.name} {dtype} on {device}"
            assert any_row.function(x, *values_of(any_row)).dtype == expected, f"{any_row.name} {dtype} on {device}"


def test_autocast_of_an_explicit_dtype(autocast: Any) -> None:
    """dtype= is what the caller asked for: autocast leaves it."""
    for row in (row for row in PUBLIC_ROWS if row.along_dim):
        for device in ("cpu", "cuda"):
            autocast(device, torch.bfloat16)
            with FakeTensorMode():
                x = torch.empty(3, 4, dtype=torch.float16, device=device)
                for dtype in (torch.float16, torch.float32, torch.float64):
                    assert row.function(x, 1, dtype).dtype == row.reference(x, 1, dtype).dtype == dtype, (row.name, device)


def test_autocast_around_a_training_step() -> None:
    twins = [
        nn.Sequential(nn.Linear(8, 8), library.Sigmoid(), nn.Linear(8, 4), library.Softmax(dim=1)) for library in (nn, fastact)
    ]
    twins[1].load_state_dict(twins[0].state_dict())
    x = torch.randn(5, 8)
    found = []
    for model in twins:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = model(x)
        y.float().square().sum().backward()
        found.append((y.detach(), *[p.grad for p in model.parameters()]))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert actual is not None
        # The roundings of bfloat16, one per layer and direction.
        torch.testing.assert_close(actual, expected, rtol=2.0**-5, atol=2.0**-8)


# ---- Modes of torch ------------------------------------------------------------------------------------------------------


def test_default_dtype(public_row: _registry.Row) -> None:
    before = torch.get_default_dtype()
    try:
        for default in (torch.float32, torch.float64, torch.bfloat16):
            torch.set_default_dtype(default)
            for x in (torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float16)):
                assert public_row.function(x, *values_of(public_row)).dtype == x.dtype
            integers = torch.arange(6).reshape(2, 3)
            found = []
            for f in (public_row.function, public_row.reference):
                try:
                    found.append(f(integers, *values_of(public_row)).dtype)
                except (RuntimeError, NotImplementedError) as error:
                    found.append(type(error))
            assert found[0] == found[1], (public_row.name, default)
    finally:
        torch.set_default_dtype(before)


def test_inference_mode(public_row: _registry.Row) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        y = public_row.function(x, *values_of(public_row))
        assert y.is_inference()
        assert not y.requires_grad
    with torch.no_grad():
        z = public_row.function(x, *values_of(public_row))
        assert not z.is_inference()
        assert not z.requires_grad
    assert torch.equal(y, z)


def test_saved_tensors_hooks(any_row: _registry.Row) -> None:
    """What is saved can be packed away, here to float64 and back, as save_on_cpu packs it to another device."""
    packed: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        packed.append(t)
        return t.double()

    x = torch.randn(3, 4, requires_grad=True)
    dy = torch.randn(3, 4)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t.float()):
        y = any_row.function(x, *values_of(any_row))
    assert len(packed) == 1
    expected = torch.autograd.grad(any_row.function(x, *values_of(any_row)), x, dy)[0]
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(any_row: _registry.Row, reentrant: bool) -> None:
    linear = nn.Linear(4, 4)

    def block(t: Tensor) -> Tensor:
        return any_row.function(linear(t), *values_of(any_row))

    x = torch.randn(3, 4, requires_grad=True)
    found = []
    for y in (block(x), checkpoint(block, x, use_reentrant=reentrant)):
        found.append(torch.autograd.grad(y.square().sum(), [x, linear.weight]) if not reentrant else _backward(y, x, linear))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(actual, expected)


def _backward(y: Tensor, x: Tensor, linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Reentrant checkpoints know .backward() alone."""
    x.grad = linear.weight.grad = None
    y.square().sum().backward()
    assert x.grad is not None
    assert linear.weight.grad is not None
    return x.grad.clone(), linear.weight.grad.clone()


def test_deterministic_algorithms(any_row: _registry.Row) -> None:
    x = torch.randn(64, 300, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(2):
            y = any_row.function(x, *values_of(any_row))
            found.append((y, torch.autograd.grad(y, x, x.detach())[0]))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Copies, files, processes ----------------------------------------------------------------------------------------------


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make_module(row) for row in ALL_ROWS])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_whole_model_is_copied(way: str) -> None:
    model = Everything()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(3, 4)
    assert repr(other) == repr(model)
    assert torch.equal(other(x), model(x))


def test_modules_pickled_before_an_argument_existed() -> None:
    """Such a module lacks the attribute: the class has its default."""
    for row in PUBLIC_ROWS:
        module = make_module(row)
        for name in list(vars(module)):
            if name in vars(type(module)):
                del vars(module)[name]
        module(torch.randn(3, 4))
        repr(module)


class Activated(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        x = torch.linspace(-2, 2, 40_000).reshape(4, -1) + index
        return torch.stack([row.function(x, *values_of(row)) for row in PUBLIC_ROWS])


@pytest.mark.cpu_only("the workers of a data loader compute there")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # of JAX, where another test has imported it
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method: str) -> None:
    """Large tensors in worker processes, after the parent has computed with threads."""
    data = Activated()
    expected = [data[k] for k in range(4)]
    loader = DataLoader(data, batch_size=1, num_workers=2, multiprocessing_context=method)
    for got, wanted in zip(loader, expected, strict=True):
        assert torch.equal(got[0], wanted)


def test_torchscript_tracing(any_row: _registry.Row) -> None:
    model = nn.Sequential(nn.Linear(4, 4), make_module(any_row))
    x = torch.randn(3, 4)
    traced = torch.jit.trace(model, x)
    assert f"fastact::{any_row.name}" in str(traced.inlined_graph)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for t in (x, torch.randn(5, 4)):
        assert torch.equal(loaded(t), model(t))
    x.requires_grad_()
    assert torch.equal(*(torch.autograd.grad(f(x).square().sum(), x)[0] for f in (loaded, model)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the shapes that Maxout asks for
@pytest.mark.parametrize("name", modules.__all__)
def test_onnx_export(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX has no operators of ours: what its exporters, of traces and of programs, get to see are torch's."""
    arguments = {"Maxout": (2,), "Softmax": (1,), "LogSoftmax": (1,)}.get(name, ())
    model = nn.Sequential(nn.Linear(4, 4), getattr(modules, name)(*arguments))
    x = torch.randn(3, 4)

    def graphs() -> list[str]:
        return [str(torch.jit.trace(model, x).inlined_graph), str(torch.export.export(model, (x,)).graph)]

    assert "fastact::" in graphs()[0]
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for graph in graphs():
        assert "aten" in graph
        assert "fastact::" not in graph
        assert "ops.fastact" not in graph


# ---- Tensors without a kernel ----------------------------------------------------------------------------------------------


def test_nested_tensors(public_row: _registry.Row) -> None:
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    values = (2,) if public_row.along_dim else values_of(public_row)
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        found: list[Any] = []
        for f in (public_row.function, public_row.reference):
            try:
                found.append([t.clone() for t in f(nested, *values).unbind()])
            except (RuntimeError, NotImplementedError) as error:  # torch has not every op for them
                found.append(type(error))
        if isinstance(found[1], list):
            assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), (public_row.name, layout)
        else:
            assert found[0] == found[1], (public_row.name, layout)


@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "quantized", "complex"])
def test_other_tensors_get_the_torch_op(public_row: _registry.Row, kind: str) -> None:
    make = {
        "sparse": lambda: torch.eye(3).to_sparse(),
        "mkldnn": lambda: torch.randn(3, 4, device="cpu").to_mkldnn(),
        "quantized": lambda: torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.quint8),
        "complex": lambda: torch.randn(3, 4, dtype=torch.complex64),
    }[kind]
    x = make()
    found: list[Any] = []
    for f in (public_row.function, public_row.reference):
        try:
            y = f(x, *values_of(public_row))
            y = y.dequantize() if y.is_quantized else y.to_dense() if y.layout != torch.strided else y
            found.append(torch.view_as_real(y) if y.is_complex() else y)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            found.append(type(error))
    if isinstance(found[1], Tensor):
        assert torch.equal(found[0], found[1]), (public_row.name, kind)
    else:
        assert found[0] is found[1], (public_row.name, kind)


class Wrapper(Tensor):
    """A tensor subclass as libraries write them: it handles torch's operators and refuses any other."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "aten":
            return cls.refuse(func)
        args, kwargs = tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
        return tree_map_only(Tensor, cls, func(*args, **kwargs))

    @staticmethod
    def refuse(func: Any) -> Any:
        return NotImplemented


class Strict(Wrapper):
    @staticmethod
    def refuse(func: Any) -> Any:
        raise NotImplementedError(str(func))


@pytest.mark.parametrize("kind", [Wrapper, Strict])
def test_subclasses_that_know_torchs_operators_alone(public_row: _registry.Row, kind: type[Wrapper]) -> None:
    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    found = []
    for f in (public_row.function, public_row.reference):
        wrapped = kind(x.clone()).requires_grad_()
        y = f(wrapped, *values_of(public_row))
        (dx,) = torch.autograd.grad(y, wrapped, kind(dy))
        assert type(y) is type(dx) is kind
        found.append((y.inner, dx.inner))
        if "inplace" in public_row.arguments:
            overwritten = kind(x.clone())
            assert f(overwritten, *values_of(public_row), inplace=True) is overwritten
            found[-1] += (overwritten.inner,)
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_subclasses_that_take_any_operator_see_ours(public_row: _registry.Row) -> None:
    seen: list[Any] = []

    class Takes(Wrapper):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            args, kwargs = tree_map_only(Wrapper, lambda t: t.inner, (args, kwargs or {}))
            return tree_map_only(Tensor, cls, func(*args, **kwargs))

    x, dy = torch.randn(3, 4), torch.randn(3, 4)
    wrapped = Takes(x).requires_grad_()
    y = public_row.function(wrapped, *values_of(public_row))
    torch.autograd.grad(y, wrapped, Takes(dy))
    ours = [func for func in seen if func.namespace == "fastact"]
    assert ours == [public_row.op.default, public_row.backward_op.default]


@pytest.mark.parametrize("error", [TypeError("of the caller"), RuntimeError("of the caller"), KeyboardInterrupt()], ids=repr)
def test_errors_of_subclasses_are_kept(public_row: _registry.Row, error: BaseException) -> None:
    class Fails(Wrapper):
        @staticmethod
        def refuse(func: Any) -> Any:
            raise error

    with pytest.raises(type(error)) as caught:
        public_row.function(Fails(torch.randn(3, 4)), *values_of(public_row))
    assert caught.value is error


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors is in prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:.*is not implemented in __torch_dispatch__ for MaskedTensor:UserWarning")
def test_masked_tensors(public_row: _registry.Row) -> None:
    data = torch.randn(3, 4)
    mask = data > -0.5
    found: list[Any] = []
    for f in (public_row.function, public_row.reference):
        try:
            y = f(torch.masked.masked_tensor(data, mask), *values_of(public_row))
            found.append((y.get_mask(), y.get_data().masked_fill(~mask, 0)))
        except TypeError as error:  # torch has not every op for them
            found.append(str(error))
    assert type(found[0]) is type(found[1]), found
    if public_row.name in ("sigmoid", "tanh", "softmax", "scaled_sigmoid"):
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_functional_names_are_torchs() -> None:
    """What F has under our name, or under it without the underscore, takes the same first arguments: a swap of the prefix."""
    for row in PUBLIC_ROWS:
        assert hasattr(F, row.name) or hasattr(F, row.name.replace("_", "")) or row.name == "scaled_sigmoid"
        assert hasattr(nn, row.class_name) == issubclass(
            getattr(modules, row.class_name), getattr(nn, row.class_name, ()) or ()
        )
