"""The activations as Python has them: a function each, and its module. csrc/activations.h has their mathematics.

The body of a function is its reference in plain torch: the definition that the tests measure against, and what is computed for
inputs that have no kernel (integers, complex numbers, sparse tensors, other devices ...). `@activation` makes the C function.

A module is its `torch.nn` twin with another forward, so `isinstance`, `repr`, `state_dict`, `deepcopy` and pickle behave as
before.

What holds for every function here:

- **dtypes** with kernels: float64, float32, bfloat16, float16; 16-bit types are computed in float32 and rounded once.
- **layouts**: any dense tensor (contiguous, channels_last, permuted) is processed where it lies, and the result has its
  strides; other layouts give the strides that torch gives.
- **errors of results**: as each function states, in ULP of float32 and float64, over all inputs. 16-bit results are correctly
  rounded, but for some of the 65,536 inputs, which are off by one step: docs/numerics.md has their numbers.
- **gradients**: reverse and forward mode, of any order; one tensor is saved, the output unless the function says otherwise.
  The backward is within 3 ULP of its formula on the saved tensor (silu's within 5 of the sum of the magnitudes of its terms,
  which cancel near -1.28); where a factor of that is subnormal, its last bit times the other factors comes on top.
- **exceptions**: `TypeError` where an argument is not of the kind named in the signature.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastact import _C
from fastact._registry import activation, checked_dim
from fastact.channels import channel_scaled_sigmoid

__all__ = [
    "ELU",
    "Hardsigmoid",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "ReLU",
    "ScaledSigmoid",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Tanh",
    "elu",
    "hardsigmoid",
    "leaky_relu",
    "log_sigmoid",
    "log_softmax",
    "relu",
    "scaled_sigmoid",
    "sigmoid",
    "silu",
    "softmax",
    "softplus",
    "tanh",
]


def _keep(module: nn.Module, **arguments: Any) -> None:
    """Sets the arguments that torch.nn's twin lacks, where they differ from the default in the class: a module made like its
    twin has its twin's attributes, and one that was pickled before there was such an argument still works."""
    for name, value in arguments.items():
        if value != getattr(type(module), name):
            setattr(module, name, value)


def _kept(module: nn.Module, *names: str) -> str:
    """Those arguments as `extra_repr` shows them."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in names if name in vars(module))


class _WithPreciseGrad(nn.Module):
    """What a module with `precise_grad` has besides its twin."""

    precise_grad = False

    def __init__(self, precise_grad: bool = False) -> None:
        super().__init__()
        _keep(self, precise_grad=precise_grad)

    def extra_repr(self) -> str:
        return _kept(self, "precise_grad")


@activation(ulp=2.0)
def sigmoid(x: Tensor, precise_grad: bool = False) -> Tensor:
    """1 / (1 + exp(-x)), elementwise: `torch.sigmoid`.

    Gradient: dy y (1 - y), at most dy / 4. Shape and dtype: those of x; integers give the default dtype.
    Error: at most {ulp} ULP over all inputs, with gradual underflow down to x = -103.97 in float32.
    With `precise_grad` the input is saved rather than the output, and the derivative is within 2 ULP of the true one.
    """
    return torch.sigmoid(x)


class Sigmoid(_WithPreciseGrad, nn.Sigmoid):
    """`fastact.sigmoid` as a module: the twin of `torch.nn.Sigmoid`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return sigmoid(input, self.precise_grad)


@activation(ulp=0.0)
def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """max(x, 0), elementwise: `torch.nn.functional.relu`.

    Gradient: dy where y > 0 or y is NaN, else 0. Shape and dtype: those of x. Error: none; -0.0 and NaN are kept.
    With `inplace` the result overwrites x.
    """
    return F.relu(x, inplace)


