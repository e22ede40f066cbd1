"""What this build of fastact is and what it uses here: `python -m fastact.info`."""

from __future__ import annotations

from typing import Any

from fastact import _C


def build_info() -> dict[str, Any]:
    """The build and what is in use, as a dict.

    `torch`: the version built against; `cuda`: the CUDA version built with, or None; `cuda_architectures`: those built for;
    `isa_levels`: the instruction sets built, lowest first; `isa`: the one in use (the best this CPU has, or the lower one
    that the environment variable FASTACT_ISA names); `threads`: how many a large CPU tensor is shared among.
    """
    info: dict[str, Any] = _C.build_info()
    return info


def main() -> None:
    import platform

    import torch

    import fastact

    rows = {"fastact": fastact.__version__, "torch in use": torch.__version__, "Python": platform.python_version()}
    for key, value in build_info().items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        rows["torch built against" if key == "torch" else key.replace("_", " ")] = text or "none"
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    main()
