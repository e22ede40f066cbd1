"""What torch, Python and their tools see of the package: ops and their schemas, strides without data, functions, modules."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_ROWS, ALONG_DIM, DEVICE, ELEMENTWISE, PUBLIC_ROWS, parameter_sets
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastact
from fastact import _registry, channels, modules

# torch itself calls it, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

# The utilities that look at a call: the fourth, test_autograd_registration, wants an input that requires grad.
CALL_CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")

Fill = Callable[..., Tensor]
LAYOUTS: dict[str, Callable[[Fill], Tensor]] = {
    "contiguous": lambda fill: fill(3, 4),
    "channels_last": lambda fill: fill(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
    "permuted": lambda fill: fill(2, 3, 4).permute(2, 0, 1),
    "sliced": lambda fill: fill(4, 6)[1:, ::2],
    "0-dim": lambda fill: fill(),
    "empty": lambda fill: fill(2, 0, 3),
    "one row": lambda fill: fill(1, 5),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def fill(generator: torch.Generator) -> Fill:
    """Makes float32 tensors of a shape, uniform in [-2, 2]."""
    return lambda *shape: 4 * torch.rand(shape, generator=generator) - 2


def arguments(row: _registry.Row) -> list[tuple[Any, ...]]:
    """What may follow x in a call of the op."""
    return [(-1,), (0,)] if row in ALONG_DIM else parameter_sets(row)


def inplace_op(row: _registry.Row) -> Any:
    return getattr(torch.ops.fastact, row.name + "_")


def class_in(module: Any, row: _registry.Row) -> Any:
    return getattr(module, row.class_name)


def required(tensor: Tensor, wanted: bool) -> Tensor:
    """A leaf of the same layout that requires grad or not."""
    return tensor.detach().requires_grad_(wanted)


# ---- Ops -----------------------------------------------------------------------------------------------------------------


def check_op(op: Any, tensors: list[Tensor], values: tuple[Any, ...]) -> None:
    """torch's own checks of a registration: those that apply to these inputs, all of which must succeed."""
    wanted = any(t.requires_grad for t in tensors)
    checks = (*CALL_CHECKS, "test_autograd_registration") if wanted else CALL_CHECKS
    result = torch.library.opcheck(op.default, (*tensors, *values), test_utils=checks)
    assert result == dict.fromkeys(checks, "SUCCESS")


@each_layout
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_opcheck_forward(any_row: _registry.Row, layout: str, grad: bool, fill: Fill) -> None:
    check_op(any_row.op, [required(LAYOUTS[layout](fill), grad)], arguments(any_row)[0])


@each_layout
@pytest.mark.parametrize("grads", list(itertools.product([False, True], repeat=2)), ids=str)
def test_opcheck_backward(any_row: _registry.Row, layout: str, grads: tuple[bool, bool], fill: Fill) -> None:
    tensors = [required(LAYOUTS[layout](fill), grad) for grad in grads]
    check_op(any_row.backward_op, tensors, arguments(any_row)[0])


@each_layout
def test_opcheck_in_place(row: _registry.Row, layout: str, fill: Fill) -> None:
    x, values = LAYOUTS[layout](fill), arguments(row)[0]
    check_op(inplace_op(row), [required(x, False)], values)
    # The checks hand over a leaf, which may not be overwritten; only these two clone it first, or do not call.
    checks = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    result = torch.library.opcheck(inplace_op(row).default, (required(x, True), *values), test_utils=checks)
    assert result == dict.fromkeys(checks, "SUCCESS")


def check_ops(row: _registry.Row, x: Tensor, dy: Tensor, values: tuple[Any, ...]) -> None:
    """All ops of a row, on inputs that require grad where they may."""
    check_op(row.op, [required(x, True)], values)
    check_op(row.backward_op, [required(dy, True), required(x, True)], values)
    if row in ELEMENTWISE:
        check_op(inplace_op(row), [required(x, False)], values)


def test_opcheck_of_every_dtype(any_row: _registry.Row, dtype: torch.dtype, fill: Fill) -> None:
    check_ops(any_row, fill(3, 4).to(dtype), fill(3, 4).to(dtype), arguments(any_row)[0])


def test_opcheck_of_every_argument(any_row: _registry.Row, fill: Fill) -> None:
    for values in arguments(any_row)[1:]:
        check_ops(any_row, fill(3, 4), fill(3, 4), values)