class ReLU(nn.ReLU):
    """`fastact.relu` as a module: the twin of `torch.nn.ReLU(inplace=False)`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)


@activation(ulp=0.5)
def leaky_relu(x: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """x where x > 0, else negative_slope * x, elementwise: `torch.nn.functional.leaky_relu`.

    Gradient: dy where x > 0, else negative_slope * dy. Saved: the output; for a negative slope the input, because the sign of
    the output then does not tell the branch. Shape and dtype: those of x. Error: at most {ulp} ULP.
    With `inplace` the result overwrites x; for a negative slope a copy of x is then saved.
    """
    return F.leaky_relu(x, negative_slope, inplace)


class LeakyReLU(nn.LeakyReLU):
    """`fastact.leaky_relu` as a module: the twin of `torch.nn.LeakyReLU(negative_slope=0.01, inplace=False)`. Shape: any."""

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


@activation(ulp=1.5)
def tanh(x: Tensor, precise_grad: bool = False) -> Tensor:
    """tanh(x), elementwise: `torch.tanh`.

    Gradient: dy (1 - y^2). Shape and dtype: those of x; integers give the default dtype.
    Error: at most {ulp} ULP over all inputs; odd bit for bit. `precise_grad`: as `sigmoid`'s.
    """
    return torch.tanh(x)


class Tanh(_WithPreciseGrad, nn.Tanh):
    """`fastact.tanh` as a module: the twin of `torch.nn.Tanh`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input, self.precise_grad)


@activation(ulp=2.5)
def scaled_sigmoid(x: Tensor, scale: float = 1.0, slope: float = 1.0, precise_grad: bool = False) -> Tensor:
    """scale * sigmoid(slope * x), elementwise, in one kernel. `scaled_sigmoid(x, -1)` is the negative sigmoid, -sigmoid(x).

    Gradient: dy slope y (1 - y / scale), at most dy scale slope / 4. A scale of 0 gives 0 with gradient 0.
    Shape and dtype: those of x; integers give the default dtype.
    Error: at most {ulp} ULP of scale * sigmoid(z), where z is slope * x rounded to the dtype
    that is computed in; where sigmoid(z) is subnormal (z < -87.3 in float32), also the scale times half its last bit.
    `precise_grad`: as `sigmoid`'s, with the derivative taken at z.
    """
    return scale * torch.sigmoid(slope * x)


class ScaledSigmoid(nn.Module):
    """`fastact.scaled_sigmoid` as a module: scale * sigmoid(slope * x). Shape: any; the output has the input's.

    With `learnable`, `scale` and `slope` are parameters of `num_parameters` elements that begin with the numbers given: one for
    all, or one per channel, as in `torch.nn.PReLU`. See `fastact.channel_scaled_sigmoid`, which takes its derivatives from the
    input, as `precise_grad` does. `device` and `dtype` are those of the parameters.
    """

    precise_grad = False
    learnable = False
    initial = (1.0, 1.0)
    scale: Any
    slope: Any

    def __init__(
        self,
        scale: float = 1.0,
        slope: float = 1.0,
        precise_grad: bool = False,
        learnable: bool = False,
        num_parameters: int = 1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.slope = slope
        _keep(self, precise_grad=precise_grad, learnable=learnable)
        if learnable:
            _keep(self, initial=(float(scale), float(slope)))
            self.scale, self.slope = (
                nn.Parameter(torch.empty(num_parameters, device=device, dtype=dtype)) for _ in self.initial
            )
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets parameters that are learned to the numbers that they began with."""
        if self.learnable:
            for parameter, number in zip((self.scale, self.slope), self.initial, strict=True):
                nn.init.constant_(parameter, number)

    def forward(self, input: Tensor) -> Tensor:
        if self.learnable:
            return channel_scaled_sigmoid(input, self.scale, self.slope)
        return scaled_sigmoid(input, self.scale, self.slope, self.precise_grad)

    def extra_repr(self) -> str:
        if self.learnable:
            return f"learnable=True, num_parameters={self.scale.numel()}"
        return ", ".join(filter(None, [f"scale={self.scale}, slope={self.slope}", _kept(self, "precise_grad")]))


@activation(ulp=2.0)
def elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """x where x > 0, else alpha * (exp(x) - 1), elementwise: `torch.nn.functional.elu`.

    Gradient: dy where x > 0, else dy alpha exp(x). Saved: the input. Shape and dtype: those of x.
    Error: at most {ulp} ULP over all inputs. With `inplace` the result overwrites x, and tells the gradient, as in torch:
    dy (y + alpha), which is 0 where y is rounded to -alpha; for a negative alpha a copy of x is saved.
    """
    return F.elu(x, alpha, inplace)


class ELU(nn.ELU):
    """`fastact.elu` as a module: the twin of `torch.nn.ELU(alpha=1.0, inplace=False)`. Shape: any."""

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


@activation(ulp=3.0)
def silu(x: Tensor, inplace: bool = False) -> Tensor:
    """x / (1 + exp(-x)), elementwise: `torch.nn.functional.silu`, also called swish.

    Gradient: dy s (1 + x (1 - s)) with s = sigmoid(x). Saved: the input. Shape and dtype: those of x.
    Error: at most {ulp} ULP over all inputs; -inf gives NaN, as in torch. With `inplace` the result overwrites x, and a copy of
    x is saved.
    """
    return F.silu(x, inplace)


class SiLU(nn.SiLU):
    """`fastact.silu` as a module: the twin of `torch.nn.SiLU(inplace=False)`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return silu(input, self.inplace)


@activation(ulp=3.0)
def softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """log(1 + exp(beta * x)) / beta, and x where beta * x > threshold, elementwise: `torch.nn.functional.softplus`.

    Gradient: dy sigmoid(beta x), and dy where beta x > threshold. Saved: the input. Shape and dtype: those of x.
    Error: at most {ulp} ULP, of what z = beta * x rounded to the dtype that is computed in gives.
    """
    return F.softplus(x, beta, threshold)


class Softplus(nn.Softplus):
    """`fastact.softplus` as a module: the twin of `torch.nn.Softplus(beta=1.0, threshold=20.0)`. Shape: any."""

    def forward(self, input: Tensor) -> Tensor:
        return softplus(input, self.beta, self.threshold)


@activation(ulp=3.0)
def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))), elementwise: `torch.nn.functional.logsigmoid`.

    Gradient: dy sigmoid(-x). Saved: the input. Shape and dtype: those of x. Error: at most {ulp} ULP over all inputs.
    """
    return F.logsigmoid(x)


class LogSigmoid(nn.LogSigmoid):
    """`fastact.log_sigmoid` as a module: the twin of `torch.nn.LogSigmoid`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return log_sigmoid(input)


