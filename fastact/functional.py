"""The activations as functions."""

from fastact import _registry, activations, channels
from fastact.activations import *  # noqa: F403
from fastact.channels import *  # noqa: F403

__all__ = [name for name in [*activations.__all__, *channels.__all__] if name in _registry.rows or name in channels.functions]
