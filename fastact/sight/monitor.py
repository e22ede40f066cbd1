"""`fastact.monitor`: counts made by the kernels while a model runs, without a synchronisation in the step.

The kernels of fastact's activations look at their own results (csrc/torch/watch.h), and our modules say which of them is at
work; what other activation modules compute is looked at by the same kernels, called from hooks. The counters of all layers lie
together on each device, and go to the host once a step, asynchronously. docs/sight.md says what they mean.
"""

from __future__ import annotations

import functools
import math
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastact import _C, _registry, modules
from fastact.sight.history import BINS, History, Layer, Rows, Side, Units
from fastact.sight.report import Report

PENDING = 64  # steps whose counters may wait on the host, as they came, before they are taken in
_BY_RANK = -(2**63)

_TORCHS = tuple({getattr(nn, name) for name in nn.modules.activation.__all__} - {nn.MultiheadAttention})
# Outputs from which on those are saturated that have no row, on both sides: where the derivative is 0, or (1 - |y|)^2 is below
# the share that saturates all others.
_LEVELS: dict[type[nn.Module], Callable[[Any], tuple[float, float]]] = {
    nn.Hardtanh: lambda module: (module.min_val, module.max_val),
    nn.ReLU6: lambda module: (module.min_val, module.max_val),
    nn.Softsign: lambda module: (math.sqrt(_C.SATURATED) - 1, 1 - math.sqrt(_C.SATURATED)),
}
# Made of several operators of autograd, of which the last one's gradient is not that of the input.
_COMPOSED = (nn.Softsign, nn.Tanhshrink)
# Modules after which the second dim is that of the channels, whatever the rank.
_CHANNELS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

# What the ledger of a layer consists of: csrc/kernels.h.
_TALLY = ("count", "zeros", "low", "high", "nan", "infinite", "largest", "smallest", "total", "squares")
_WHOLE = len(_TALLY) - 2  # of them unsigned integers, the rest float64
_WORDS = 3 * len(_TALLY) + 4


def monitor(
    model: nn.Module,
    every: int = 1,
    *,
    sample: int | Literal["auto"] | None = "auto",
    unit_dim: int | Mapping[str, int] | None = None,
    loss: str | nn.Module | None = None,
) -> Watch:
    """Watches the activations of a model at work: `with fastact.monitor(model) as watch:` around a training loop, then
    `print(watch.report())`; or `watch = fastact.monitor(model)` and at the end `watch.close()`.

    A step ends with the `step()` of an optimizer that holds parameters of the model (while none has been seen, where the model
    is called after a backward pass, and parameters have changed or gradients are gone); in evaluation mode with every call; and
    with `watch.step()`. One of `every` steps is recorded. Of a tensor with more than `sample` elements about so many are looked
    at, in runs of 64 neighbours spread evenly over it, other ones at every call. `"auto"` is a 512th of them, but at least 256
    and at most 2,048, and half as many of gradients with more than 256. With `sample=None` all are looked at, and all counts
    are exact.

    Units, of which the dead ones are counted, lie along `unit_dim`: an int for all activations, or one by path; by default the
    second dim behind convolutions and normalisations over channels and of tensors with more than three dims, else the last.
    `loss`: the loss module, or its class name, which some verdicts depend on.

    Neither outputs nor gradients are changed, and nothing of the model is but its hooks, which `close()` removes. Raises
    `TypeError` where `model` is no module or a number no int, `ValueError` for numbers below 1 and for a path in `unit_dim`
    that the model does not have.
    """
    return Watch(model, every, sample, unit_dim, loss)


class _Place(NamedTuple):
    """Where in a model an activation can be called."""

    path: str
    shared: list[str]  # other paths of the same module
    activation: bool  # whether the module is one; else functions are called in it
    ours: bool
    compiled: bool  # whether it or one that it is part of was given to torch.compile


def _ignored(*_: Any) -> None:
    """What a monitor's hook is in a copy of the model, and in a file."""


def _no_hook() -> Callable[..., None]:
    return _ignored