@activation(ulp=1.5)
def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
    """(x + 3) / 6, but at least 0 and at most 1, elementwise: `torch.nn.functional.hardsigmoid`.

    Gradient: dy / 6 where -3 < x < 3, else 0. Saved: the input. Shape and dtype: those of x. Error: at most {ulp} ULP over all
    inputs. With `inplace` the result overwrites x, and a copy of x is saved.
    """
    return F.hardsigmoid(x, inplace)


class Hardsigmoid(nn.Hardsigmoid):
    """`fastact.hardsigmoid` as a module: the twin of `torch.nn.Hardsigmoid(inplace=False)`. Shape: any."""

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input, self.inplace)


@activation(ulp=None)
def softmax(
    x: Tensor,
    dim: int | None = None,
    dtype: torch.dtype | None = None,
    temperature: float | Tensor = 1.0,
    masked_rows: str = "nan",
) -> Tensor:
    """exp((x - m) / temperature) / sum(exp((x - m) / temperature)) along `dim`, with m the maximum:
    `torch.nn.functional.softmax` of x / temperature, in one kernel.

    Gradient: y (dy - sum(dy y)) / temperature. Shape: that of x; dtype: `dtype` if given, to which x is cast first, else that
    of x. A row that is all -inf, or holds NaN or +inf, is NaN; with `masked_rows="zero"`, one that is all -inf is 0, and so is
    its gradient. Terms below the smallest normal number count as 0. The sum does not depend on layout or threads. Without
    `dim`, torch's choice is made with torch's warning. Over a dimension of one element the result is always 1 and the gradient
    0: warns, once. `temperature` may be a tensor, to which gradients flow: the definition is then computed in plain torch.
    Error: in units of 2^-24 y in float32, 2^-53 y in float64, at most 8 for the arithmetic; one for every addition that an
    element meets, at most 22 in float32; and one, with a temperature three, for each 1 of distance from the maximum (of
    x / temperature), both of this element and on the average of the row, by weight. Raises `IndexError` for a dim out of range,
    `ValueError` for another `masked_rows`, and for a temperature that is no number from 2^-126 to 2^126.
    """
    _check_softmax(temperature, masked_rows)
    if isinstance(temperature, Tensor) or temperature != 1:
        x = _divided(x if dtype is None else x.to(dtype), temperature)
    if masked_rows == "nan":
        return F.softmax(x, dim, dtype=dtype)
    if dim is None:
        dim = checked_dim("softmax", None, x.dim())
    masked = (x == -math.inf).all(dim, keepdim=True)
    return F.softmax(x.masked_fill(masked, 0), dim, dtype=dtype).masked_fill(masked, 0)


