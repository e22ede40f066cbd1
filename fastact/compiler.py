"""What becomes of fastact's activations under `torch.compile`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from fastact import _registry, _transforms

__all__ = ["opaque"]


@contextmanager
def _restored(before: set[str]) -> Iterator[None]:
    try:
        yield
    finally:
        _transforms.opaque.clear()
        _transforms.opaque.update(before)


def opaque(*names: str) -> AbstractContextManager[None]:
    """Keeps the kernels of these activations in what is compiled from now on: `fastact.compiler.opaque("softmax")`.

    By default `torch.compile` sees an activation as plain torch operators, which Inductor fuses with their neighbours. That is
    best for elementwise activations between other elementwise work. A kernel of its own is best where there is little to fuse
    and the kernel is much faster than the code that Inductor writes, such as a softmax over long rows: compare both.

    `names`: of functions (`"softmax"`, `"tanh"` ...); none for the default. `prelu`, `channel_scaled_sigmoid` and `maxout` are
    not among them: they are always seen as plain torch. What counts is the setting while a graph is traced, at its first call;
    graphs traced before stay as they are. As a context manager (`with fastact.compiler.opaque("softmax"): ...`) it puts back
    what was set before. Raises `ValueError` for another name.
    """
    unknown = set(names) - set(_registry.rows)
    if unknown:
        raise ValueError(f"opaque(): no activation is called {sorted(unknown)[0]!r}; there are {', '.join(_registry.rows)}")
    before = set(_transforms.opaque)
    _transforms.opaque.clear()
    _transforms.opaque.update(names)
    return _restored(before)
