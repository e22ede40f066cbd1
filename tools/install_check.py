"""Installs this checkout in every documented way, each into an environment of its own, and checks which torch it took.

    python tools/install_check.py        or: make install-check

The environments borrow the running one's torch through links, so nothing large is fetched. The way that has to fetch a torch,
because there is none, is checked up to the request for it by tests/test_packaging.py.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = Path(sysconfig.get_paths()["platlib"])
TRY = "import torch, fastact; assert fastact.sigmoid(torch.zeros(1)).item() == 0.5; print(fastact.__file__)"


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    made = subprocess.run([str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{made.stdout}")
    return made.stdout


def environment(folder: Path) -> Path:
    """A new virtual environment with the packages of the running one, but fastact and its build tools."""
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])").strip())
    for package in SITE.iterdir():
        left_out = package.name.startswith(("fastact", "__editable__", "pip", "setuptools", "ninja", "_distutils"))
        if not left_out and not (site / package.name).exists():
            (site / package.name).symlink_to(package)
    return python


def source(folder: Path) -> Path:
    """The tracked files of the checkout."""
    for name in run("git", "ls-files", "-z").split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def main() -> None:
    ways = {
        "pip install .": ["."],
        "pip install --editable .": ["--editable", "."],
        "pip install --no-build-isolation .": ["--no-build-isolation", "."],
    }
    with tempfile.TemporaryDirectory() as temporary:
        checkout = source(Path(temporary) / "checkout")
        for name, arguments in ways.items():
            # At the same place each time, so that the objects of the first build serve the others.
            python = environment(Path(temporary) / "environment")
            if "--no-build-isolation" in arguments:
                run(python, "-m", "pip", "install", "--quiet", "setuptools>=77", "ninja")
            start = time.perf_counter()
            log = run(python, "-m", "pip", "install", *arguments, cwd=checkout)
            if "Collecting torch" in log or "Downloading torch" in log:
                sys.exit(f"{name} fetched a torch:\n{log}")
            where = run(python, "-c", TRY, cwd=Path(temporary)).strip()
            print(
                f"{name}: {time.perf_counter() - start:.0f} s, {'in place' if str(checkout) in where else 'in site-packages'}"
            )


if __name__ == "__main__":
    main()
