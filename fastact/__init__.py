"""Activation functions for PyTorch as fused kernels: `fastact.Sigmoid` for `nn.Sigmoid`, `fastact.sigmoid` for `torch.sigmoid`."""

from fastact import _version_check

_version_check.check()

from fastact import autograd, functional  # noqa: E402
from fastact.functional import *  # noqa: E402, F403
from fastact.info import build_info  # noqa: E402
from fastact.modules import *  # noqa: E402, F403

__version__ = "0.1.0"
__all__ = ["autograd", "build_info", "functional", *functional.__all__, *modules.__all__]  # noqa: F405
