"""Activation functions for PyTorch as fused kernels: `fastact.Sigmoid` for `nn.Sigmoid`, `fastact.relu` for `F.relu` ..."""

from fastact._build import build_info, check

check()

from fastact import (  # noqa: E402
    _transforms,
    activations,
    autograd,
    channels,
    compiler,
    functional,
    memory,
    modules,
    sight,
    swap,
)
from fastact.activations import *  # noqa: E402, F403
from fastact.channels import *  # noqa: E402, F403
from fastact.sight import gradient_images, monitor  # noqa: E402
from fastact.swap import functional_patch, patch, unpatch  # noqa: E402

_transforms.register_all()

__version__ = "0.1.0"
__all__ = [
    "autograd",
    "build_info",
    "compiler",
    "functional",
    "functional_patch",
    "gradient_images",
    "memory",
    "modules",
    "monitor",
    "patch",
    "sight",
    "swap",
    "unpatch",
    *activations.__all__,
    *channels.__all__,
]
