"""The rows as Python sees them: what joins a function written in `activations` to its C entry, its ops and its reference."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec

import torch
from torch import Tensor

from fastact import _C

P = ParamSpec("P")


@dataclass(frozen=True)
class Row:
    """One activation. `function` and `reference` have the same signature; the ops take the float parameters only."""

    name: str  # of the function and the op: "leaky_relu"
    class_name: str  # of the module and the autograd Function: "LeakyReLU"
    parameters: dict[str, float]  # names and defaults, in order
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    ulp: float | None  # promised error of float32 and float64 results, in units of the last place

    @property
    def op(self) -> Any:
        """`torch.ops.fastact.<name>(x, *parameters)`; softmax: `(x, dim)`."""
        return getattr(torch.ops.fastact, self.name)

    @property
    def backward_op(self) -> Any:
        """`torch.ops.fastact.<name>_backward(dy, saved, *parameters)`; softmax: `(dy, y, dim)`."""
        return getattr(torch.ops.fastact, self.name + "_backward")

    def saves_input(self, *parameters: float) -> bool:
        """Whether `saved` is the input, for these parameters; else it is the output."""
        values = [*parameters, *list(self.parameters.values())[len(parameters) :]]
        return _C.saves_input(self.name, values)


_functors = {name: (functor, parameters) for name, functor, parameters in _C.rows()}

# Filled by fastact.activations: every row by name; those of elementwise activations; the one that is not.
rows: dict[str, Row] = {}
elementwise: dict[str, Row] = {}
softmax: Row


def activation(*, ulp: float | None) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Makes the public function of a row out of its reference, whose name, signature and docstring it takes.

    The result is a C function: it goes to the kernel where there is one for the input's dtype, device and layout, and else
    calls the reference. `ulp` is the promised error of the row, which stands as `{ulp}` in its docstring; None where a count
    of ULP is not the right measure.
    """

    def decorate(reference: Callable[P, Tensor]) -> Callable[P, Tensor]:
        name = reference.__name__
        signature = inspect.signature(reference)
        arguments = list(signature.parameters)
        names = ("dim", "dtype") if name == "softmax" else _functors[name][1]
        defaults = {} if name == "softmax" else {k: float(signature.parameters[k].default) for k in names}
        head = "(" + ", ".join(str(p).split(":")[0] + _default(p) for p in signature.parameters.values()) + ")"
        doc = (inspect.getdoc(reference) or "").replace("{ulp}", f"{ulp:g}" if ulp is not None else "")
        function: Callable[P, Tensor] = _C.make_function(
            name,
            reference,
            arguments,
            list(defaults.values()),
            "inplace" in arguments,
            f"{name}{head}\n--\n\n{doc}",
            _softmax_dim,
        )
        class_name = "Softmax" if name == "softmax" else _functors[name][0]
        row = rows[name] = Row(name, class_name, defaults, function, reference, ulp)
        if name == "softmax":
            global softmax
            softmax = row
        else:
            elementwise[name] = row
        return function

    return decorate


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty or ":" not in str(parameter) else f"={parameter.default!r}"


def _softmax_dim(dim: int | None, rank: int) -> int:
    """What softmax has to say about its dim: called from C for a dim that is missing, or that has one element."""
    if dim is None:
        warnings.warn(
            "Implicit dimension choice for softmax has been deprecated. Change the call to include dim=X as an argument.",
            stacklevel=2,
        )
        return 0 if rank in (0, 1, 3) else 1
    warnings.warn(
        f"softmax over dim {dim}, which has one element: the result is always 1 and its gradient always 0. "
        "A binary classifier with one output unit wants a sigmoid. (This is said once.)",
        stacklevel=2,
    )
    return dim
