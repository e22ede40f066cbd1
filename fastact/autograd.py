"""The activations as `torch.autograd.Function`s over the registered ops, made from the rows: `Sigmoid.apply(x)`,
`LeakyReLU.apply(x, negative_slope)`, `Softmax.apply(x, dim)` ...

They exist for code that wants a Function to subclass, wrap or test. The functions, such as `fastact.sigmoid`, are several times
quicker to call, because their autograd is in C++. Arguments after x may be left out where the function has a default.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor

from fastact import _registry, activations  # noqa: F401  (activations fills the rows)


def _make(row: _registry.Row) -> type[torch.autograd.Function]:
    along_dim = row.name in _registry.along_dim
    defaults = (*[None] * along_dim, *row.parameters.values())  # a dim has none
    backward_arguments = row.backward_arguments

    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        ctx.parameters = parameters + defaults[len(parameters) :]
        ctx.inputs = 1 + len(parameters)
        y: Tensor = row.op(x, *ctx.parameters)
        ctx.save_for_backward(x if not row.along_dim and row.saves_input(*ctx.parameters) else y)
        return y

    def backward(ctx: Any, dy: Tensor) -> Any:
        (saved,) = ctx.saved_tensors
        return row.backward_op(dy, saved, *ctx.parameters[:backward_arguments]), *[None] * (ctx.inputs - 1)

    # Dynamo counts these to tell whether forward takes ctx.
    arguments = ["ctx", "x", *["dim"] * along_dim, *row.parameters]
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in arguments]
    )
    names = ", ".join(["x", *["dim"] * along_dim, *(f"{name}={default}" for name, default in row.parameters.items())])
    members = {
        "__module__": __name__,
        "__doc__": f"`{row.class_name}.apply({names})`: see `fastact.{row.name}`.",
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
    }
    # Made by its metaclass under its own name, which the nodes of the graph take from it.
    return types.new_class(row.class_name, (torch.autograd.Function,), exec_body=lambda namespace: namespace.update(members))


_functions = {row.class_name: _make(row) for row in (*_registry.rows.values(), *_registry.variants.values())}
globals().update(_functions)
__all__ = sorted(_functions)


def __getattr__(name: str) -> type[torch.autograd.Function]:
    # For type checkers, which cannot see what the rows made; at run time every Function is a global already.
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
