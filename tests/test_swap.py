"""Swapping in whole models: what `patch` changes and what it leaves, what `unpatch` brings back, which calls `functional_patch`
catches."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from models import MODELS, Model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastact
from fastact import _registry, functional, modules, swap

# torch itself calls the first, when forward mode is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit..*` is deprecated:DeprecationWarning")

TWINS = [getattr(nn, name) for name in modules.__all__ if hasattr(nn, name)]
NAMES = functional.__all__
SPACES = {"F": F, "torch": torch, "Tensor": Tensor, "special": torch.special}

# Arguments that have no default, or one that torch warns of.
ARGUMENTS: dict[str, Any] = {"dim": 1, "weight": torch.tensor([0.3])}

# Ours and torch's activations are within some 5 ULP of each other, 1e-15 in float64. Depth, normalisation over few values and
# sums that cancel make more of that in these models, but not 1e3 times as much; what is wrong is wrong by far more.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}

each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.make.__name__)
each_twin = pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
each_caught = pytest.mark.parametrize("name", [name for name in NAMES if hasattr(F, name)])


class Watch(TorchDispatchMode):
    """Notes the forward ops of ours that run in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if func.namespace == "fastact" and not name.endswith("_backward"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def kernels(call: Callable[[], Any]) -> list[str]:
    """The ops of ours that a call runs."""
    with Watch() as watch:
        call()
    return watch.seen


def made(cls: type[nn.Module]) -> nn.Module:
    return cls(**{name: ARGUMENTS[name] for name in inspect.signature(cls).parameters if name in ARGUMENTS})


def arguments(name: str) -> dict[str, Any]:
    """What a call of an activation needs after x."""
    return {k: v for k, v in ARGUMENTS.items() if k in inspect.signature(getattr(fastact, name)).parameters}


def ours(cls: type[nn.Module]) -> type[nn.Module]:
    return getattr(fastact, cls.__name__)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture
def x(generator: torch.Generator) -> Tensor:
    return torch.randn(6, 7, generator=generator)


def step(model: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Output and all gradients. The model may overwrite its input's copy."""
    y = model(x.clone())
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy)]


