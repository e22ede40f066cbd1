"""Every row's error promise, forward and backward, on every instruction set and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mpmath
import pytest
import torch
from conftest import DEVICE, ELEMENTWISE, REFERENCE_ERROR, SEED, parameter_sets
from ulp import (
    FORMATS,
    Worst,
    backward_formula,
    backward_sweep,
    exact_parameters,
    forward_sweep,
    patterns,
    rounded_once,
    ulp_of,
)

import fastact
from fastact import _registry
from fastact._registry import Row

# Inputs a 16-bit kernel may round the wrong way: the float32 result lies that close to the middle of two neighbours.
MISROUNDED = {torch.bfloat16: 4, torch.float16: 6}
# And where a parameter is no power of two: a product with it is rounded to float32 before, here as in torch.
MISROUNDED_PRODUCTS = {torch.bfloat16: 4, torch.float16: 32}
# A product of up to four factors, each rounded, and a difference that is exact or rounded once.
BACKWARD_ULP = 3.0
# Of the sum of the terms that silu's derivative is made of, each with a sigmoid of up to 2 ULP.
BACKWARD_ULP_OF = {"silu": 5.0}
# What the float32 result was off by before it was rounded to 16 bits, in steps of float16, of which 2^-13 make a float32 ULP.
# On CUDA bfloat16 takes the hardware's exponential and reciprocal, good to 22 bits each: with a factor of two for what the
# formulas make of them, 2^-20 of a value, which has at least 2^10 steps.
BEFORE_ROUNDING = {"cpu": 3 * 2.0**-13, "cuda": 2.0**-9}[DEVICE]
BEFORE_ROUNDING_BACKWARD = {"cpu": 4 * 2.0**-13, "cuda": 2.0**-9}[DEVICE]
# A prime, so that every exponent meets every residue of the fraction: about 2.1 million inputs.
STEP = 2039


def misrounded_at_most(parameters: tuple[float, ...], dtype: torch.dtype) -> int:
    powers_of_two = all(math.frexp(abs(p))[0] in (0.0, 0.5) for p in parameters)
    return (MISROUNDED if powers_of_two else MISROUNDED_PRODUCTS)[dtype]


def ident(row: Row, parameters: tuple[float, ...], isa: str, dtype: torch.dtype) -> str:
    return f"{row.name}{parameters} {str(dtype)[6:]} {isa}"


def test_float32_forward(row: Row, isa: str) -> None:
    for parameters in exact_parameters(row):
        worst = forward_sweep(row, parameters, patterns(torch.float32, STEP))
        print(ident(row, parameters, isa, torch.float32), worst)
        assert worst.error <= row.ulp, f"{ident(row, parameters, isa, torch.float32)}: {worst}"


def test_float32_where_e_to_x_turns_subnormal(row: Row, isa: str) -> None:
    """There the two ways to compute it meet: every input from -87.4 to -87.3."""
    first, last = (torch.tensor(x).view(torch.int32).item() for x in (-87.3, -87.4))
    x = torch.arange(first, last, dtype=torch.int32).view(torch.float32)
    for parameters in exact_parameters(row):
        if row.name == "scaled_sigmoid":
            continue  # test_scaled_sigmoid_where_the_sigmoid_is_subnormal
        worst = forward_sweep(row, parameters, iter([x]))
        assert worst.error <= row.ulp, f"{ident(row, parameters, isa, torch.float32)}: {worst}"


def test_float32_backward(row: Row, isa: str) -> None:
    for parameters in exact_parameters(row):
        for dy in (1.0, -3.0, 2.0**-10):
            worst = backward_sweep(row, parameters, patterns(torch.float32, 3 * STEP), dy)
            most = BACKWARD_ULP_OF.get(row.name, BACKWARD_ULP)
            assert worst.error <= most, f"dy {dy} {ident(row, parameters, isa, torch.float32)}: {worst}"


def logistic_derivative(z: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(z) * torch.sigmoid(-z)


# In float64, from the input, without a difference that cancels.
TRUE_DERIVATIVES: dict[str, Callable[..., torch.Tensor]] = {
    "precise_sigmoid": logistic_derivative,
    "precise_tanh": lambda x: 4 * logistic_derivative(2 * x),
    "precise_scaled_sigmoid": lambda x, scale=1.0, slope=1.0: scale * slope * logistic_derivative(slope * x),
    "elu": lambda x, alpha=1.0: torch.where(x <= 0, alpha * torch.exp(x), 1.0),
    "softplus": lambda x, beta=1.0, threshold=20.0: torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x)),
    "log_sigmoid": lambda x: torch.sigmoid(-x),
}


@pytest.mark.parametrize("precise_row", [row for row in ELEMENTWISE if row.name in TRUE_DERIVATIVES], ids=lambda row: row.name)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_a_gradient_from_the_input_is_the_true_derivative(precise_row: Row, narrow: torch.dtype, isa: str) -> None:
    """Within 2 ULP over all inputs, where the derivative is subnormal too. (bfloat16 on CUDA: as every result there.)"""
    most = 2.0 if narrow == torch.float32 else 0.5 + BEFORE_ROUNDING_BACKWARD
    for parameters in exact_parameters(precise_row):
        worst = Worst()
        # A subnormal sigmoid' has an error of its last bit, which a scale multiplies.
        smallest = max(1.0, abs(math.prod(parameters))) * 2.0**-149
        for x in patterns(narrow, STEP if narrow == torch.float32 else 1):
            ones = torch.ones_like(x)
            true = TRUE_DERIVATIVES[precise_row.name](x.double(), *parameters)
            worst.add(x, true, precise_row.backward_op(ones, x, *parameters), smallest)
        assert worst.error <= most, f"{ident(precise_row, parameters, isa, narrow)}: {worst}"


def test_a_gradient_from_a_rounded_output_dies() -> None:
    """What precise_grad is for: bfloat16 rounds a sigmoid beyond 6.3 to 1, of which no gradient is left."""
    x = torch.tensor([4.0, 4.5, 5.0, 5.5, 5.96875, 7.0, 20.0], dtype=torch.bfloat16)
    true = logistic_derivative(x.double())
    ones = torch.ones_like(x)
    from_output = torch.ops.fastact.sigmoid_backward(ones, torch.ops.fastact.sigmoid(x)).double()
    from_input = torch.ops.fastact.precise_sigmoid_backward(ones, x).double()
    assert ((from_output - true).abs() / true).max() > 0.5
    assert from_output[-2:].tolist() == [0.0, 0.0]
    assert ((from_input - true).abs() / true <= 2.0**-8).all()


def test_the_measure_rounds_once() -> None:
    """Beside the middle of two neighbours, closer than float32 tells; and where float16 ends."""
    middle, subnormal = 0.5 + 2.0**-12, 2.0**-25
    wide = [middle - 2.0**-40, middle, middle + 2.0**-40, subnormal, subnormal + 2.0**-60, 65520 - 2.0**-30, 65520, 1e300]
    near = [0.5, 0.5, 0.5 + 2.0**-11, 0.0, 2.0**-24, 65504, math.inf, math.inf]
    for sign in (1, -1):
        got = rounded_once(torch.tensor(wide, dtype=torch.float64) * sign, torch.float16)
        assert got.tolist() == [sign * number for number in near]
    assert rounded_once(torch.tensor(math.nan, dtype=torch.float64), torch.bfloat16).isnan()


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_forward_is_correctly_rounded(row: Row, dtype16: torch.dtype, isa: str) -> None:
    for parameters in exact_parameters(row):
        worst = forward_sweep(row, parameters, patterns(dtype16))
        name = ident(row, parameters, isa, dtype16)
        most = misrounded_at_most(parameters, dtype16)
        assert worst.misrounded <= most, f"{name}: {worst.misrounded} of 65,536 misrounded, the worst {worst}"
        assert worst.error <= 0.5 + BEFORE_ROUNDING, f"{name}: {worst}"


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_products_are_rounded_as_torchs(dtype16: torch.dtype, isa: str) -> None:
    """Twice, where a slope is no power of two."""
    for slope in (0.1, 0.2, 0.3, 1 / 3, 0.816038, -1.7):
        for x in patterns(dtype16):
            ours, torchs = fastact.leaky_relu(x, slope), torch.nn.functional.leaky_relu(x, slope)
            assert torch.equal(ours.nan_to_num(), torchs.nan_to_num()), slope


@pytest.mark.parametrize("dtype16", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_16_bit_backward(row: Row, dtype16: torch.dtype, isa: str) -> None:
    for parameters in exact_parameters(row):
        for dy in (1.0, -3.0, 2.0**-10):
            worst = backward_sweep(row, parameters, patterns(dtype16), dy)
            # One rounding to the dtype of a float32 result that is within BACKWARD_ULP.
            assert worst.error <= 0.5 + BEFORE_ROUNDING_BACKWARD, f"dy {dy} {ident(row, parameters, isa, dtype16)}: {worst}"


def float64_inputs(generator: torch.Generator) -> torch.Tensor:
    """Magnitudes from 2^-30 to 2^10, and the places where formulas change branch or results leave the normal range."""
    exponents = torch.rand(1500, generator=generator, dtype=torch.float64) * 40 - 30
    signs = torch.randint(0, 2, (1500,), generator=generator) * 2 - 1
    special = [
        0.625,
        0.6250001,
        0.34657,
        -0.34658,
        -745.2,
        -745.0,
        -709.0,
        -708.0,
        -708.39641853226414,
        -708.396418532264,
        36.7,
        19.1,
        1e-310,
        -1e-310,
        5e-324,
    ]
    return torch.cat([signs * exponents.exp2(), torch.tensor(special, dtype=torch.float64)])


def test_float64_forward(row: Row, isa: str, generator: torch.Generator) -> None:
    for parameters in exact_parameters(row):
        worst = forward_sweep(row, parameters, iter([float64_inputs(generator)]))
        # torch's own float64 functions, which stand for the exact value here, are within 2 ULP of it.
        assert worst.error <= row.ulp + 2, f"{ident(row, parameters, isa, torch.float64)} seed {SEED}: {worst}"


@pytest.mark.parametrize(("name", "exact"), [("sigmoid", lambda x: 1 / (1 + mpmath.exp(-x))), ("tanh", mpmath.tanh)])
def test_float64_transcendentals_in_40_digits(
    name: str, exact: Callable[[mpmath.mpf], mpmath.mpf], isa: str, generator: torch.Generator
) -> None:
    row = _registry.elementwise[name]
    x = float64_inputs(generator)
    worst = 0.0, 0.0
    with mpmath.workdps(40):
        for at, actual in zip(x.tolist(), row.op(x).tolist(), strict=True):
            expected = exact(mpmath.mpf(at))
            step = mpmath.ldexp(1, max(math.frexp(float(expected))[1] - 53, -1074))
            worst = max(worst, (float(abs(actual - expected) / step), at))
    assert worst[0] <= row.ulp, f"{name} float64 {isa}: {worst[0]:.3f} ULP at x = {worst[1]!r}, seed {SEED}"


def test_float64_backward(row: Row, isa: str, generator: torch.Generator) -> None:
    """Against the derivative of the reference, at points where the saved output loses nothing."""
    x = torch.rand(4000, generator=generator, dtype=torch.float64) * 2 - 1
    dy = torch.randn(4000, generator=generator, dtype=torch.float64)
    for parameters in parameter_sets(row):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(row.reference(leaf, *parameters), leaf, dy)
        leaf = x.clone().requires_grad_()
        (actual,) = torch.autograd.grad(row.function(leaf, *parameters), leaf, dy)
        # For |x| <= 1 the errors of y, of a few 2^-53, grow by less than 8 in 1 - y and in torch's own formula.
        torch.testing.assert_close(
            actual,
            expected,
            rtol=max(32 * 2.0**-53, REFERENCE_ERROR.get(row.name, 0)),
            atol=0,
            msg=partial("{}{} {} seed {}: {}".format, row.name, parameters, isa, SEED),
        )


def test_backward_formula_is_the_one_on_paper() -> None:
    """Hand-computed literals: they survive an error in both the kernels and the formula they are compared with."""
    import fastact

    half = torch.tensor([0.5, 0.25])
    ops = torch.ops.fastact
    assert ops.sigmoid_backward(torch.tensor([4.0, 16.0]), half).tolist() == [1.0, 3.0]
    assert ops.tanh_backward(torch.tensor([4.0, 16.0]), half).tolist() == [3.0, 15.0]
    assert ops.relu_backward(torch.tensor([4.0, 16.0]), torch.tensor([0.0, 2.0])).tolist() == [0.0, 16.0]
    assert ops.leaky_relu_backward(torch.tensor([4.0, 16.0]), torch.tensor([-1.0, 2.0]), 0.5).tolist() == [2.0, 16.0]
    assert ops.scaled_sigmoid_backward(torch.tensor([4.0, 16.0]), torch.tensor([1.0, 3.0]), 4.0, 2.0).tolist() == [6.0, 24.0]
    assert fastact.scaled_sigmoid(torch.zeros(1), 6.0, 5.0).item() == 3.0


def test_scaled_sigmoid_where_the_sigmoid_is_subnormal(isa: str) -> None:
    """There a scale above 1 makes the sigmoid's last bit, 2^-149, worth more than the result's."""
    x = torch.linspace(-104, -87, 100_000)
    actual = torch.ops.fastact.scaled_sigmoid(x, 4.0, 1.0).double()
    expected = 4 * torch.sigmoid(x.double())
    bound = 2.5 * ulp_of(expected, torch.float32) + 4 * 2.0**-150
    worst = ((actual - expected).abs() / bound).max()
    assert worst <= 1, f"{isa}: {worst} of the bound"


def test_the_measure_itself() -> None:
    """The neighbour of the right number is one step away, and the sweep says where."""
    for dtype in FORMATS:
        worst = Worst()
        one = torch.ones(2, dtype=dtype)
        worst.add(one, torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 1.0 + torch.finfo(dtype).eps], dtype=dtype))
        assert worst.error == 1.0
        assert worst.misrounded == 1
    worst = Worst()
    worst.add(torch.ones(1), torch.tensor([torch.nan], dtype=torch.float64), torch.ones(1))
    assert worst.error == torch.inf


def test_formula_holds_the_reference(row: Row) -> None:
    """`backward_formula` is the float64 kernel: here it is held against autograd through the reference."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.01
    for parameters in parameter_sets(row):
        saved = x if row.saves_input(*parameters) else row.reference(x, *parameters)
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(row.reference(leaf, *parameters), leaf, torch.full_like(x, 0.5))
        actual = backward_formula(row, torch.full_like(x, 0.5), saved, parameters)
        # 1 - y cancels near saturation: y is within 2^-53 of 1 - 2^-9 at x = 3 with the steepest slope here.
        torch.testing.assert_close(actual, expected, rtol=max(2.0**-38, REFERENCE_ERROR.get(row.name, 0)), atol=0)