def test_in_place_ops_survive_tracing(row: _registry.Row, fill: Fill) -> None:
    """opcheck does not look at what an op overwrites: here a graph is traced around one, and values and gradients compared."""
    op, values = inplace_op(row), arguments(row)[0]
    torch._dynamo.reset()  # `around` is one function to Dynamo, whatever op it closes over

    def around(x: Tensor) -> Tensor:
        y = x * 2
        op(y, *values)
        return y * y

    x = fill(3, 4).requires_grad_()
    dy = fill(3, 4)
    found = []
    for f in (around, torch.compile(around, backend="aot_eager", fullgraph=True, dynamic=False)):
        y = f(x)
        found.append((y, torch.autograd.grad(y, x, dy)[0]))
    # The same kernels in the same order: the same bits.
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, msg=lambda text: f"{row.name}: {text}")


# With defaults, so that calls without them stay what they were.
OPTIONS = {"softmax": (", float temperature=1., bool masked_zero=False", ", float temperature=1.")}


def test_schemas_follow_the_row(any_row: _registry.Row) -> None:
    name = any_row.name
    saved, parameters = "saved", "".join(f", float {parameter}" for parameter in any_row.parameters)
    backward_parameters = parameters
    if any_row in ALONG_DIM:
        saved = "y"
        parameters, backward_parameters = (", int dim" + options for options in OPTIONS.get(name, ("", "")))
    assert str(any_row.op.default._schema) == f"fastact::{name}(Tensor x{parameters}) -> Tensor"
    backward = f"fastact::{name}_backward(Tensor dy, Tensor {saved}{backward_parameters}) -> Tensor"
    assert str(any_row.backward_op.default._schema) == backward
    if any_row in ELEMENTWISE:
        assert str(inplace_op(any_row).default._schema) == f"fastact::{name}_(Tensor(a!) x{parameters}) -> ()"


def test_no_other_ops() -> None:
    expected = {f"{row.name}{kind}" for row in ELEMENTWISE for kind in ("", "_", "_backward")}
    more = [row.name for row in ALONG_DIM] + [*channels.functions, "maxout"]
    expected |= {f"{name}{kind}" for name in more for kind in ("", "_backward")}
    found = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastact::")]
    assert sorted(found) == sorted(f"fastact::{name}" for name in expected)
    for name in expected:
        packet = getattr(torch.ops.fastact, name)
        assert packet.overloads() == ["default"]
        assert torch.Tag.pt2_compliant_tag in packet.default.tags, name


def test_dispatch_modes_see_the_op(any_row: _registry.Row, fill: Fill) -> None:
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    values = arguments(any_row)[0]
    x = fill(3, 4).requires_grad_()
    with Watch():
        y = any_row.function(x, *values)
        torch.autograd.grad(y, x, fill(3, 4))
    ours = [func for func in seen if func.namespace == "fastact"]
    assert ours == [any_row.op.default, any_row.backward_op.default]


# ---- Strides without data --------------------------------------------------------------------------------------------------


def random_layout(generator: torch.Generator) -> Tensor:
    """Up to five dimensions, permuted, with steps, gaps, repeated (stride 0), of size 1 or empty."""

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    rank = number(6)
    x = torch.rand([(0, 1, 2, 2, 3, 3, 4, 5)[number(8)] for _ in range(rank)], generator=generator)
    x = x.permute(torch.randperm(rank, generator=generator).tolist())
    for dim in range(rank):
        size, kind = x.shape[dim], number(6)
        if kind == 0:
            x = x.narrow(dim, 0, 1).expand([3 if d == dim else s for d, s in enumerate(x.shape)]) if size else x
        elif kind == 1:
            x = x[(slice(None),) * dim + (slice(number(2), None, 2),)]
    return x


def strides(x: Tensor) -> tuple[int, ...]:
    """Those that mean something: none in an empty tensor, and none of a dimension of size 1."""
    return tuple(stride for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1 and x.numel())