# ---- Models --------------------------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("way", ["patch", "functional_patch", "both"])
def test_models_compute_the_same(model: Model, way: str, generator: torch.Generator) -> None:
    net = model.build(generator)
    x = torch.randn(model.shape, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(net(x).shape, generator=generator, dtype=torch.float64)
    expected = step(net, x, dy)
    calls = 0
    if way != "functional_patch":
        report = fastact.patch(net)
        calls = model.module_calls
        assert report.replaced
    if way != "patch":
        calls = model.module_calls + model.function_calls
        with fastact.functional_patch(), Watch() as watch:
            actual = step(net, x, dy)
    else:
        with Watch() as watch:
            actual = step(net, x, dy)
    assert len(watch.seen) == calls, watch.seen
    names = ["output", "input", *(name for name, _ in net.named_parameters())]
    for name, a, b in zip(names, actual, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    # Nothing is left of the block.
    assert len(kernels(lambda: net(x))) == (0 if way == "functional_patch" else model.module_calls)


@each_model
def test_unpatch_restores_models(model: Model, generator: torch.Generator) -> None:
    net = model.build(generator)
    x = torch.randn(model.shape, generator=generator, dtype=torch.float64)
    before = {name: (module, type(module), list(vars(module).items())) for name, module in net.named_modules()}
    expected = net(x)
    replaced = fastact.patch(net).replaced
    assert len(kernels(lambda: net(x))) == model.module_calls
    report = fastact.unpatch(net)
    assert [(e.path, e.old, e.new) for e in report.replaced] == [(e.path, e.new, e.old) for e in replaced]
    assert same(net(x), expected)
    assert kernels(lambda: net(x)) == []
    after = dict(net.named_modules())
    assert list(after) == list(before)
    for name, (module, cls, attributes) in before.items():
        assert after[name] is module
        assert type(module) is cls
        assert [k for k, _ in attributes] == list(vars(module))
        assert all(vars(module)[k] is v for k, v in attributes)


# ---- What can be swapped -------------------------------------------------------------------------------------------------


def test_every_module_of_the_same_name_is_a_twin() -> None:
    assert TWINS
    assert set(swap._TWINS) == set(TWINS)
    # Attention is no activation, though torch has it among them.
    assert nn.MultiheadAttention not in swap._OTHERS


@each_twin
def test_swapped_modules_are_as_if_made_by_hand(twin: type[nn.Module], x: Tensor) -> None:
    """Nothing is missing that a constructor of ours would have set, and the only thing more is the mark."""
    module, other = made(twin), made(ours(twin))
    other.load_state_dict(module.state_dict())
    (entry,) = fastact.patch(module)
    assert entry == ("", f"torch.nn.{twin.__name__}", f"fastact.{twin.__name__}", "")
    assert type(module) is ours(twin)
    assert vars(module).keys() - vars(other).keys() == {"_fastact_patched"}
    assert vars(other).keys() <= vars(module).keys()
    assert repr(module) == repr(other)
    assert module.state_dict().keys() == other.state_dict().keys()
    assert same(module(x), other(x))
    assert len(kernels(lambda: module(x))) == 1


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@each_twin
def test_what_a_module_has_it_keeps(twin: type[nn.Module], x: Tensor) -> None:
    """Hooks of every kind fire as before; attributes, parameters, the training flag, and whoever holds the module."""
    fired: list[str] = []

    def note(kind: str) -> Callable[..., None]:
        return lambda *_, **__: fired.append(kind)

    module = made(twin).eval()
    module.register_forward_pre_hook(note("forward_pre"))
    module.register_forward_hook(note("forward"), with_kwargs=True)
    module.register_forward_hook(note("always"), always_call=True)
    module.register_full_backward_pre_hook(note("backward_pre"))
    module.register_full_backward_hook(note("backward"))
    module.register_state_dict_pre_hook(note("state_dict_pre"))
    module.register_state_dict_post_hook(note("state_dict"))
    module.register_load_state_dict_pre_hook(note("load_pre"))
    module.register_load_state_dict_post_hook(note("load"))
    module.label = ["mine"]
    module.gain = nn.Parameter(torch.ones(2))
    module.register_buffer("count", torch.zeros(2), persistent=False)
    optimizer = torch.optim.SGD(module.parameters())
    model = nn.Sequential(nn.Linear(7, 7), module)

    def use() -> list[str]:
        fired.clear()
        model(x.clone()).sum().backward()
        module.load_state_dict(module.state_dict())
        return list(fired)

    expected, before = use(), dict(vars(module))
    assert len(set(expected)) == 9
    for swapped in (fastact.patch, fastact.unpatch):
        swapped(model)
        assert isinstance(module, ours(twin)) == (swapped is fastact.patch)
        assert use() == expected
        assert model[1] is module
        assert not module.training
        assert module.gain is optimizer.param_groups[0]["params"][-1]
        left = {k: v for k, v in vars(module).items() if k != "_fastact_patched"}
        assert left.keys() == before.keys()
        assert all(left[k] is before[k] for k in before)


@each_twin
def test_parametrizations_stay(twin: type[nn.Module], x: Tensor) -> None:
    def parametrized(module: nn.Module) -> nn.Module:
        if not hasattr(module, "gain"):
            module.gain = nn.Parameter(torch.ones(2))
        return parametrize.register_parametrization(module, "gain", Double())

    def check(module: nn.Module, base: type[nn.Module]) -> None:
        assert type(module).__bases__ == (base,)
        assert type(module).__name__ == f"Parametrized{twin.__name__}"
        assert parametrize.is_parametrized(module, "gain")
        assert torch.equal(module.gain, 2 * torch.ones(2))
        assert len(kernels(lambda: module(x))) == (base is not twin)
        twice = copy.deepcopy(module)
        assert type(twice).__bases__ == (base,)
        assert torch.equal(twice.gain, module.gain)

    module = parametrized(made(twin))
    (entry,) = fastact.patch(module)
    assert entry == ("", f"torch.nn.{twin.__name__}", f"fastact.{twin.__name__}", "")
    check(module, ours(twin))
    assert len(fastact.unpatch(module).replaced) == 1
    check(module, twin)

    fastact.patch(module)
    parametrize.remove_parametrizations(module, "gain", leave_parametrized=False)
    assert type(module) is ours(twin)
    parametrized(module)
    assert len(fastact.unpatch(module).replaced) == 1
    check(module, twin)
    parametrize.remove_parametrizations(module, "gain", leave_parametrized=False)
    assert type(module) is twin


def test_parametrized_copies_are_swapped_apart() -> None:
    """Torch lets copies of a parametrized module share a class; only the one that is swapped may change."""
    module = nn.ReLU()
    module.gain = nn.Parameter(torch.ones(2))
    parametrize.register_parametrization(module, "gain", Double())
    other = copy.deepcopy(module)
    fastact.patch(module)
    assert isinstance(module, fastact.ReLU)
    assert not isinstance(other, fastact.ReLU)
    assert torch.equal(other.gain, module.gain)


class Subclass(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class SubclassOfOurs(fastact.ReLU):
    pass


class Holds(nn.Module):
    """Keeps functions as attributes, as torch's transformer layers do."""

    def __init__(self, *functions: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.second = functions


def with_own_forward() -> nn.Module:
    module = nn.ReLU()
    module.forward = lambda x: x  # as tools that offload or wrap modules do
    return module


FUNCTION = "a function: functional_patch() is for those"
LEFT_ALONE: list[tuple[str, Callable[[], nn.Module], list[tuple[str, str, str]]]] = [
    ("subclass", Subclass, [("", f"{__name__}.Subclass", "a subclass of torch.nn.ReLU")]),
    ("subclass of ours", SubclassOfOurs, [("", f"{__name__}.SubclassOfOurs", "a subclass of fastact.ReLU")]),
    ("ours", fastact.ScaledSigmoid, [("", "fastact.ScaledSigmoid", "fastact's already")]),
    ("no twin", nn.GELU, [("", "torch.nn.GELU", "fastact has no GELU")]),
    ("own forward", with_own_forward, [("", "torch.nn.ReLU", "this object has a forward of its own")]),
    ("scripted", lambda: torch.jit.script(nn.Sequential(nn.ReLU())), [("0", "torch.nn.ReLU", "scripted or traced")]),
    (
        "traced",
        lambda: torch.jit.trace(nn.Sequential(nn.ReLU()), torch.ones(2, 2)),
        [("0", "torch.nn.ReLU", "scripted or traced")],
    ),
    (
        "functions",
        lambda: Holds(F.relu, torch.tanh),
        [("first", "torch.nn.functional.relu", FUNCTION), ("second", "torch.tanh", FUNCTION)],
    ),
    (
        "function in a layer",
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4)),
        [("0.activation", "torch.nn.functional.relu", FUNCTION)],
    ),
    ("not activations", lambda: nn.Sequential(nn.Linear(2, 2), nn.MultiheadAttention(2, 1), Holds(F.linear, torch.exp)), []),
]


@pytest.mark.parametrize(("make", "expected"), [row[1:] for row in LEFT_ALONE], ids=[row[0] for row in LEFT_ALONE])
def test_what_is_left_alone_is_reported(make: Callable[[], nn.Module], expected: list[tuple[str, str, str]]) -> None:
    model = make()
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    report = fastact.patch(model)
    assert report.replaced == ()
    assert [(entry.path, entry.old, entry.reason) for entry in report] == expected
    for module, cls, attributes in before:
        assert type(module) is cls
        assert vars(module) == attributes


# ---- Sharing, filter, dry run --------------------------------------------------------------------------------------------


def shared() -> nn.Sequential:
    """A sigmoid of its own, and one tanh in three places."""
    tanh = nn.Tanh()
    return nn.Sequential(nn.Sequential(nn.Linear(7, 7), tanh), nn.Sigmoid(), tanh, nn.Sequential(tanh))


def test_shared_modules_stay_one_and_are_listed_in_every_place(x: Tensor) -> None:
    model = shared()
    tanh = model[2]
    for swapped, cls in ((fastact.patch, fastact.Tanh), (fastact.unpatch, nn.Tanh)):
        report = swapped(model)
        assert [entry.path for entry in report] == [entry.path for entry in report.replaced] == ["0.1", "1", "2", "3.0"]
        assert model[0][1] is model[2] is model[3][0] is tanh
        assert type(tanh) is cls


def test_filter_sees_the_names_of_what_could_be_swapped() -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.GELU(), Subclass(), fastact.ReLU(), nn.Sequential(nn.ReLU()), nn.Sigmoid())
    seen = []

    def keep_relu(name: str, module: nn.Module) -> bool:
        seen.append((name, module))
        return not isinstance(module, nn.ReLU)

    report = fastact.patch(model, keep_relu)
    assert seen == [("4.0", model[4][0]), ("5", model[5])]
    assert [(entry.path, entry.reason) for entry in report][-2:] == [("4.0", "filter_fn"), ("5", "")]
    assert type(model[4][0]) is nn.ReLU
    assert type(model[5]) is fastact.Sigmoid


def test_a_shared_module_stays_if_the_filter_keeps_one_of_its_names() -> None:
    model = shared()
    report = fastact.patch(model, lambda name, module: name != "2")
    also = "the same module as 2, which filter_fn keeps"
    assert [(entry.path, entry.reason) for entry in report] == [("0.1", also), ("1", ""), ("2", "filter_fn"), ("3.0", also)]
    assert type(model[2]) is nn.Tanh


def test_nothing_has_changed_where_the_filter_raises() -> None:
    model = shared()

    def raises(name: str, module: nn.Module) -> bool:
        if name == "3.0":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fastact.patch(model, raises)
    assert not any(isinstance(module, tuple(map(ours, TWINS))) for module in model.modules())


def test_a_dry_run_changes_nothing_and_says_what_would_happen() -> None:
    model = shared()
    before = [(module, type(module), dict(vars(module))) for module in model.modules()]
    dry = fastact.patch(model, lambda name, _: name != "1", dry_run=True)
    for module, cls, attributes in before:
        assert type(module) is cls
        assert vars(module) == attributes
    assert str(dry).splitlines()[-1] == "3 of 4 activations would be replaced"
    assert list(dry) == list(fastact.patch(model, lambda name, _: name != "1"))


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: fastact.patch(F.relu), "model"),
        (lambda: fastact.unpatch([nn.ReLU()]), "model"),
        (lambda: fastact.patch(nn.ReLU(), "relu"), "filter_fn"),
    ],
)
def test_bad_arguments(call: Callable[[], Any], argument: str) -> None:
    with pytest.raises(TypeError, match=f"argument '{argument}' must be"):
        call()


