"""The activations as modules."""

from fastact import _registry, activations
from fastact.activations import *  # noqa: F403

__all__ = [name for name in activations.__all__ if name not in _registry.rows]
