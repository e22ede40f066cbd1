"""What torch's transforms have to be told of the ops: how vmap batches them, what torch.compile traces in place of a function,
and how a DTensor's sharding passes through them.

The last two belong to parts of torch that take seconds to import. They are told when those are imported, by whomever.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastact import _C, _registry
from fastact._registry import KERNEL_DTYPES, Row


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls `then` once the module of that name has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                self.then()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, then: Callable[[], None]) -> None:
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


# ---- vmap ------------------------------------------------------------------------------------------------------------------


def batch(row: Row) -> None:
    """The batching rules of a row's ops."""
    name = f"fastact::{row.name}"
    if row.along_dim:
        torch.library.register_vmap(name, _along_dim(row.op))
        torch.library.register_vmap(name + "_backward", _along_dim(row.backward_op))
    else:
        torch.library.register_vmap(name, _elementwise(row.op))
        torch.library.register_vmap(name + "_backward", _elementwise(row.backward_op))
        torch.library.register_vmap(name + "_", _elementwise(row.inplace_op))


def _elementwise(op: Any) -> Callable[..., Any]:
    """The batch goes along wherever it lies; of two tensors that have it in different places, it is brought to the front."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        tensors, at = arguments[:count], in_dims[0]
        if any(other != at for other in in_dims[:count]):
            tensors, at = _batch_first(info, in_dims, tensors), 0
        y = op(*tensors, *arguments[count:])
        return y, None if y is None else at

    return rule


def _along_dim(op: Any) -> Callable[..., Any]:
    """The batch is brought to the front, and `dim` counted from behind it."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Tensor, int]:
        count = sum(isinstance(argument, Tensor) for argument in arguments)
        tensors = _batch_first(info, in_dims, arguments[:count])
        dim, rest = arguments[count], arguments[count + 1 :]
        rank = tensors[0].dim() - 1
        if rank == 0:  # a softmax of one number
            return op(*(t.unsqueeze(1) for t in tensors), 1 if dim == 0 else dim, *rest).squeeze(1), 0
        if not -rank <= dim < rank:
            raise IndexError(f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})")
        return op(*tensors, dim % rank + 1, *rest), 0

    return rule


def _batch_first(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(
        t.expand(info.batch_size, *t.shape) if at is None else t.movedim(at, 0) for t, at in zip(tensors, in_dims, strict=False)
    )


# ---- torch.compile ---------------------------------------------------------------------------------------------------------

# Names of the activations whose kernels stay in compiled graphs: see fastact.compiler.opaque.
opaque: set[str] = set()


def substitute(row: Row) -> None:
    """Dynamo cannot look into a C function, and traces this in its place."""
    reference, defaults, op, count = row.reference, row.arguments, row.op.default, len(row.parameters)
    tempered, precise = "temperature" in defaults, "precise_grad" in defaults
    precise_op = _registry.variants["precise_" + row.name].op.default if precise else op

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def is_opaque() -> bool:
        return row.name in opaque

    # The kernel's result, or None where it is the reference that serves the call.
    def elementwise(x: Tensor, *values: Any) -> Any:
        flag = values[count] if len(values) > count else False
        if x.dtype not in KERNEL_DTYPES or (flag and not precise):
            return None
        for value in values[:count]:
            if not isinstance(value, int | float):
                return None
        return (precise_op if flag else op)(x, *values[:count])

    def along_dim(
        x: Tensor, dim: int | None, dtype: torch.dtype | None, temperature: Any = 1.0, masked_rows: str = "nan"
    ) -> Any:
        x = x if dtype is None else x.to(dtype)
        if dim is None or x.dtype not in KERNEL_DTYPES or not isinstance(temperature, int | float):
            return None
        return op(x, dim, temperature, masked_rows == "zero") if tempered else op(x, dim)

    kernel = along_dim if row.along_dim else elementwise

    def traced(*args: Any, **kwargs: Any) -> Tensor:
        if "input" in kwargs and "x" not in kwargs:  # torch's name of x
            kwargs["x"] = kwargs.pop("input")
        return of_x(*args, **kwargs)

    def of_x(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_opaque():
            y: Tensor | None = kernel(
                x, *args, *[kwargs.get(name, default) for name, default in [*defaults.items()][len(args) :]]
            )
            if y is not None:
                return y
        return reference(x, *args, **kwargs)

    torch.compiler.substitute_in_graph(row.function, skip_signature_check=True)(traced)


def substitute_all() -> None:
    each(substitute, [*_registry.rows.values()])

    # What the autograd Functions ask: of constants, so that Dynamo calls it rather than trace anything.
    @torch.compiler.substitute_in_graph(_C.saves_input, can_constant_fold_through=True, skip_signature_check=True)
    def saves_input(name: str, parameters: list[float]) -> bool:
        return _C.saves_input(name, parameters)

    # What is compiled no monitor sees.
    @torch.compiler.substitute_in_graph(_C.at_work, skip_signature_check=True)
    def at_work(forward: Callable[..., Tensor], module: torch.nn.Module, input: Tensor) -> Tensor:
        return forward(module, input)


# ---- DTensor ---------------------------------------------------------------------------------------------------------------


def shard(row: Row) -> None:
    """How a row's ops treat tensors that lie in shards: an elementwise op takes any, and softmax those along other dims."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    def register(op: Any) -> None:
        tensors = sum(isinstance(argument.type, torch.TensorType) for argument in op.default._schema.arguments)
        returns = len(op.default._schema.returns)

        @register_sharding(op.default)  # type: ignore[untyped-decorator]
        def placements(x: Any, *rest: Any) -> list[tuple[list[Any], list[Any]]]:
            values = rest[tensors - 1 :]
            whole = values[0] % max(x.ndim, 1) if row.along_dim else None
            kinds = [Replicate(), *(Shard(dim) for dim in range(x.ndim) if dim != whole)]
            return [([kind] * returns, [kind] * tensors + [None] * len(values)) for kind in kinds]

    for op in row.ops:
        register(op)


def each(tell: Callable[[Row], None], rows: list[Row]) -> None:
    for row in rows:
        tell(row)


def register_all() -> None:
    rows = [*_registry.rows.values(), *_registry.variants.values()]
    each(batch, rows)
    after_import("torch._dynamo", substitute_all)
    after_import("torch.distributed.tensor", lambda: each(shard, rows))