# ---- The report ----------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.GELU(), nn.Sequential(nn.Softmax(dim=1)))
    report = fastact.patch(model)
    table = """\
path  old               new
1     torch.nn.ReLU     fastact.ReLU
2     torch.nn.GELU     kept: fastact has no GELU
3.0   torch.nn.Softmax  fastact.Softmax
2 of 3 activations replaced"""
    assert str(report) == repr(report) == table
    assert len(report) == 3
    assert [entry.path for entry in report] == ["1", "2", "3.0"]
    assert [entry.path for entry in report.replaced] == ["1", "3.0"]
    assert report.skipped == (("2", "torch.nn.GELU", None, "fastact has no GELU"),)
    assert str(fastact.unpatch(model)).splitlines()[-1] == "2 of 2 activations restored"
    assert str(fastact.unpatch(model)) == "0 of 0 activations restored"
    assert str(fastact.patch(model[1])).splitlines()[1] == "(the model)  torch.nn.ReLU  fastact.ReLU"


def test_the_guide_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    guide = (Path(__file__).parent.parent / "docs" / "swapping.md").read_text()
    examples = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", guide, re.S)
    assert len(examples) == 2
    for code, text in examples:
        exec(compile(code, "swapping.md", "exec"), {})
        assert capsys.readouterr().out == text


