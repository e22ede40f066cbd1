"""Says in one sentence what is wrong when the extension and the installed torch do not belong together.

The extension uses torch's C++ classes, whose layout changes between versions: loading it under another one would end in a
message about an undefined symbol, or worse, in none.
"""

from __future__ import annotations

import torch

COMMAND = "pip install --force-reinstall --no-deps --no-cache-dir ."


def release(version: str) -> str:
    """2.13.0 of 2.13.0+cpu: builds of one release for different devices share their C++ classes."""
    return version.partition("+")[0]


def check() -> None:
    try:
        from fastact._built import TORCH
    except ImportError:
        raise ImportError(
            f"fastact is not built: run `{COMMAND}` in its source folder, or leave that folder if fastact is installed"
        ) from None
    if release(TORCH) != release(torch.__version__):
        raise ImportError(
            f"fastact was built for torch {TORCH}, but torch {torch.__version__} is installed: "
            f"run `{COMMAND}` in fastact's source folder"
        )
