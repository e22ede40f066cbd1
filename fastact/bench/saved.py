"""What a forward keeps alive for its backward, ours and torch's: counted in bytes, whatever it consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from fastact._registry import variants
from fastact.bench.cases import DTYPES, Case, torch_function


@dataclass(frozen=True)
class Kept:
    """Bytes per element of the distinct storages that the graph of one call saves. An output is usually alive anyway, because
    the next layer keeps it as its input; an input usually is not, or is so only until the layer before it is through.
    """

    output: float
    input: float
    other: float  # masks, intermediate results

    @property
    def total(self) -> float:
        return self.output + self.input + self.other


@dataclass(frozen=True)
class Saved:
    op: str
    dtype: str
    ours: Kept
    torch: Kept

    @classmethod
    def load(cls, data: dict[str, Any]) -> Saved:
        return cls(data["op"], data["dtype"], Kept(**data["ours"]), Kept(**data["torch"]))


def saved_bytes(cases: Iterable[Case], device: str) -> list[Saved]:
    """For every op and dtype among the cases, with the parameters they have; and with `precise_grad`, where they take it."""
    distinct = {(case.row.name, case.dtype): case for case in cases}
    rows = []
    for (op, dtype), case in distinct.items():
        theirs = kept(torch_function(case.row)[0], dtype, case.args, device)
        for row in (case.row, variants.get(f"precise_{op}")):
            if row:
                rows.append(Saved(row.name, dtype, kept(row.function, dtype, case.args, device), theirs))
    return rows


def kept(function: Callable[..., Tensor], dtype: str, args: tuple[Any, ...], device: str = "cpu") -> Kept:
    # Of so many elements what is saved once for a whole tensor, such as a scalar, hardly shows.
    x = torch.randn(256, 256, dtype=DTYPES[dtype], device=device, requires_grad=True)
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x, *args)
    output, input = (storages.pop(tensor.untyped_storage().data_ptr(), 0) for tensor in (y, x))
    return Kept(*(count / x.numel() for count in (output, input, sum(storages.values()))))


def saved_table(rows: list[Saved]) -> Iterator[str]:
    yield "saved for the backward, bytes per element"
    yield f"  {'dtype':8}  {'op':22} {'fastact':>8}  {'which':20} {'torch':>8}  which"
    above = ""
    for row in sorted(rows, key=lambda row: list(DTYPES).index(row.dtype)):  # stable
        dtype, above = ("" if row.dtype == above else row.dtype), row.dtype
        ours, theirs = (f"{_number(kept.total):>8}  {_which(kept):20}" for kept in (row.ours, row.torch))
        yield f"  {dtype:8}  {row.op:22} {ours} {theirs}".rstrip()


def _which(kept: Kept) -> str:
    parts = {"output": kept.output, "input": kept.input, "other": kept.other}
    present = {name: size for name, size in parts.items() if _number(size) != "0"}
    return ", ".join(name if len(present) == 1 else f"{name} {_number(size)}" for name, size in present.items())


def _number(size: float) -> str:
    return f"{round(size, 3):g}"