# ---- Copies, pickles, and back -------------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def moved(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to("meta").to_empty(device=DEVICE).to(torch.float64)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, moved, lambda model: model])
def test_unpatch_knows_what_patch_did(copied: Callable[[nn.Module], nn.Module]) -> None:
    """In copies too; and what was ours before patch stays ours."""
    model = nn.Sequential(fastact.ReLU(), nn.ReLU(), nn.Sequential(nn.Sigmoid()), fastact.ScaledSigmoid(), SubclassOfOurs())
    fastact.patch(model)
    other = copied(model)
    report = fastact.unpatch(other)
    assert [(entry.path, entry.new, entry.reason) for entry in report] == [
        ("0", None, "not from patch()"),
        ("1", "torch.nn.ReLU", ""),
        ("2.0", "torch.nn.Sigmoid", ""),
        ("3", None, "not from patch()"),
        ("4", None, "not from patch()"),
    ]
    classes = [type(module) for module in (other[0], other[1], other[2][0], other[3], other[4])]
    assert classes == [fastact.ReLU, nn.ReLU, nn.Sigmoid, fastact.ScaledSigmoid, SubclassOfOurs]
    assert not any("_fastact_patched" in vars(module) for module in other.modules())
    if other is not model:
        assert type(model[1]) is fastact.ReLU
        assert len(fastact.unpatch(model).replaced) == 2


