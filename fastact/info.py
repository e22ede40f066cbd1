"""What this build of fastact is and what it uses here: `python -m fastact.info`."""

from __future__ import annotations

import platform

import torch

import fastact


def main() -> None:
    rows = {"fastact": fastact.__version__, "torch in use": torch.__version__, "Python": platform.python_version()}
    info = fastact.build_info()
    if missing := info.pop("cuda_missing"):
        info["cuda"] = f"none: {missing}"
    for key, value in info.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        rows["torch built against" if key == "torch" else key.replace("_", " ")] = text or "none"
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    main()
