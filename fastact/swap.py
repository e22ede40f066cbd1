"""Swapping in whole models: `patch` turns a model's activation modules into ours, `unpatch` turns them back, and inside
`functional_patch` calls of torch's activation functions come to ours. docs/swapping.md is their guide.

Nothing here names an activation but where torch has a second name for one: what can be swapped follows from the public names.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torch.overrides import TorchFunctionMode

from fastact import functional, modules

__all__ = ["Entry", "Report", "functional_patch", "patch", "unpatch"]

# ---- What is what --------------------------------------------------------------------------------------------------------

# Ours by torch's: a class of ours whose base is torch's of the same name.
_TWINS: dict[type[nn.Module], type[nn.Module]] = {
    torchs: ours for ours in modules.classes if (torchs := getattr(nn, ours.__name__, None)) in ours.__bases__
}
_TORCHS = {ours: torchs for torchs, ours in _TWINS.items()}

# Torch's other activations, which a report names because they are left. Attention stands among them in torch.
_OTHERS = {getattr(nn, name) for name in nn.modules.activation.__all__} - {*_TWINS, nn.MultiheadAttention}

# Set by patch in what it swaps, for unpatch: a module of ours without it was put there by somebody else. It lies in the module
# because it has to survive copies and pickles.
_MARK = "_fastact_patched"


class _Function(NamedTuple):
    """What a function of torch becomes inside `functional_patch`."""

    name: str
    ours: Callable[..., Tensor]
    arguments: tuple[str, ...]  # those that mean the same to both, in order
    fixed: dict[str, bool]  # what torch's function says by its name


# Where torch keeps its functions, and second names they have there.
_SPACES: dict[str, Any] = {
    "torch.nn.functional": F,
    "torch": torch,
    "torch.Tensor": Tensor,
    "torch.special": torch.special,
}
_ALIASES = {"sigmoid": ("expit",), "log_sigmoid": ("logsigmoid",)}


def _functions() -> dict[Any, _Function]:
    found: dict[Any, _Function] = {}
    for name in functional.__all__:
        ours = getattr(functional, name)
        arguments = tuple(inspect.signature(ours).parameters)
        variants: list[tuple[str, tuple[str, ...], dict[str, bool]]] = [
            (spelled, arguments, {}) for spelled in (name, *_ALIASES.get(name, ()))
        ]
        if "inplace" in arguments:
            variants.append((name + "_", tuple(a for a in arguments if a != "inplace"), {"inplace": True}))
        for spelled, shared, fixed in variants:
            for space, holder in _SPACES.items():
                if hasattr(holder, spelled):
                    found[getattr(holder, spelled)] = _Function(f"{space}.{spelled}", ours, shared, fixed)
    return found


_FUNCTIONS = _functions()


def _name(cls: type[nn.Module]) -> str:
    """Where users find a class."""
    if cls in modules.classes:
        return f"fastact.{cls.__name__}"
    if getattr(nn, cls.__name__, None) is cls:
        return f"torch.nn.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


# ---- The report ----------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """An activation of a model: one line of a report.

    - `path`: as in `named_modules()`; "" for the model itself
    - `old`: name of its class before; of the function, where it is one
    - `new`: name of its class after, None where it was left alone
    - `reason`: why it was left alone, else ""
    """

    path: str
    old: str
    new: str | None
    reason: str


@dataclass(frozen=True, repr=False)
class Report:
    """What `patch` or `unpatch` did: printed as a table, and iterable, an `Entry` each in the order of `named_modules()`.

    A module that a model holds in several places has an entry for each.
    """

    entries: tuple[Entry, ...]
    verb: str = "replaced"

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """The entries of what got another class."""
        return tuple(entry for entry in self.entries if entry.new is not None)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """The entries of what was left alone."""
        return tuple(entry for entry in self.entries if entry.new is None)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __repr__(self) -> str:
        table = [(e.path or "(the model)", e.old, e.new or f"kept: {e.reason}") for e in self.entries]
        lines = []
        if table:
            table.insert(0, ("path", "old", "new"))
            width = [max(len(row[column]) for row in table) for column in (0, 1)]
            lines = [f"{path:<{width[0]}}  {old:<{width[1]}}  {new}" for path, old, new in table]
        return "\n".join([*lines, f"{len(self.replaced)} of {len(self)} activations {self.verb}"])


# ---- Modules -------------------------------------------------------------------------------------------------------------


class _Plan:
    """What is to become of each activation of a model. Nothing has changed before `carry_out`."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"argument 'model' must be torch.nn.Module, not {type(model).__name__}")
        self.places: list[tuple[str, nn.Module]] = list(model.named_modules(remove_duplicate=False))
        self.swaps: dict[nn.Module, type[nn.Module]] = {}
        self.entries: list[Entry] = []

    def swap(self, path: str, module: nn.Module, new: type[nn.Module]) -> None:
        self.swaps[module] = new
        self.entries.append(Entry(path, _name(type_before_parametrizations(module)), _name(new), ""))

    def keep(self, path: str, old: str, reason: str) -> None:
        self.entries.append(Entry(path, old, None, reason))

    def carry_out(self, *, mark: bool) -> None:
        for module, new in self.swaps.items():
            if is_parametrized(module):
                # Torch made a class for it, on top of its own; it gets the same on top of the new one.
                made = type(module)
                new = type(made.__name__, (new,), dict(vars(made)))
            module.__class__ = new
            if mark:
                vars(module)[_MARK] = True
            else:
                del vars(module)[_MARK]