def test_patching_again_changes_nothing_more() -> None:
    model = shared()
    fastact.patch(model)
    again = fastact.patch(model)
    assert again.replaced == ()
    assert {entry.reason for entry in again} == {"fastact's already"}
    assert len(fastact.unpatch(model).replaced) == 4


def test_a_class_that_changed_since_is_left_alone() -> None:
    module = nn.ReLU()
    fastact.patch(module)
    module.__class__ = Subclass
    (entry,) = fastact.unpatch(module)
    assert entry == ("", f"{__name__}.Subclass", None, "it got another class since")
    assert type(module) is Subclass


@each_model
def test_patched_models_copy_save_and_load(model: Model, generator: torch.Generator) -> None:
    net = model.build(generator)
    x = torch.randn(model.shape, generator=generator, dtype=torch.float64)
    shown, state = repr(net), net.state_dict()
    fastact.patch(net)
    assert repr(net) == shown
    assert net.state_dict().keys() == state.keys()
    net.load_state_dict(state)
    expected = net(x)
    for other in (copy.deepcopy(net), through_pickle(net)):
        assert same(other(x), expected)
        assert len(kernels(lambda other=other: other(x))) == model.module_calls
    plain = model.make().double()
    plain.load_state_dict(net.state_dict())


# ---- Models that torch treats in a way of its own ------------------------------------------------------------------------