def test_strides_without_data(any_row: _registry.Row, generator: torch.Generator) -> None:
    """Meta and fake tensors get the layout that the kernel gives: what is compiled for one must fit the other."""
    values = (0,) if any_row in ALONG_DIM else arguments(any_row)[0]
    for k in range(30):
        x = random_layout(generator)
        # The other tensor of backward has x's shape, but not always its layout.
        other = x.clone() if k % 2 else torch.zeros(x.shape[::-1]).permute(list(range(x.dim()))[::-1])
        backward = any_row.backward_op
        for op, tensors in [(any_row.op, (x,)), (backward, (x, x)), (backward, (x, other)), (backward, (other, x))]:
            expected = op(*tensors, *values)
            meta = op(*(torch.empty_strided(t.shape, t.stride(), device="meta") for t in tensors), *values)
            with FakeTensorMode() as mode:
                fake = op(*(mode.from_tensor(t) for t in tensors), *values)
            about = (str(op), [(tuple(t.shape), t.stride()) for t in tensors], "kernel", expected.stride())
            for actual in (meta, fake):
                assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), about
                assert strides(actual) == strides(expected), (*about, "without data", actual.stride())


def test_in_place_without_data(row: _registry.Row, generator: torch.Generator) -> None:
    for _ in range(10):
        x = random_layout(generator)
        meta = torch.empty_strided(x.shape, x.stride(), device="meta")
        assert inplace_op(row)(meta, *arguments(row)[0]) is None
        assert (meta.shape, meta.stride()) == (x.shape, x.stride())


def test_dtypes_without_a_kernel_are_refused_without_data_too(any_row: _registry.Row) -> None:
    values = arguments(any_row)[0]
    for dtype in (torch.int64, torch.bool, torch.complex64):
        for device in (DEVICE, "meta"):
            x = torch.ones(2, 3, dtype=dtype, device=device)
            calls = [lambda x=x: any_row.op(x, *values), lambda x=x: any_row.backward_op(x, x, *values)]
            if any_row in ELEMENTWISE:
                calls.append(lambda x=x: inplace_op(any_row)(x, *values))
            for call in calls:
                with pytest.raises(NotImplementedError, match=f"fastact::{any_row.name} not implemented for"):
                    call()


# ---- Functions -----------------------------------------------------------------------------------------------------------


def test_public_names() -> None:
    names, classes = {row.name for row in PUBLIC_ROWS}, {row.class_name for row in PUBLIC_ROWS}
    assert set(fastact.autograd.__all__) == {row.class_name for row in ALL_ROWS}
    names |= {*channels.functions, "maxout"}
    classes |= set(channels.__all__) - names
    assert set(fastact.functional.__all__) == names
    assert set(modules.__all__) == classes
    assert set(fastact.__all__) >= names | classes | {"autograd", "build_info", "functional"}
    for name in fastact.__all__:
        assert hasattr(fastact, name), name
    for name in classes:
        assert getattr(fastact, name) is getattr(modules, name)


def test_functions_say_who_they_are(public_row: _registry.Row) -> None:
    function = public_row.function
    assert getattr(fastact, public_row.name) is getattr(fastact.functional, public_row.name) is function
    assert (function.__name__, function.__qualname__) == (public_row.name, public_row.name)
    assert function.__module__ == "fastact.functional"
    assert getattr(sys.modules[function.__module__], function.__name__) is function
    assert repr(function) == f"<built-in function {public_row.name}>"
    assert isinstance(function, Callable)


def test_functions_copy_and_pickle(public_row: _registry.Row, fill: Fill) -> None:
    function = public_row.function
    assert copy.copy(function) is copy.deepcopy(function) is function
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(function, protocol)) is function
    values = arguments(public_row)[0]
    x = fill(3, 4)
    partial = pickle.loads(
        pickle.dumps(functools.partial(function, **dict(zip(list(parameters_of(public_row)), values, strict=False))))
    )
    assert torch.equal(partial(x), function(x, *values))


def parameters_of(row: _registry.Row) -> dict[str, Any]:
    """Names and defaults of what follows x in the public function."""
    signature = inspect.signature(row.function).parameters.values()
    return {p.name: p.default for p in list(signature)[1:]}