def _why_not(module: nn.Module) -> str | None:
    """Why an activation module cannot be swapped; "" if it can, None if it is no activation."""
    if isinstance(module, torch.jit.ScriptModule):
        named = getattr(nn, module.original_name, None)
        return "scripted or traced" if named in _TWINS else None
    cls = type_before_parametrizations(module)
    if cls in modules.classes:
        return "fastact's already"
    if cls in _OTHERS:
        return f"fastact has no {cls.__name__}"
    if cls not in _TWINS:
        base = next((base for base in cls.__mro__ if base in _TWINS or base in modules.classes), None)
        return f"a subclass of {_name(base)}" if base else None
    if "forward" in vars(module):
        return "this object has a forward of its own"
    return ""


def patch(model: nn.Module, filter_fn: Callable[[str, nn.Module], bool] | None = None, dry_run: bool = False) -> Report:
    """Turns the activation modules of `model` into fastact's, in place, and reports what it did.

    A module whose class is exactly that of a twin, such as `torch.nn.Sigmoid`, gets fastact's class of the same name. It stays
    the same object, with its parameters, hooks, attributes, parametrizations and places in the model. Everything else is left
    alone: subclasses, scripted modules, objects whose `forward` was replaced; and functions: see `functional_patch`.

    - `model`: any module, which may be an activation itself
    - `filter_fn`: called as `filter_fn(name, module)` for each module that could be swapped, with its name in
      `named_modules()`; what it is false for stays. A module with several names stays if it is false for one of them.
    - `dry_run`: change nothing, only report what would be done

    Raises `TypeError` for arguments that are something else. If `filter_fn` raises, nothing has been changed.
    """
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"argument 'filter_fn' must be callable or None, not {type(filter_fn).__name__}")
    plan = _Plan(model)
    able = {module: _why_not(module) for _, module in plan.places}
    refused: dict[nn.Module, str] = {}  # by which name
    chosen = []
    for path, module in plan.places:
        chosen.append(able[module] != "" or filter_fn is None or bool(filter_fn(path, module)))
        if not chosen[-1]:
            refused.setdefault(module, path)
    for (path, module), wanted in zip(plan.places, chosen, strict=True):
        reason = able[module]
        if not wanted:
            reason = "filter_fn"
        elif module in refused:
            reason = f"the same module as {refused[module]}, which filter_fn keeps"
        cls = type_before_parametrizations(module)
        if reason == "":
            plan.swap(path, module, _TWINS[cls])
        elif reason is not None:
            scripted = isinstance(module, torch.jit.ScriptModule)
            plan.keep(path, f"torch.nn.{module.original_name}" if scripted else _name(cls), reason)
        for attribute, value in vars(module).items():
            if (
                isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodDescriptorType)
                and value in _FUNCTIONS
            ):
                where = f"{path}.{attribute}" if path else attribute
                plan.keep(where, _FUNCTIONS[value].name, "a function: functional_patch() is for those")
    if dry_run:
        return Report(tuple(plan.entries), "would be replaced")
    plan.carry_out(mark=True)
    return Report(tuple(plan.entries))


