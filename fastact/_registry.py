"""The rows as Python sees them: what joins a function written in `activations` to its C entry, its ops and its reference."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

import torch
from torch import Tensor

from fastact import _C

P = ParamSpec("P")

KERNEL_DTYPES = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True)
class Row:
    """One activation. `function` and `reference` have the same signature; the ops take the parameters only.

    Of those along a dim, the ops take dim first, and the backward op the first of the parameters only.
    """

    name: str  # of the function and the op: "leaky_relu"
    class_name: str  # of the module and the autograd Function: "LeakyReLU"
    parameters: dict[str, float]  # of the op: names and defaults, in order
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    ulp: float | None  # promised error of float32 and float64 results, in units of the last place
    arguments: dict[str, Any]  # names and defaults of all that follows x in a call of `function`, in order

    @property
    def along_dim(self) -> bool:
        """Whether it is computed along a dim, rather than elementwise."""
        return self.name in _functors_along_dim

    @property
    def op(self) -> Any:
        """`torch.ops.fastact.<name>(x, *parameters)`; along a dim: `(x, dim, *parameters)`."""
        return getattr(torch.ops.fastact, self.name)

    @property
    def backward_op(self) -> Any:
        """`torch.ops.fastact.<name>_backward(dy, saved, *parameters)`; along a dim: `(dy, y, dim, ...)`."""
        return getattr(torch.ops.fastact, self.name + "_backward")

    @property
    def inplace_op(self) -> Any:
        """`torch.ops.fastact.<name>_(x, *parameters)`, of an elementwise row."""
        return getattr(torch.ops.fastact, self.name + "_")

    @property
    def ops(self) -> list[Any]:
        return [self.op, self.backward_op] + ([] if self.along_dim else [self.inplace_op])

    @property
    def backward_arguments(self) -> int:
        """How many arguments the backward op takes after the two tensors."""
        return len(self.backward_op.default._schema.arguments) - 2

    def saves_input(self, *parameters: float) -> bool:
        """Whether `saved` is the input, for these parameters; else it is the output."""
        if self.along_dim:
            return False
        values = [*parameters, *list(self.parameters.values())[len(parameters) :]]
        return _C.saves_input(self.name, values)


_functors = {name: (functor, parameters) for name, functor, parameters in _C.rows()}
_functors_along_dim = dict(_C.rows_along_dim())

# Filled by fastact.activations: every public row by name; those of elementwise activations; softmax and its relatives; and the
# rows that functions take where `precise_grad` or `inplace` is true.
rows: dict[str, Row] = {}
elementwise: dict[str, Row] = {}
along_dim: dict[str, Row] = {}
variants: dict[str, Row] = {}


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
        class_name, names = (_functors_along_dim[name], ()) if name in _functors_along_dim else _functors[name]
        defaults = {k: float(signature.parameters[k].default) for k in names}
        head = "(" + ", ".join(str(p).split(":")[0] + _default(p) for p in signature.parameters.values()) + ")"
        doc = (inspect.getdoc(reference) or "").replace("{ulp}", f"{ulp:g}" if ulp is not None else "")
        function: Callable[P, Tensor] = _C.make_function(
            name,
            reference,
            arguments,
            list(defaults.values()),
            "inplace" in arguments,
            f"{name}{head}\n--\n\n{doc}",
            functools.partial(checked_dim, name),
        )
        others = {p.name: p.default for p in list(signature.parameters.values())[1:]}
        if name in _functors_along_dim:
            # As its op has them: after x and dim, with defaults.
            rest = getattr(torch.ops.fastact, name).default._schema.arguments[2:]
            defaults = {a.name: a.default_value for a in rest}
        row = rows[name] = Row(name, class_name, defaults, function, reference, ulp, others)
        (along_dim if row.along_dim else elementwise)[name] = row
        if "precise_grad" in arguments:
            with_precise_grad = functools.partial(function, precise_grad=True)  # type: ignore[arg-type]
            _add_variant("precise_" + name, row, with_precise_grad)
        if "result_" + name in _functors:  # the function takes its op for tensors in place
            _add_variant("result_" + name, row, functools.partial(_call_op, "result_" + name, [*defaults.values()]))
        return function

    return decorate


def function_of(name: str) -> str:
    """The name of the function that takes a row of that name."""
    return name.removeprefix("precise_").removeprefix("result_")


def _add_variant(name: str, row: Row, function: Callable[..., Tensor]) -> None:
    variants[name] = replace(row, name=name, class_name=_functors[name][0], function=function)


def _call_op(name: str, defaults: list[float], x: Tensor, *parameters: float) -> Tensor:
    y: Tensor = getattr(torch.ops.fastact, name)(x, *parameters, *defaults[len(parameters) :])
    return y


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty or ":" not in str(parameter) else f"={parameter.default!r}"


def implicit_dim(rank: int) -> int:
    """What torch takes where softmax or a relative is given no dim."""
    return 0 if rank in (0, 1, 3) else 1


def checked_dim(name: str, dim: int | None, rank: int) -> int:
    """What softmax or a relative has to say about its dim: called from C for a dim that is missing, or that has one element."""
    if dim is None:
        warnings.warn(
            f"Implicit dimension choice for {name} has been deprecated. Change the call to include dim=X as an argument.",
            stacklevel=2,
        )
        return implicit_dim(rank)
    always = along_dim[name].reference(torch.zeros(1), 0).item()
    warnings.warn(
        f"{name} over dim {dim}, which has one element: the result is always {always:g} and its gradient always 0. "
        "A binary classifier with one output unit wants a sigmoid. (This is said once.)",
        stacklevel=2,
    )
    return dim
