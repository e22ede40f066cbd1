"""What this build is, and whether it belongs to the torch that is installed.

The extension uses torch's C++ classes, whose layout changes between versions: loading it under another one would end in a
message about an undefined symbol, or worse, in none.
"""

from __future__ import annotations

from typing import Any

import torch

COMMAND = "pip install --force-reinstall --no-deps --no-cache-dir ."


def release(version: str) -> str:
    """2.13.0 of 2.13.0+cpu: builds of one release for different devices share their C++ classes."""
    return version.partition("+")[0]


def major(version: str) -> str:
    return version.partition(".")[0]


def check() -> None:
    """Raises an ImportError that says what to run, where there is no build or it is for another torch."""
    try:
        from fastact._built import CUDA, TORCH
    except ImportError:
        raise ImportError(
            f"fastact is not built: run `{COMMAND}` in its source folder, or leave that folder if fastact is installed"
        ) from None
    if release(TORCH) != release(torch.__version__):
        raise ImportError(
            f"fastact was built for torch {TORCH}, but torch {torch.__version__} is installed: "
            f"run `{COMMAND}` in fastact's source folder"
        )
    if CUDA and major(CUDA) != major(torch.version.cuda or "none"):
        raise ImportError(
            f"fastact was built with CUDA {CUDA}, but torch {torch.__version__} is installed: "
            f"run `{COMMAND}` in fastact's source folder"
        )


def build_info() -> dict[str, Any]:
    """The build and what is in use, as a dict.

    `torch`: the version built against; `cuda`: the CUDA version built with, or None; `cuda_missing`: why there is none, or
    None; `cuda_architectures`: those built for, "sm_90" machine code and "compute_100" PTX; `isa_levels`: the instruction sets
    built, lowest first; `isa`: the one in use (the best this CPU has, or the lower one that the environment variable
    FASTACT_ISA names); `threads`: how many a large CPU tensor is shared among.
    """
    from fastact import _C, _built  # not before check() has been called

    return {
        "torch": _built.TORCH,
        "cuda": _built.CUDA,
        "cuda_missing": _built.CUDA_MISSING,
        "cuda_architectures": list(_built.CUDA_ARCHITECTURES),
        **_C.build_info(),
    }
