"""Activation functions for PyTorch as fused kernels: `fastact.Sigmoid` for `nn.Sigmoid`, `fastact.relu` for `F.relu` ..."""

from fastact._build import build_info, check

check()

from fastact import activations, autograd, channels, functional, memory, modules  # noqa: E402
from fastact.activations import *  # noqa: E402, F403
from fastact.channels import *  # noqa: E402, F403

__version__ = "0.1.0"
__all__ = ["autograd", "build_info", "functional", "memory", "modules", *activations.__all__, *channels.__all__]
