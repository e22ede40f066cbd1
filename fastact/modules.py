"""The activations as modules."""

from torch import nn

from fastact import activations, channels
from fastact.activations import *  # noqa: F403
from fastact.channels import *  # noqa: F403

__all__ = [name for name in [*activations.__all__, *channels.__all__] if not name.islower()]
# As isinstance takes them.
classes: tuple[type[nn.Module], ...] = tuple(globals()[name] for name in __all__)