def unpatch(model: nn.Module) -> Report:
    """Turns the modules of `model` that `patch` swapped into torch's again, in place, and reports what it did.

    It knows them in copies and pickles of the model too. Modules that were fastact's before `patch` stay as they are.
    Raises `TypeError` if `model` is no module.
    """
    plan = _Plan(model)
    for path, module in plan.places:
        cls = type_before_parametrizations(module)
        if _MARK in vars(module) and cls in _TORCHS:
            plan.swap(path, module, _TORCHS[cls])
        elif _MARK in vars(module):
            plan.keep(path, _name(cls), "it got another class since")
        elif isinstance(module, modules.classes):
            plan.keep(path, _name(cls), "not from patch()")
    plan.carry_out(mark=False)
    return Report(tuple(plan.entries), "restored")


# ---- Functions -----------------------------------------------------------------------------------------------------------


class functional_patch(ContextDecorator, TorchFunctionMode):
    """Inside `with fastact.functional_patch():`, calls of torch's activation functions come to fastact's.

    That holds for `F.relu(x)`, `torch.relu(x)`, `x.relu()` and, where fastact has an `inplace`, `torch.relu_(x)` and so on, for
    each function in `fastact.functional`; so also for `torch.nn` modules. It holds for this thread, and can be nested, used
    again, and put over a function: `@fastact.functional_patch()`.

    Torch's own function is taken for arguments that fastact's does not know (`out=`), for subclasses of `Tensor`, in what a
    function of torch does inside, in code that `torch.compile` compiles, and where hooks for saved tensors are active, as in
    `torch.utils.checkpoint`. Raises `TypeError` over a generator or a coroutine, whose body runs after the call.
    """

    def __call__(self, function: Any) -> Any:
        if (
            inspect.isgeneratorfunction(function)
            or inspect.iscoroutinefunction(function)
            or inspect.isasyncgenfunction(function)
        ):
            raise TypeError(
                f"functional_patch(): the body of {function.__name__} runs after it was called: put the `with` into it"
            )
        return super().__call__(function)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            # What Inductor can fuse is better left to it.
            return func(*args, **kwargs)
        known = _FUNCTIONS.get(func)
        if known is None or _elsewhere():
            return func(*args, **kwargs)
        given = dict(kwargs)
        given.pop("_stacklevel", None)  # F.softmax's, for a warning
        x, *rest = args or (given.pop("input", None),)
        # A subclass may care which function it is that it gets.
        if type(x) not in (Tensor, nn.Parameter) or len(rest) >= len(known.arguments) or not given.keys() <= {*known.arguments}:
            return func(*args, **kwargs)
        # A name for a dim: torch before 2.13 has tensors with such.
        if any(isinstance(value, str) for value in (*rest, *given.values())):
            return func(*args, **kwargs)
        return known.ours(x, *rest, **given, **known.fixed)


def _elsewhere() -> bool:
    """Whether what runs now will be finished by something that has to find torch's functions."""
    # torch.utils.checkpoint runs the forward again, outside of any mode, and takes what is saved then for what was saved at
    # first. Torch's functions do not save what ours do: an ELU's input, say, would be taken for its output.
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