def test_the_fast_path_of_transformers_stays(generator: torch.Generator) -> None:
    """torch runs a whole layer as one op where the activation it was made with is a ReLU."""
    layer = nn.TransformerEncoderLayer(8, 2, 8, activation=nn.ReLU(), batch_first=True).eval()
    ran = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.__name__.partition(".")[0])
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 3, 8, generator=generator)
    assert [entry.path for entry in fastact.patch(layer).replaced] == ["activation"]
    with torch.no_grad(), Names():
        layer(x)
    assert ran == ["_transformer_encoder_layer_fwd"]
    assert kernels(lambda: layer.train()(x)) == ["relu"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo warns of C functions, and where it goes on after them
@pytest.mark.parametrize("way", ["torch.compile", "Module.compile"])
def test_compiled_models_can_be_swapped(way: str, x: Tensor) -> None:
    """Dynamo sees that the class changed: its guards fail, and what ran before the swap does not run after it."""
    backend = "eager"
    model = nn.Sequential(nn.Linear(7, 7), nn.Softmax(dim=1), nn.Sigmoid())
    eager = copy.deepcopy(model)
    if way == "torch.compile":
        model = torch.compile(model, backend=backend)
    else:
        model.compile(backend=backend)
    expected = model(x)
    assert len(fastact.patch(model).replaced) == 2
    fastact.patch(eager)
    with fastact.compiler.opaque("softmax", "sigmoid"):
        assert kernels(lambda: model(x)) == ["softmax", "sigmoid"]
        assert same(model(x), eager(x))
    fastact.unpatch(model)
    assert same(model(x), expected)


# ---- functional_patch: which calls ---------------------------------------------------------------------------------------


def spellings() -> list[tuple[str, str, bool]]:
    """(space, spelling, name of ours or "") of every activation function of torch, and whether it writes into x."""
    found = []
    for name in [*NAMES, "gelu", "selu", "celu"]:
        for space, holder in SPACES.items():
            for spelled in (name, name + "_"):
                if hasattr(holder, spelled):
                    known = name in NAMES and (
                        spelled == name or "inplace" in inspect.signature(getattr(fastact, name)).parameters
                    )
                    found.append((space, spelled, name if known else ""))
    return [*found, ("special", "expit", "sigmoid")]


@pytest.mark.parametrize(("space", "spelled", "name"), spellings(), ids=lambda value: value or "torch's")
@pytest.mark.parametrize("style", ["positional", "keywords"])
def test_every_spelling(space: str, spelled: str, name: str, style: str, x: Tensor) -> None:
    function = getattr(SPACES[space], spelled)
    given = arguments(name) if name else {}

    def call(x: Tensor) -> Tensor:
        if style == "keywords" and space != "Tensor":
            return function(input=x, **given)
        if style == "keywords":
            return function(x, **given)
        return function(x, *given.values())

    expected = call(x.clone())
    received = x.clone()
    with fastact.functional_patch(), Watch() as watch:
        y = call(received)
    assert (y is received) == spelled.endswith("_")
    row = f"result_{name}" if y is received and f"result_{name}" in _registry.variants else name
    assert watch.seen == ([row + "_" * (y is received)] if name else [])
    assert same(y, getattr(fastact, name)(x, **given) if name else expected)
    # Both round to within some ULP of the same value.
    torch.testing.assert_close(y, expected)


def test_the_spellings_are_many() -> None:
    """Guards the table above: it follows torch's namespaces, and would be empty if they did."""
    found = {f"{space}.{spelled}" for space, spelled, name in spellings() if name}
    assert found >= {"F.relu", "F.relu_", "torch.relu", "torch.relu_", "Tensor.relu", "Tensor.relu_", "F.leaky_relu_"}
    assert found >= {"F.sigmoid", "torch.sigmoid", "Tensor.sigmoid", "special.expit", "F.softmax", "special.softmax"}
    assert not found & {"torch.sigmoid_", "Tensor.tanh_"}


@each_twin
def test_torch_modules_are_caught(twin: type[nn.Module], x: Tensor) -> None:
    module = made(twin)
    with fastact.functional_patch(), Watch() as watch:
        y = module(x)
    assert len(watch.seen) == 1
    assert same(y, made(ours(twin))(x))


CALLS: list[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
    (lambda x: F.relu(x, True), lambda x: fastact.relu(x, True)),
    (lambda x: F.leaky_relu(x, 0.3), lambda x: fastact.leaky_relu(x, 0.3)),
    (lambda x: F.leaky_relu(x, negative_slope=-0.3), lambda x: fastact.leaky_relu(x, -0.3)),
    (lambda x: F.leaky_relu(x, 0.3, inplace=True), lambda x: fastact.leaky_relu(x, 0.3, True)),
    (lambda x: F.leaky_relu_(x, 0.3), lambda x: fastact.leaky_relu(x, 0.3, True)),
    (lambda x: F.leaky_relu_(x, negative_slope=0.3), lambda x: fastact.leaky_relu(x, 0.3, True)),
    (lambda x: F.elu(x, 0.5), lambda x: fastact.elu(x, 0.5)),
    (lambda x: F.elu_(x, alpha=0.5), lambda x: fastact.elu(x, 0.5, True)),
    (lambda x: F.softmax(x, 0, dtype=torch.float64), lambda x: fastact.softmax(x, 0, torch.float64)),
    (lambda x: torch.softmax(x, dim=0, dtype=torch.float64), lambda x: fastact.softmax(x, 0, torch.float64)),
    (lambda x: x.softmax(0, torch.float64), lambda x: fastact.softmax(x, 0, torch.float64)),
    (lambda x: F.relu(nn.Parameter(x)), fastact.relu),
]


@pytest.mark.parametrize(("call", "expected"), CALLS)
def test_arguments_arrive(call: Callable[[Tensor], Tensor], expected: Callable[[Tensor], Tensor], x: Tensor) -> None:
    received = x.clone()
    with fastact.functional_patch(), Watch() as watch:
        y = call(received)
    assert len(watch.seen) == 1
    other = x.clone()
    assert same(y, expected(other))
    assert same(received, other)


class Labelled(Tensor):
    """A subclass that asks which function it is given to."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.relu:
            return "F.relu"
        return super().__torch_function__(func, types, args, kwargs)


ZEROS = torch.zeros(21, 7)
NOT_OURS: list[Callable[[Tensor], Any]] = [
    lambda x: torch.sigmoid(x, out=torch.empty_like(x)),
    lambda x: torch.tanh(x, out=torch.empty_like(x)),
    lambda x: F.elu_(x, 1.5, 2.0),
    lambda x: F.elu_(x, 1.5, 2.0, 0.5),
    lambda x: F.elu_(x, scale=2.0),
    lambda x: F.relu(x.as_subclass(Labelled)),
    lambda x: torch.tanh(x.as_subclass(Labelled)).as_subclass(Tensor),
    lambda x: torch.sigmoid(x.to(torch.int64)),
    lambda x: torch.tanh(x.to(torch.complex64)),
    lambda x: F.softmin(x, 1),
    lambda x: F.cross_entropy(x, torch.arange(6)),
    lambda x: F.multi_head_attention_forward(x, x, x, 7, 1, ZEROS, None, None, None, False, 0, ZEROS[:7], None)[1],
    lambda x: torch.exp(x),
    lambda x: x.shape,
]


@pytest.mark.parametrize("call", NOT_OURS)
def test_what_ours_cannot_serve_is_torchs(call: Callable[[Tensor], Any], x: Tensor) -> None:
    expected = call(x.clone())
    with fastact.functional_patch(), Watch() as watch:
        y = call(x.clone())
    assert watch.seen == []
    assert same(y, expected) if isinstance(expected, Tensor) else y == expected


WRONG: list[Callable[[Tensor], Any]] = [
    lambda x: torch.relu(x, True),
    lambda x: torch.relu(x, inplace=True),
    lambda x: torch.sigmoid(),
    lambda x: torch.sigmoid(1.0),
    lambda x: F.relu(1.0),
    lambda x: F.softmax(x, 2),
    lambda x: torch.softmax(x, -3),
    lambda x: F.softmax(x, "a"),
    lambda x: F.leaky_relu(x, "a"),
    lambda x: F.leaky_relu(x, negative_slope=0.1, slope=2),
    lambda x: F.leaky_relu_(x, 0.1, True, 3),
]


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_raise_as_they_do_outside(call: Callable[[Tensor], Any], x: Tensor) -> None:
    with pytest.raises(Exception) as outside:  # noqa: PT011 (which type is what is compared)
        call(x)
    with fastact.functional_patch(), pytest.raises(outside.type):
        call(x)


def test_implicit_dims_warn_as_they_do_outside(x: Tensor) -> None:
    with pytest.warns(UserWarning, match="Implicit dimension choice for softmax") as outside:
        F.softmax(x)
    with fastact.functional_patch(), pytest.warns(UserWarning, match="Implicit dimension choice for softmax") as inside:
        y = F.softmax(x)
    assert len(inside) == len(outside) == 1
    assert same(y, fastact.softmax(x, 1))


# ---- functional_patch: as a context ----------------------------------------------------------------------------------------


def caught(x: Tensor) -> bool:
    return kernels(lambda: torch.sigmoid(x)) == ["sigmoid"]


def test_nested_again_and_over_a_function(x: Tensor) -> None:
    mode = fastact.functional_patch()
    for _ in range(2):
        with mode:
            assert caught(x)
            with mode, fastact.functional_patch():
                assert caught(x)
            assert caught(x)
        assert not caught(x)

    @fastact.functional_patch()
    def decorated(depth: int) -> bool:
        """Calls itself."""
        return caught(x) and (depth == 0 or decorated(depth - 1)) and caught(x)

    assert decorated(2)
    assert decorated(2)
    assert (decorated.__name__, decorated.__doc__) == ("decorated", "Calls itself.")
    assert not caught(x)


def test_exceptions_end_it(x: Tensor) -> None:
    with pytest.raises(IndexError), fastact.functional_patch():
        torch.softmax(x, 5)
    assert not caught(x)
    with fastact.functional_patch():
        with pytest.raises(IndexError):
            torch.softmax(x, 5)
        assert caught(x)


def test_other_threads_see_torchs(x: Tensor) -> None:
    mode = fastact.functional_patch()
    found: list[bool] = []
    inside, leave = threading.Event(), threading.Event()

    def without() -> None:
        found.append(caught(x))

    def within() -> None:
        with mode:
            inside.set()
            leave.wait()
            found.append(caught(x))

    with mode:
        thread = threading.Thread(target=without)
        thread.start()
        thread.join()
        assert found == [False]
        assert caught(x)
    thread = threading.Thread(target=within)
    thread.start()
    inside.wait()
    assert not caught(x)
    leave.set()
    thread.join()
    assert found == [False, True]


def test_other_modes_see_what_is_called(x: Tensor) -> None:
    """A mode entered later sees torch's call before us; one entered earlier sees ours, as any call from a mode's handler."""

    class See(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    with fastact.functional_patch(), See():
        assert kernels(lambda: torch.tanh(x)) == ["tanh"]
    assert torch.tanh in seen
    assert fastact.tanh not in seen
    seen.clear()
    with See(), fastact.functional_patch():
        assert kernels(lambda: torch.tanh(x)) == ["tanh"]
    assert torch.tanh not in seen
    assert fastact.tanh in seen
    with torch.device("meta"), fastact.functional_patch():
        assert torch.relu(torch.ones(2)).is_meta


def test_over_a_function_that_runs_later() -> None:
    """It would be over when the body begins."""

    def generator() -> Any:
        yield torch.tanh(torch.ones(1))

    async def coroutine() -> Any:
        return torch.tanh(torch.ones(1))

    async def both() -> Any:
        yield torch.tanh(torch.ones(1))

    for function in (generator, coroutine, both):
        with pytest.raises(TypeError, match=f"functional_patch.*{function.__name__}"):
            fastact.functional_patch()(function)


@pytest.mark.parametrize("name", sorted({*NAMES} - {name for name in NAMES if hasattr(F, name)}))
def test_ours_alone_are_no_functions_of_torch(name: str) -> None:
    assert not hasattr(torch, name), "there would be a call to catch"


@each_caught
def test_transforms_are_as_outside(name: str, x: Tensor) -> None:
    """Ours are called in transforms too, and give what torch's give."""
    given = {k: 0 if k == "dim" else v for k, v in arguments(name).items()}

    def f(x: Tensor) -> Tensor:
        return getattr(F, name)(x, **given)

    def results() -> list[Tensor]:
        return [
            torch.func.vmap(f)(x),
            torch.func.grad(lambda x: (f(x) * x).sum())(x),
            torch.func.vmap(torch.func.grad(lambda x: (f(x) * x).sum()))(x),
            torch.func.jacrev(f)(x[0]),
            torch.func.jacfwd(f)(x[0]),
            *torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        ]

    expected = results()
    with fastact.functional_patch():
        for a, b in zip(results(), expected, strict=True):
            # Each side has a few ULP of its own in every factor, and no more than seven terms in a sum.
            torch.testing.assert_close(a, b, rtol=2.0**-18, atol=2.0**-20)
        assert kernels(lambda: f(x)) == [name]
        if name != "prelu":  # one sample has no channels for the kernel to go by
            assert kernels(lambda: torch.func.vmap(f)(x)) == [name]


def test_autocast_inside(x: Tensor) -> None:
    linear = nn.Linear(7, 7)
    for _ in range(2):
        with torch.autocast(x.device.type, torch.bfloat16):
            expected = torch.relu(linear(x))
            with fastact.functional_patch():
                assert kernels(lambda: torch.relu(linear(x))) == ["relu"]
                assert same(torch.relu(linear(x)), expected)


@each_caught
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backward", ["inside", "outside"])
def test_checkpoints_inside(name: str, use_reentrant: bool, backward: str, x: Tensor) -> None:
    """Backward recomputes the forward outside of any mode, and torch's functions do not save what ours do: the gradients are
    right all the same."""
    function = getattr(F, name)
    given = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments(name).items()}
    x = x.double().requires_grad_()

    def f(x: Tensor) -> Tensor:
        return (function(x - 1, **given) ** 2).sum()

    (expected,) = torch.autograd.grad(f(x), x)
    with fastact.functional_patch():
        loss = checkpoint(f, x, use_reentrant=use_reentrant)
        if backward == "inside":
            loss.backward()
    if backward == "outside":
        loss.backward()
    torch.testing.assert_close(x.grad, expected, **CLOSE)


