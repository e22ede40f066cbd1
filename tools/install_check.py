"""Installs fastact in every documented way, each into an environment of its own, and checks which torch it took.

    python tools/install_check.py        or: make install-check

All start from the source archive, unpacked into a folder that is no git checkout. The environments borrow the running one's
torch, so nothing large is fetched. What would fetch one is checked by tests/test_packaging.py, up to the request for it: pip
where there is no torch, uv and `python -m build` with isolation.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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
        left_out = package.name.startswith(
            ("fastact", "__editable__", "pip", "setuptools", "ninja", "_distutils", "uv", "build")
        )
        if left_out or (site / package.name).exists():
            continue
        if package.suffix == ".dist-info":  # uv takes a link for nothing
            shutil.copytree(package, site / package.name)
        else:
            (site / package.name).symlink_to(package)
    return python


def source(folder: Path) -> Path:
    """The tracked files of the checkout; what is there and the same stays as it is."""
    for name in run("git", "ls-files", "-z").split("\0"):
        original, copy = ROOT / name, folder / name
        if original.is_file() and not (copy.exists() and copy.read_bytes() == original.read_bytes()):
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(original.read_bytes())
    return folder


def unpacked_archive(folder: Path, tools: Path) -> Path:
    """The source archive of the checkout, made where setuptools sees no git and no torch, and unpacked."""
    run(tools, "-m", "build", "--sdist", "--outdir", folder, source(folder / "checkout"))
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


# In this order the objects of one build serve the next: with isolation, then without, where the paths of the tools are others.
PIP, UV = ["-m", "pip", "install"], ["-m", "uv", "pip", "install"]
WAYS = {
    "pip install .": [*PIP, "."],
    "pip install -e .": [*PIP, "-e", "."],
    "pip install --no-build-isolation .": [*PIP, "--no-build-isolation", "."],
    "pip install --no-build-isolation -e .": [*PIP, "--no-build-isolation", "-e", "."],
    "uv pip install --no-build-isolation .": [*UV, "--no-build-isolation", "."],
    "uv pip install --no-build-isolation -e .": [*UV, "--no-build-isolation", "-e", "."],
    "python -m build --no-isolation --wheel; pip install dist/*.whl": ["-m", "build", "--no-isolation", "--wheel"],
}


def main() -> None:
    os.environ.pop("PYTHONPATH", None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        tools = environment(folder / "tools")
        run(tools, *PIP, "--quiet", "build")
        archive = unpacked_archive(folder, tools)
        for name, command in WAYS.items():
            # At the same place each time, and with the sources at the same place, so that objects are found again.
            python = environment(folder / "environment")
            if command not in ([*PIP, "."], [*PIP, "-e", "."]):
                run(python, *PIP, "--quiet", "setuptools>=77", "ninja", "uv", "build")
            start = time.perf_counter()
            log = run(python, *command, cwd=archive)
            if "build" in command:
                log += run(python, *PIP, *archive.glob("dist/*.whl"))
            if "Collecting torch" in log or "Downloading torch" in log or "+ torch" in log:
                sys.exit(f"{name} fetched a torch:\n{log}")
            where = run(python, "-c", TRY, cwd=folder).strip()
            in_place = "-e" in command
            if not where.startswith(str(archive if in_place else folder / "environment")):
                sys.exit(f"{name} has put it into {where}")
            print(f"{name}: {time.perf_counter() - start:.0f} s, {'in place' if in_place else 'in site-packages'}", flush=True)


if __name__ == "__main__":
    main()
