"""The activations as modules. Each is its `torch.nn` twin with another forward, so `isinstance`, `repr`, `state_dict`, `deepcopy`
and pickle behave as before."""

from __future__ import annotations

from torch import Tensor, nn

from fastact import functional

__all__ = ["LeakyReLU", "ReLU", "ScaledSigmoid", "Sigmoid", "Softmax", "Tanh"]


class Sigmoid(nn.Sigmoid):
    """`fastact.sigmoid` as a module: the twin of `torch.nn.Sigmoid`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.sigmoid(input)


class ReLU(nn.ReLU):
    """`fastact.relu` as a module: the twin of `torch.nn.ReLU(inplace=False)`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu(input, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """`fastact.leaky_relu` as a module: the twin of `torch.nn.LeakyReLU(negative_slope=0.01, inplace=False)`. Shape: any."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.leaky_relu(input, self.negative_slope, self.inplace)


class Tanh(nn.Tanh):
    """`fastact.tanh` as a module: the twin of `torch.nn.Tanh`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.tanh(input)


class ScaledSigmoid(nn.Module):
    """`fastact.scaled_sigmoid` as a module: scale * sigmoid(slope * x). Shape: any; the output has the input's."""

    def __init__(self, scale: float = 1.0, slope: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.slope = slope

    def forward(self, input: Tensor) -> Tensor:
        return functional.scaled_sigmoid(input, self.scale, self.slope)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, slope={self.slope}"


class Softmax(nn.Softmax):
    """`fastact.softmax` as a module: the twin of `torch.nn.Softmax(dim=None)`. Shape: any; the output has the input's."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.softmax(input, self.dim)