def test_signatures(public_row: _registry.Row) -> None:
    """Tools see of the C function what stands in functional.py; and it takes what torch's function takes."""
    reference = inspect.signature(public_row.reference).parameters.values()
    function = inspect.signature(public_row.function).parameters.values()
    assert [(p.name, p.default, p.kind) for p in function] == [(p.name, p.default, p.kind) for p in reference]
    assert next(iter(function)).name == "x"
    for name, default in public_row.parameters.items() if public_row not in ALONG_DIM else ():
        assert parameters_of(public_row)[name] == default
    if hasattr(F, public_row.name):
        try:
            signature = inspect.signature(getattr(F, public_row.name))
        except ValueError:  # one of torch's own C functions
            return
        twin = {p.name: p.default for p in signature.parameters.values() if p.name[0] != "_"}
        ours = parameters_of(public_row)
        assert list(ours.items())[: len(twin) - 1] == list(twin.items())[1:]
        # What torch's function does not take comes after what it takes, and may be left out.
        assert inspect.Parameter.empty not in ours.values()


def test_docstrings(public_row: _registry.Row) -> None:
    """help() shows the reference's docstring, without the line from which the signature is read."""
    doc, written = inspect.getdoc(public_row.function), inspect.getdoc(public_row.reference)
    assert doc is not None
    assert written is not None
    assert doc == (written if public_row.ulp is None else written.replace("{ulp}", f"{public_row.ulp:g}"))
    assert "{" not in doc
    for promised in ("Gradient", "Shape", "dtype"):
        assert promised in doc, f"{public_row.name} does not say its {promised}"
    assert f"fastact.{public_row.name}" in class_in(fastact, public_row).__doc__
    assert f"fastact.{public_row.name}" in class_in(fastact.autograd, public_row).__doc__


def keywords(row: _registry.Row) -> dict[str, Any]:
    """Something other than the default for every argument after x."""
    other = {"inplace": True, "dim": 1, "dtype": torch.float64, "masked_rows": "zero"}
    return {name: other.get(name, 0.5) for name in parameters_of(row)}