def test_saved_tensor_hooks_get_what_torch_saves(x: Tensor) -> None:
    with fastact.functional_patch():
        with torch.autograd.graph.save_on_cpu():
            assert not caught(x)
        assert caught(x)


# ---- functional_patch and torch.compile ----------------------------------------------------------------------------------


def activations_of(x: Tensor) -> Tensor:
    return F.softmax(torch.sigmoid(x) + F.elu(x, inplace=False), dim=1)


def with_block(x: Tensor) -> Tensor:
    with fastact.functional_patch():
        return activations_of(x)


@pytest.mark.parametrize("where", ["around the call", "in the function"])
def test_compiled_code_keeps_torchs(where: str, x: Tensor) -> None:
    """In one graph, so that Inductor can fuse it."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        return aot_autograd(fw_compiler=lambda g, _: (ops.extend(n.target for n in g.graph.nodes), make_boxed_func(g))[1])(
            graph, inputs
        )

    ops: list[Any] = []
    expected = activations_of(x)
    if where == "around the call":
        compiled = torch.compile(activations_of, backend=backend, fullgraph=True)
        with fastact.functional_patch():
            y = compiled(x)
            assert caught(x)
    else:
        y = torch.compile(with_block, backend=backend, fullgraph=True)(x)
    assert len(graphs) == 1
    assert not [op for op in ops if getattr(op, "namespace", "") == "fastact"]
    assert torch.ops.aten.sigmoid.default in ops
    assert same(y, expected)
