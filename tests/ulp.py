"""Errors of the elementwise kernels in units of the last place, over bit patterns. As a program it prints them as a table:

python tests/ulp.py [--step 1]       every float32 input at step 1 (some minutes), every step-th otherwise
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from conftest import BEST_ISA, ELEMENTWISE, ISAS
from torch import Tensor

from fastact import _C
from fastact._registry import Row

# Explicit bits of the fraction, and the exponent of the smallest subnormal.
FORMATS = {torch.float64: (52, -1074), torch.float32: (23, -149), torch.bfloat16: (7, -133), torch.float16: (10, -24)}
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
CHUNK = 1 << 20


def ulp_of(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at the exact values, which are float64."""
    fraction, smallest = FORMATS[dtype]
    _, exponent = torch.frexp(expected)
    # The exponent of what is not finite means nothing, and may be any number.
    return power_of_two((exponent.long() - 1 - fraction).clamp(smallest, 1023))


def power_of_two(n: Tensor) -> Tensor:
    """2^n in float64, from its bits: exact on every device, where a general power need not be."""
    normal, subnormal = n.clamp(min=-1022) + 1023 << 52, torch.ones_like(n) << (n + 1074).clamp(0, 51)
    return torch.where(n >= -1022, normal, subnormal).view(torch.float64)


def rounded_once(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 numbers as the nearest of dtype, ties to even. torch rounds to float32 first, and from there to 16 bits: what
    lies close to the middle of two neighbours may then go the wrong way. Here float32 only tells on which side it lies: it is
    cut off towards zero, and made odd where something was cut off.
    """
    if dtype.itemsize > 2:
        return wide.to(dtype)
    near = wide.float()
    codes = near.view(torch.int32)
    cut = torch.where(near.double().abs() > wide.abs(), codes - 1, codes)
    odd = torch.where(near.isfinite() & (near.double() != wide), cut | 1, codes)
    return odd.view(torch.float32).to(dtype)


@dataclass
class Worst:
    """The largest error seen, where it was, and how many results were not the nearest number of the dtype."""

    error: float = 0.0
    x: float = 0.0
    expected: float = 0.0
    actual: float = 0.0
    misrounded: int = 0

    def add(self, x: Tensor, expected: Tensor, actual: Tensor, smallest: float | Tensor = 0.0) -> None:
        """NaN must meet NaN and infinity infinity; `expected` is float64; no unit is taken smaller than `smallest`."""
        rounded = rounded_once(expected, actual.dtype)
        same = (rounded == actual) | (expected.isnan() & actual.isnan())
        self.misrounded += int((~same).sum())
        error = (actual.double() - expected).abs() / torch.maximum(ulp_of(expected, actual.dtype), torch.as_tensor(smallest))
        error = torch.where(same & ~rounded.isfinite(), 0.0, error).nan_to_num(nan=torch.inf)
        value, index = error.max(0)
        if value > self.error:
            self.error, self.x = float(value), float(x[index])
            self.expected, self.actual = float(expected[index]), float(actual[index])

    def __str__(self) -> str:
        return f"{self.error:.3f} ULP at x = {self.x!r}: expected {self.expected!r}, got {self.actual!r}"


def patterns(
    dtype: torch.dtype, step: int = 1, chunk: int = CHUNK, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """Every step-th bit pattern of a 16- or 32-bit dtype, in chunks."""
    integer = INTEGERS[dtype]
    bits = torch.iinfo(integer).bits
    for start in range(0, 1 << bits, chunk * step):
        codes = torch.arange(start, min(start + chunk * step, 1 << bits), step, dtype=torch.int64, device=device)
        yield torch.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes).to(integer).view(dtype)


def exact_parameters(row: Row) -> list[tuple[float, ...]]:
    """Parameters that are float32 numbers, and powers of two but for the defaults: a product with them is then exact."""
    default = tuple(torch.tensor(p, dtype=torch.float32).item() for p in row.parameters.values())
    return [default, *{0: [], 1: [(0.25,), (-2.0,)], 2: [(0.5, 2.0), (-1.0, -1.0)]}[len(default)]]


def forward_sweep(row: Row, parameters: tuple[float, ...], chunks: Iterator[Tensor]) -> Worst:
    worst = Worst()
    for x in chunks:
        worst.add(x, row.reference(x.double(), *parameters), row.op(x, *parameters))
    return worst


def backward_formula(row: Row, dy: Tensor, saved: Tensor, parameters: tuple[float, ...]) -> Tensor:
    """The float64 kernel on the same rounded inputs. Its own formula is what gradcheck holds against finite differences."""
    return row.backward_op(dy.double(), saved.double(), *parameters)


# Where a derivative is a difference, what its error is measured by: the sum of the magnitudes of the terms.
TERMS = {"silu": lambda x: torch.sigmoid(x) * (1 + x.abs() * torch.sigmoid(-x))}


def backward_sweep(row: Row, parameters: tuple[float, ...], chunks: Iterator[Tensor], dy: float) -> Worst:
    """A subnormal factor of the formula has an error of its last bit, which dy and the parameters multiply."""
    worst = Worst()
    smallest = abs(dy) * max([1.0, *map(abs, parameters)]) * 2.0**-149
    for x in chunks:
        least: float | Tensor = smallest
        if row.name in TERMS:
            least = ulp_of(dy * TERMS[row.name](x.double()), x.dtype).clamp(min=smallest).nan_to_num(nan=smallest)
        saved = x if row.saves_input(*parameters) else row.op(x, *parameters)
        gradient = torch.full_like(saved, dy)
        worst.add(x, backward_formula(row, gradient, saved, parameters), row.backward_op(gradient, saved, *parameters), least)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, default=61, help="take every step-th float32 pattern")
    step = parser.parse_args().step
    print(
        f"Largest error over every {step if step > 1 else ''} float32 input, and over all 65,536 16-bit inputs".replace(
            "  ", " "
        )
    )
    print(
        f"{'':24}{'isa':10}{'promise':>9}{'float32':>9}{'bfloat16':>10}{'wrong':>7}{'float16':>9}{'wrong':>7}{'backward':>10}"
    )
    for row in ELEMENTWISE:
        for isa in ISAS:
            _C.use_isa(isa)
            parameters = exact_parameters(row)[0]
            f32 = forward_sweep(row, parameters, patterns(torch.float32, step))
            bf16 = forward_sweep(row, parameters, patterns(torch.bfloat16))
            f16 = forward_sweep(row, parameters, patterns(torch.float16))
            back = backward_sweep(row, parameters, patterns(torch.float32, step), 1.0)
            print(
                f"{row.name:24}{isa:10}{row.ulp:9.1f}{f32.error:9.3f}{bf16.error:10.3f}{bf16.misrounded:7}"
                f"{f16.error:9.3f}{f16.misrounded:7}{back.error:10.3f}",
                flush=True,
            )
    _C.use_isa(BEST_ISA)


if __name__ == "__main__":
    main()