@pytest.mark.parametrize("kind", ["mode", "subclass", "other object"])
def test_torch_function_sees_the_call(public_row: _registry.Row, kind: str, fill: Fill) -> None:
    """func is the public function, so that a handler finds it in its table; the arguments are those given."""
    seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def handle(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> str:
        seen.append((func, args, kwargs or {}))
        return "handled"

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return handle(func, types, args, kwargs)

    class Subclass(Tensor):
        __torch_function__ = staticmethod(handle)

    class Other:
        __torch_function__ = staticmethod(handle)

    x: Any = {"mode": lambda: fill(3, 4), "subclass": lambda: fill(3, 4).as_subclass(Subclass), "other object": Other}[kind]()
    given = keywords(public_row)

    def call() -> None:
        assert public_row.function(x) == "handled"
        assert public_row.function(x, *given.values()) == "handled"
        assert public_row.function(x=x, **given) == "handled"

    if kind == "mode":
        with Mode():
            call()
    else:
        call()
    assert len(seen) == 3
    for (func, args, kwargs), expected in zip(seen, ({}, given, given), strict=True):
        assert func is public_row.function
        bound = inspect.signature(public_row.reference).bind(*args, **kwargs).arguments
        assert bound.pop("x") is x
        assert bound == expected


def test_subclasses_stay_themselves(public_row: _registry.Row, fill: Fill) -> None:
    class Labelled(Tensor):
        pass

    values = arguments(public_row)[0]
    x = fill(3, 4)
    y = public_row.function(x.as_subclass(Labelled), *values)
    assert type(y) is Labelled
    assert torch.equal(y.as_subclass(Tensor), public_row.function(x, *values))

    class Refuses(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return NotImplemented

    with pytest.raises(TypeError, match=public_row.name):
        public_row.function(x.as_subclass(Refuses), *values)


def test_parameter_as_input(any_row: _registry.Row, fill: Fill) -> None:
    values = arguments(any_row)[0]
    x, dy = fill(3, 4), fill(3, 4)
    parameter = nn.Parameter(x.clone())
    y = any_row.function(parameter, *values)
    assert type(y) is Tensor
    assert y.requires_grad
    assert torch.equal(y, any_row.function(x, *values))
    y.backward(dy)
    assert parameter.grad is not None
    leaf = x.requires_grad_()
    assert torch.equal(parameter.grad, torch.autograd.grad(any_row.function(leaf, *values), leaf, dy)[0])


# ---- Modules and autograd Functions --------------------------------------------------------------------------------------


def module_arguments(row: _registry.Row) -> list[dict[str, Any]]:
    """For the constructor: nothing, then something other than the default for every argument it has."""
    other = {"inplace": True, "dim": 1, "masked_rows": "zero"}
    signature = inspect.signature(class_in(fastact, row)).parameters.values()
    # nn.Module's own signature, where a class has none, is *args and **kwargs. What makes parameters of numbers is for
    # test_channels.py.
    known = {*other, *row.parameters}
    return [{}, {p.name: other.get(p.name, 0.5) for p in signature if p.name in known}]


def test_modules_are_their_twins(public_row: _registry.Row) -> None:
    cls, twin = class_in(fastact, public_row), getattr(nn, public_row.class_name, None)
    assert (cls.__name__, cls.__qualname__) == (public_row.class_name, public_row.class_name)
    # Where pickle will look for it.
    assert cls.__module__.split(".")[0] == "fastact"
    assert getattr(sys.modules[cls.__module__], cls.__name__) is cls
    assert issubclass(cls, twin or nn.Module)
    signature, own = (inspect.signature(c).parameters for c in (twin or cls, cls))
    # What torch's class does not take comes after what it takes, and may be left out.
    taken = [name for name, p in signature.items() if p.kind is p.POSITIONAL_OR_KEYWORD] if twin else []
    assert list(own)[: len(taken)] == taken
    assert [own[name].default for name in taken] == [signature[name].default for name in taken]
    for given in module_arguments(public_row):
        module = cls(**given)
        assert module.state_dict() == {}
        assert not [*module.parameters(), *module.buffers(), *module.children()]
        assert module.training
        shown = repr(module)
        extra = {name: value for name, value in given.items() if name not in taken}
        assert all(f"{name}={value!r}" in shown for name, value in extra.items())
        if twin is None:
            continue
        assert isinstance(module, twin)
        theirs = {name: value for name, value in given.items() if name in taken}
        assert repr(cls(**theirs)) == repr(twin(**theirs))
        assert vars(cls(**theirs)).keys() == vars(twin(**theirs)).keys()
        # Weights saved under torch's module load under ours, and the other way round.
        module.load_state_dict(twin(**theirs).state_dict())
        twin(**theirs).load_state_dict(module.state_dict())


def test_modules_compute_what_functions_compute(public_row: _registry.Row, fill: Fill) -> None:
    for given in module_arguments(public_row):
        given = {"dim": 0} if public_row in ALONG_DIM and not given else given
        module = class_in(fastact, public_row)(**given)
        x = fill(3, 4)
        expected = public_row.function(x.clone(), **given)
        received = x.clone()
        y = module(received)
        assert torch.equal(y, expected)
        assert (y is received) == given.get("inplace", False)
        # What the attributes say now, not what they said when it was made.
        parameters = [name for name in public_row.parameters if hasattr(module, name)]
        for name in parameters:
            setattr(module, name, 0.75)
        if parameters:
            changed = given | dict.fromkeys(parameters, 0.75)
            assert torch.equal(module(x.clone()), public_row.function(x.clone(), **changed))


def test_a_module_made_before_it_had_options(fill: Fill) -> None:
    """Softmax alone has more than its twin: a state without that is one of its defaults."""
    old = nn.Softmax(1)
    module = fastact.Softmax.__new__(fastact.Softmax)
    module.__setstate__(vars(old).copy())
    x = fill(3, 4)
    assert torch.equal(module(x), fastact.softmax(x, 1))
    assert repr(module) == repr(old)
    # And what was never given is not in what is saved.
    assert vars(fastact.Softmax(1)).keys() == vars(old).keys()
    with pytest.raises(TypeError, match="temperature"):
        fastact.Softmax(1, torch.tensor(2.0))


def test_modules_copy_and_pickle(public_row: _registry.Row, fill: Fill) -> None:
    for given in module_arguments(public_row):
        given = {"dim": 0} if public_row in ALONG_DIM and not given else given
        module = class_in(fastact, public_row)(**given).eval()
        x = fill(3, 4)
        expected = module(x.clone())
        for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(other) is type(module)
            assert other is not module
            assert repr(other) == repr(module)
            assert not other.training
            assert torch.equal(other(x.clone()), expected)


def test_autograd_functions_are_classes_like_any_other(any_row: _registry.Row) -> None:
    cls = class_in(fastact.autograd, any_row)
    assert issubclass(cls, torch.autograd.Function)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == (any_row.class_name, any_row.class_name, "fastact.autograd")
    assert pickle.loads(pickle.dumps(cls)) is copy.deepcopy(cls) is cls
