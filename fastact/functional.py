"""The activations as functions."""

from fastact import activations, channels
from fastact.activations import *  # noqa: F403
from fastact.channels import *  # noqa: F403

__all__ = [name for name in [*activations.__all__, *channels.__all__] if name.islower()]