def _check_softmax(temperature: float | Tensor, masked_rows: str) -> None:
    if masked_rows not in ("nan", "zero"):
        raise ValueError(f"softmax(): masked_rows must be 'nan' or 'zero', not {masked_rows!r}")
    if isinstance(temperature, Tensor):
        return
    if not isinstance(temperature, Real):
        raise TypeError(f"softmax(): argument 'temperature' (position 4) must be Number, not {type(temperature).__name__}")
    if not 2.0**-_C.TEMPERATURE_EXPONENT <= temperature <= 2.0**_C.TEMPERATURE_EXPONENT:
        limits = f"from 2^-{_C.TEMPERATURE_EXPONENT} to 2^{_C.TEMPERATURE_EXPONENT}"
        raise ValueError(f"softmax(): temperature must be a number {limits}, not {temperature}")


def _divided(x: Tensor, temperature: float | Tensor) -> Tensor:
    if not isinstance(temperature, Tensor):
        return x / temperature
    # What is masked stays out of the division: the gradient of the temperature would be 0 * inf.
    masked = x == -math.inf
    divided = (x.masked_fill(masked, 0) / temperature).masked_fill(masked, -math.inf)
    # A temperature of a wider dtype does not widen the result.
    return divided.to(x.dtype) if x.is_floating_point() and divided.is_floating_point() else divided


class Softmax(nn.Softmax):
    """`fastact.softmax` as a module: the twin of `torch.nn.Softmax(dim=None)`, with the temperature and what becomes of rows
    that are masked altogether. Shape: any; the output has the input's.

    The temperature is a number: one that is learned is a parameter of another module, which calls `fastact.softmax` with it.
    """

    temperature: float = 1.0
    masked_rows: str = "nan"

    def __init__(self, dim: int | None = None, temperature: float = 1.0, masked_rows: str = "nan") -> None:
        super().__init__(dim)
        if isinstance(temperature, Tensor):
            raise TypeError("Softmax(): temperature must be a number, not a tensor; fastact.softmax takes tensors")
        _check_softmax(temperature, masked_rows)
        _keep(self, temperature=temperature, masked_rows=masked_rows)

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim, None, self.temperature, self.masked_rows)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), _kept(self, "temperature", "masked_rows")]))


@activation(ulp=None)
def log_softmax(x: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x - m - log(sum(exp(x - m))) along `dim`, with m the maximum: `torch.nn.functional.log_softmax`.

    Gradient: dy - exp(y) sum(dy). Shape: that of x; dtype: `dtype` if given, to which x is cast first, else that of x.
    A row that is all -inf, or holds NaN or +inf, is NaN; -inf beside finite numbers stays -inf. The sum does not depend on
    layout or threads. Without `dim`, torch's choice is made with torch's warning. Over a dimension of one element the result is
    always 0 and the gradient 0: warns, once. Raises `IndexError` for a dim out of range.
    Error: in units of 2^-24 in float32, 2^-53 in float64, at most |y| + |x - m| for two roundings; 4 times the logarithm of the
    sum; 3, and one for every addition, as in softmax, for the sum; and one for each 1 of distance from the maximum on the
    average of the row, by weight: where y is near 0, that of a number near 1.
    """
    return F.log_softmax(x, dim, dtype=dtype)


class LogSoftmax(nn.LogSoftmax):
    """`fastact.log_softmax` as a module: the twin of `torch.nn.LogSoftmax(dim=None)`. Shape: any; that of the input."""

    def forward(self, input: Tensor) -> Tensor:
        return log_softmax(input, self.dim)