class _Hook:
    """Holds a monitor weakly; copies and pickles as nothing."""

    def __init__(self, watch: Watch, call: Callable[..., None], *arguments: Any) -> None:
        self._watch, self._call, self._arguments = weakref.ref(watch), call, arguments

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if torch.compiler.is_compiling():
            return
        watch = self._watch()
        if watch is not None and watch._history is None:  # which another hook may have closed
            self._call(watch, module, output, *self._arguments)

    def __reduce__(self) -> Any:
        return _no_hook, ()


# Called with every forward, so that they do no more in Python than they must.
_compiling = torch.compiler.is_dynamo_compiling


class _Enter(_Hook):
    """Calls on where it is not entered, since a step in the other mode has to end first."""

    def __init__(self, enter: Callable[[bool], bool], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._enter = enter

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if not _compiling() and not self._enter(module.training):
            super().__call__(module, args, output)


class _Leave(_Hook):
    """Calls on where the output is still to be looked at."""

    def __init__(self, leave: Callable[[], bool], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._leave = leave

    def __call__(self, module: nn.Module, args: Any, output: Any = None) -> None:
        if not _compiling() and self._leave():
            super().__call__(module, args, output)


# Modules of ours need no hooks, with which torch takes a longer way to every forward: while a monitor is open, the forward of
# their classes announces which module is at work.


def _announcing(forward: Callable[..., Tensor], at_work: Callable[..., Tensor] = _C.at_work) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def announced(self: nn.Module, input: Tensor) -> Tensor:
        return at_work(forward, self, input)

    return announced


class _Announcing:
    """Held by a monitor that is open; it forgets its modules when it is removed."""

    plain: ClassVar = {cls: vars(cls)["forward"] for cls in modules.classes}
    announcing: ClassVar = {cls: _announcing(forward) for cls, forward in plain.items()}
    held: ClassVar = 0
    lock: ClassVar = threading.RLock()  # which the end of a forgotten monitor may come into

    def __init__(self, core: Any) -> None:
        self._core = core
        self._hold(1)

    def remove(self) -> None:
        self._core.forget()
        self._hold(-1)

    @classmethod
    def _hold(cls, more: int) -> None:
        with cls.lock:
            cls.held += more
            before, after = (cls.plain, cls.announcing) if cls.held else (cls.announcing, cls.plain)
            for owner, forward in after.items():
                if vars(owner)["forward"] is before[owner]:
                    owner.forward = forward


def _announces(module: nn.Module) -> bool:
    """Whether calls end in a forward of ours, rather than in one that a subclass or an object has instead."""
    forward = type(module).forward
    return "forward" not in vars(module) and any(vars(cls)["forward"] is forward for cls in modules.classes)


class Watch:
    """What `fastact.monitor` returns. At the end of a `with` block it is closed."""

    def __init__(
        self,
        model: nn.Module,
        every: int,
        sample: int | Literal["auto"] | None,
        unit_dim: int | Mapping[str, int] | None,
        loss: str | nn.Module | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"monitor(): argument 'model' must be a torch.nn.Module, not {type(model).__name__}")
        for name, number in (("every", every), ("sample", 1 if sample in ("auto", None) else sample)):
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"monitor(): argument '{name}' must be int, not {type(number).__name__}")
            if number < 1:
                raise ValueError(f"monitor(): {name} must be positive, but is {number}")
        self.every, self.sample = every, sample
        self._loss = type(loss).__name__ if isinstance(loss, nn.Module) else loss
        self._distributed = _distributed(model)
        compiled = {part for m in model.modules() if _compiled(m) for part in m.modules()}
        model = _unwrapped(model)
        self._model = weakref.ref(model)
        self._parameters = [weakref.ref(p) for p in model.parameters()]
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # of the model, that have made a step
        self._core: Any = _C.Monitor(_C.AUTO if sample == "auto" else _C.ALL if sample is None else sample)
        self._places: list[_Place] = []
        self._handles: list[Any] = []
        self._done: list[_Step] = []
        self._pending: list[_Copies] = []
        self._step = 0
        self._core.training = model.training
        self._versions = 0  # of the parameters, when the step began
        self._gradients = 0  # how many the kernels had looked at when the step began
        self._owed: int | None = None  # the step of training that gradients are of which come after an evaluation
        self._maker: int | None = None  # which layer the model's output comes from; -1: none
        self._history: History | None = None
        self._hook(model, unit_dim, compiled)  # which may raise
        self._core.start()

    # ---- Hooks -----------------------------------------------------------------------------------------------------------

    def _hook(self, model: nn.Module, unit_dim: int | Mapping[str, int] | None, compiled: set[nn.Module]) -> None:
        paths: dict[nn.Module, list[str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            paths.setdefault(module, []).append(path)
        if isinstance(unit_dim, Mapping) and (wrong := set(unit_dim) - {p for names in paths.values() for p in names}):
            raise ValueError(f"monitor(): unit_dim names no module of the model: {sorted(wrong)}")
        self._handles.append(_Announcing(self._core))
        self._handles.append(model.register_forward_pre_hook(_Hook(self, Watch._called)))
        # After the hooks of the model's own activations, should it be one itself.
        returned = _Hook(self, Watch._returned)
        before: nn.Module | None = None
        for module, (path, *shared) in paths.items():
            ours, torchs = isinstance(module, modules.classes), isinstance(module, _TORCHS)
            leaf = next(module.children(), None) is None
            if ours or torchs or not type(module).__module__.startswith("torch."):
                self._places.append(_Place(path, shared, ours or torchs, ours, module in compiled))
                dim = 1 if isinstance(before, _CHANNELS) else _BY_RANK
                if unit_dim is not None:
                    dim = unit_dim.get(path, dim) if isinstance(unit_dim, Mapping) else unit_dim
                self._add(module, self._core.add_scope(dim), ours or torchs)
            if leaf:
                before = module

        self._handles.append(model.register_forward_hook(returned, always_call=True))

        mine = weakref.ref(self)

        def stepped(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            watch = mine()
            if watch is not None:
                watch._optimizer_stepped(optimizer)

        self._handles.append(register_optimizer_step_post_hook(stepped))

    def _add(self, module: nn.Module, scope: int, activation: bool) -> None:
        """Tells the kernels when the module is at work."""
        if _announces(module):
            switched, left = _Hook(self, Watch._switched, scope), _Hook(self, Watch._look_at_output, scope)
            self._core.announce(scope, activation, module, switched, left)
        else:
            enter, leave = self._core.hooks(scope, activation)
            self._handles.append(module.register_forward_pre_hook(_Enter(enter, self, Watch._switched, scope)))
            hook = _Leave(leave, self, Watch._look_at_output, scope)
            self._handles.append(module.register_forward_hook(hook, always_call=True))

    def _called(self, module: nn.Module, output: Any) -> None:
        if _in_backward():
            self._core.calls += 1
            return
        if self._core.running and (not module.training or not self._core.training or self._trained()):
            trained = self._step if self._core.training and self._core.recording else self._owed
            self.step()
            # An evaluation that has no gradients of its own may come between a forward of training and its backward.
            self._owe(None if module.training or torch.is_grad_enabled() else trained)
        self._core.calls += 1
        if not self._core.running:
            self._versions = self._versions_now()
        self._core.training, self._core.running = module.training, True

    def _owe(self, step: int | None) -> None:
        self._owed, self._core.owing = step, step is not None

    def _switched(self, module: nn.Module, output: Any, scope: int) -> None:
        if _in_backward():
            self._core.enter(scope, False)
        else:
            self.step()
            self._core.enter(scope, module.training)

    def _trained(self) -> bool:
        """Whether what comes is a new step, where no optimizer says so: after a backward, parameters have been changed or new
        gradients are prepared."""
        if self._optimizers or self._core.gradients == self._gradients:
            return False
        return self._versions_now() != self._versions or all(p.grad is None for p in self._alive())

    def _alive(self) -> Iterator[nn.Parameter]:
        return (p for reference in self._parameters if (p := reference()) is not None)

    def _versions_now(self) -> int:
        """A number that grows with every change of a parameter in place."""
        return sum(p._version for p in self._alive() if not is_lazy(p) and not p.is_inference())

    def _returned(self, module: nn.Module, output: Any) -> None:
        self._core.calls = max(self._core.calls - 1, 0)
        if not self._core.recording:
            return
        makers = [self._core.maker_of(y) for y in _tensors(output)]
        if makers:
            self._maker = max(makers)

    def _look_at_output(self, module: nn.Module, output: Any, scope: int) -> None:
        if type(output) not in (Tensor, nn.Parameter) or output.is_nested:
            return
        name, parameters, dim = _kind(module, output)
        layer = self._core.output(scope, name, parameters, dim, _levels(module, output.dtype), output.detach())
        if layer is None or output.grad_fn is None:
            return

        def passed(gradients_out: tuple[Tensor | None, ...], gradients_in: tuple[Tensor | None, ...]) -> None:
            for side, gradients in ((1, gradients_in), (2, () if isinstance(module, _COMPOSED) else gradients_out)):
                if gradients and gradients[0] is not None:
                    layer.look(side, gradients[0].detach())

        output.grad_fn.register_hook(passed)

    def _optimizer_stepped(self, optimizer: torch.optim.Optimizer) -> None:
        model = self._model()
        if not self._core.running or model is None:
            return
        if optimizer not in self._optimizers:
            # Which may have been given other parameters since the last look.
            own = {id(p): p for p in model.parameters()}
            if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
                return
            self._parameters = [weakref.ref(p) for p in own.values()]
            self._optimizers.add(optimizer)
        self.step()

    # ---- Steps -----------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Ends a step: what comes after it belongs to the next one. Does nothing where none has begun."""
        if self._history is not None or not self._core.running:
            return
        if self._core.recording or self._owed is not None:
            self._pending.append(_Copies.of(self._step, self._core.training, self._owed, self._core))
            if len(self._pending) >= PENDING:
                self._take_in(wait=False)
        self._step += 1
        self._core.running, self._core.calls, self._gradients = False, 0, self._core.gradients
        self._owe(None)
        self._core.recording = self._step % self.every == 0

    def _take_in(self, wait: bool) -> None:
        layers = None
        while self._pending and (wait or len(self._pending) >= 4 * PENDING or self._pending[0].ready()):
            layers = layers or self._core.layers()
            step = self._pending.pop(0).taken_in(layers)
            if step.owed is not None:
                _hand_over(step.ledgers, next(e.ledgers for e in reversed(self._done) if e.number == step.owed))
            if step.number % self.every == 0:
                self._done.append(step)

    # ---- What was seen -----------------------------------------------------------------------------------------------------

    def history(self) -> History:
        """The numbers behind the report, as `fastact.sight.history` describes them. Ends a step that has begun."""
        if self._history is not None:
            return self._history
        self.step()
        self._take_in(wait=True)
        layers = self._core.layers()
        names = _names(layers, self._places)
        seen = {layer["scope"] for layer in layers}
        unseen = [p for scope, p in enumerate(self._places) if p.activation and scope not in seen]
        why = {False: "was never called", True: "runs in code that torch.compile made, or was never called"}
        return History(
            layers=[
                _layer(index, layer, name, self._places[layer["scope"]], self._done)
                for index, (layer, name) in enumerate(zip(layers, names, strict=True))
            ],
            unseen=[(place.path, why[place.compiled]) for place in unseen],
            every=self.every,
            sample=self.sample,
            environment={"torch": torch.__version__, "devices": sorted({layer["device"] for layer in layers})},
            loss=self._loss,
            output=None if self._maker is None else names[self._maker] if self._maker >= 0 else "",
        )

    def report(self, targets: Any = None) -> Report:
        """Figures and verdicts so far, before or after `close()`: `print(watch.report())`. Ends a step that has begun.
        `targets`: what the loss compares the model's output with."""
        return Report(self.history(), targets)

    # ---- The end -----------------------------------------------------------------------------------------------------------

    def close(self, *, combine: bool = True) -> None:
        """Removes the hooks and frees the counters; the report stays. Under DistributedDataParallel and FSDP the counts of all
        ranks are added up here, so that all have to call it, unless `combine` is false, as at the end of a `with` block that an
        exception leaves.
        """
        if self._history is not None:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._core.close()
        history = self.history()
        if combine and self._distributed and torch.distributed.is_initialized():
            everybody: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everybody, history)
            history = _added_up(everybody)
        self._history, self._core, self._done, self._pending = history, None, [], []

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        # After an exception the other ranks may never come.
        self.close(combine=kind is None)

    def __deepcopy__(self, memo: Any) -> Watch:
        """Of a model that holds its monitor, a copy is not watched."""
        return self

    def __del__(self) -> None:
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        if (core := getattr(self, "_core", None)) is not None:
            core.close()


def _in_backward() -> bool:
    """Where a checkpoint calls once more, for the same step."""
    return torch._C._current_graph_task_id() != -1


# ---- Models --------------------------------------------------------------------------------------------------------------


def _unwrapped(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel, DataParallel and torch.compile were given."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _distributed(model: nn.Module) -> bool:
    return isinstance(model, nn.parallel.DistributedDataParallel) or any(
        type(p.data).__name__ == "DTensor" for p in model.parameters()
    )


_ROWS = {row.class_name: row for row in _registry.rows.values()}


def _kind(module: nn.Module, y: Tensor) -> tuple[str, list[float], int | None]:
    """Name of the activation of a module that no kernel of ours reports, parameters and dim as far as a row has them."""
    name = type(module).__name__
    row = _ROWS.get(name) if type(module) in _TORCHS or isinstance(module, modules.classes) else None
    if row is None:
        return name.lower(), [], None
    if row.along_dim:
        dim: int | None = getattr(module, "dim", None)
        return row.name, [], _registry.implicit_dim(y.dim()) if dim is None else dim
    parameters = [getattr(module, parameter, default) for parameter, default in row.parameters.items()]
    if any(isinstance(p, Tensor) for p in parameters):  # one per channel
        return row.name, [], None
    return row.name, [float(p) for p in parameters], None


def _levels(module: nn.Module, dtype: torch.dtype) -> tuple[float, float]:
    """Of those without a row, as outputs of that dtype have them."""
    if type(module) not in _LEVELS:
        return math.nan, math.nan
    low, high = torch.tensor(_LEVELS[type(module)](module)).to(dtype).tolist()
    return low, high


def _tensors(output: Any) -> Iterator[Tensor]:
    """Those that a model returns, one by one or in tuples, lists and mappings."""
    if type(output) is Tensor and output.device.type in ("cpu", "cuda"):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


# ---- Counters ------------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """The counters of a recorded step on the host."""

    number: int
    training: bool
    owed: int | None  # the step that its gradients belong to, if that is another one
    ledgers: NDArray[np.uint64]  # [layers so far, _WORDS]
    flags: list[tuple[NDArray[np.uint8], NDArray[np.uint8]] | None]  # of each layer: units looked at, units active; packed bits


class _Copies(NamedTuple):
    """The counters of a step on their way to the host."""

    number: int
    training: bool
    owed: int | None
    chunks: dict[tuple[str, int], Tensor | bytes]
    events: list[Any]

    @staticmethod
    def of(number: int, training: bool, owed: int | None, core: Any) -> _Copies:
        chunks: dict[tuple[str, int], Tensor | bytes] = {}
        events: list[Any] = []
        for device, index, counters in core.take():
            chunks[device, index] = counters
            if not isinstance(counters, bytes):
                event: Any = torch.cuda.Event
                with torch.cuda.device(device):
                    events.append(event())
                    events[-1].record()
        return _Copies(number, training, owed, chunks, events)

    def ready(self) -> bool:
        return all(event.query() for event in self.events)

    def taken_in(self, layers: list[dict[str, Any]]) -> _Step:
        for event in self.events:
            event.synchronize()
        arrays = {
            key: np.frombuffer(copy, np.uint8) if isinstance(copy, bytes) else copy.numpy() for key, copy in self.chunks.items()
        }
        ledgers = np.zeros((len(layers), _WORDS), np.uint64)
        flags: list[tuple[NDArray[np.uint8], NDArray[np.uint8]] | None] = []
        for index, layer in enumerate(layers):
            array = arrays.get((layer["device"], layer["chunk"]))
            at, units = layer["offset"], layer["units"]
            if array is None or at >= len(array):  # first called after this step
                flags.append(None)
                continue
            ledgers[index] = array[at : at + 8 * _WORDS].view(np.uint64)
            at += 8 * _WORDS
            flags.append((np.packbits(array[at : at + units]), np.packbits(array[at + units : at + 2 * units])))
        return _Step(self.number, self.training, self.owed, ledgers, flags)


def _hand_over(ledgers: NDArray[np.uint64], to: NDArray[np.uint64]) -> None:
    """Adds what was counted of the gradients to an earlier step's ledgers."""
    counts, extremes, sums = slice(0, _TALLY.index("largest")), slice(_TALLY.index("largest"), _WHOLE), slice(_WHOLE, None)
    for side in (1, 2):
        place = slice(side * len(_TALLY), (side + 1) * len(_TALLY))
        come, there = ledgers[: len(to), place], to[:, place]
        there[:, counts] += come[:, counts]
        there[:, extremes] = np.maximum(there[:, extremes], come[:, extremes])
        there[:, sums].view(np.float64)[:] += come[:, sums].view(np.float64)
        come[:] = 0


def _names(layers: list[dict[str, Any]], places: list[_Place]) -> list[str]:
    """Of a module its path; of a function called in one, path/kind, from the second call on with its number."""
    names: list[str] = []
    for layer in layers:
        place = places[layer["scope"]]
        if place.activation:
            name = place.path or layer["kind"]
        else:
            name = f"{place.path}/{layer['kind']}" if place.path else layer["kind"]
        number = 1 + sum(1 for other in names if other.split("#")[0] == name)
        names.append(name if number == 1 else f"{name}#{number}")
    return names


def _unkeyed(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The numbers of keys (csrc/look.h), -inf for none."""
    top = np.uint64(1 << 63)
    values = np.where(keys & top, keys ^ top, ~keys).astype(np.uint64).view(np.float64)
    return np.where(keys == 0, -math.inf, values)


def _side(ledgers: NDArray[np.uint64], side: int, histogram: NDArray[np.int64], size: int) -> Side:
    words = ledgers[:, side * len(_TALLY) : (side + 1) * len(_TALLY)]
    whole = dict(zip(_TALLY[:_WHOLE], words[:, :_WHOLE].T, strict=True))
    sums = np.ascontiguousarray(words[:, _WHOLE:]).view(np.float64)
    return Side(
        count=whole["count"].astype(np.float64),
        total=sums[:, 0],
        squares=sums[:, 1],
        minimum=0.0 - _unkeyed(whole["smallest"]),
        maximum=_unkeyed(whole["largest"]),
        zeros=whole["zeros"].astype(np.float64),
        low=whole["low"].astype(np.float64),
        high=whole["high"].astype(np.float64),
        nan=whole["nan"].astype(np.float64),
        infinite=whole["infinite"].astype(np.float64),
        histogram=histogram,
        size=size,
    )


def _bounds(kind: str, parameters: list[float]) -> tuple[float, float]:
    """Of the outputs: at the ends and at magnitudes between them."""
    row = _registry.rows.get(_registry.function_of(kind))
    if row is None or (row.parameters and not row.along_dim and not parameters):
        return -math.inf, math.inf
    if row.along_dim:
        return (0.0, 1.0) if kind == "softmax" else (-math.inf, 0.0)
    magnitudes = torch.tensor([0.0, *(2.0 ** (k / 8) for k in range(-80, 81)), math.inf], dtype=torch.float64)
    y = row.reference(torch.cat([-magnitudes, magnitudes]), *parameters)
    y = y[~y.isnan()]
    return float(y.min()), float(y.max())


def _layer(index: int, found: dict[str, Any], name: str, place: _Place, steps: list[_Step]) -> Layer:
    seen = [s for s in steps if index < len(s.ledgers) and s.ledgers[index, [0, len(_TALLY), 2 * len(_TALLY)]].any()]
    ledgers = np.stack([s.ledgers[index] for s in seen]) if seen else np.zeros((0, _WORDS), np.uint64)
    histograms = found["histograms"].cpu().numpy().view(np.uint32).astype(np.int64)
    if found["carried"] is not None:
        histograms += found["carried"].cpu().numpy().astype(np.int64) << 16
    histograms = histograms.reshape(3, 2, BINS)
    low, _ = found["levels"]
    kind, units = found["kind"], found["units"]
    row = _registry.rows.get(_registry.function_of(kind))
    names = list(row.parameters) if row is not None and not row.along_dim else []
    rows = None
    if found["length"]:
        words = ledgers[:, 3 * len(_TALLY) :]
        rows = Rows(
            count=words[:, 0].astype(np.float64),
            sure=words[:, 1].astype(np.float64),
            nan=words[:, 2].astype(np.float64),
            entropy=np.ascontiguousarray(words[:, 3:]).view(np.float64)[:, 0],
        )

    def bits(which: int) -> NDArray[np.uint8]:
        packed = [s.flags[index][which] for s in seen]  # type: ignore[index]
        return np.stack(packed) if packed else np.zeros((0, (units + 7) // 8), np.uint8)

    return Layer(
        name=name,
        kind=_registry.function_of(kind),
        parameters=dict(zip(names, found["parameters"], strict=False)),
        source="fastact" if place.ours or not place.activation else "torch.nn",
        squashing=not math.isnan(low),
        bounds=_bounds(kind, found["parameters"]),
        length=found["length"] or None,
        steps=np.array([s.number for s in seen], np.int64),
        training=np.array([s.training for s in seen], np.bool_),
        output=_side(ledgers, 0, histograms[0], found["sizes"][0]),
        gradient_in=_side(ledgers, 1, histograms[1], found["sizes"][1]),
        gradient_out=_side(ledgers, 2, histograms[2], found["sizes"][2]),
        rows=rows,
        units=Units.of_bits(bits(0), bits(1), units) if units else None,
        unit_dim=found["unit_dim"] if units else None,
        shared=place.shared,
    )


# ---- Several processes ---------------------------------------------------------------------------------------------------


def _added_up(histories: list[History]) -> History:
    """Of all ranks: layers by name, steps by number."""
    first = histories[0]
    layers: dict[str, list[Layer]] = {}
    for history in histories:
        for layer in history.layers:
            layers.setdefault(layer.name, []).append(layer)
    return History(
        layers=[_sum_of(parts) for parts in layers.values()],
        unseen=[entry for entry in first.unseen if all(entry in h.unseen for h in histories)],
        every=first.every,
        sample=first.sample,
        ranks=len(histories),
        environment=first.environment,
        loss=first.loss,
        output=first.output,
    )


_OF_ALL_STEPS = {"histogram", "size"}
_COMBINED = {"minimum": np.minimum, "maximum": np.maximum, "seen": np.logical_or, "active": np.logical_or}


def _sum_of(parts: list[Layer]) -> Layer:
    steps = np.unique(np.concatenate([p.steps for p in parts]))
    places = [np.searchsorted(steps, p.steps) for p in parts]

    def rows_of(values: list[Any], name: str) -> Any:
        combine = _COMBINED.get(name, np.add)
        start = {"minimum": math.inf, "maximum": -math.inf}.get(name, 0)
        total = np.full((len(steps), *values[0].shape[1:]), start, values[0].dtype)
        for at, value in zip(places, values, strict=True):
            total[at] = combine(total[at], value)
        return total

    def fields(values: list[Any]) -> dict[str, Any]:
        whole = {name: sum(getattr(v, name) for v in values) for name in _OF_ALL_STEPS & vars(values[0]).keys()}
        return whole | {
            name: rows_of([getattr(v, name) for v in values], name) for name in vars(values[0]).keys() - whole.keys()
        }

    first = parts[0]
    same_units = first.units is not None and all(p.units and p.units.number == first.units.number for p in parts)
    return Layer(
        **{
            **vars(first),
            "steps": steps,
            "training": rows_of([p.training for p in parts], "seen"),
            **{side: Side(**fields([getattr(p, side) for p in parts])) for side in ("output", "gradient_in", "gradient_out")},
            "rows": Rows(**fields([p.rows for p in parts])) if all(p.rows for p in parts) else None,
            "units": Units(
                seen=rows_of([p.units.seen for p in parts if p.units], "seen"),
                active=rows_of([p.units.active for p in parts if p.units], "active"),
            )
            if same_units
            else None,
        }
    )
