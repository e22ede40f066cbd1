"""Builds fastact for each pair of Python and torch that can be had here, and writes what its tests said to docs/matrix.md.

    python tools/matrix.py                                    or: make matrix
    python tools/matrix.py --python 3.12 --torch 2.12 2.13    these alone; the other lines of the table stay
    python tools/matrix.py --wheels FOLDER                    takes the wheels that are there from FOLDER

Then `python tools/readme.py` takes the table into the README.

A pair takes an environment of its own, half a gigabyte to fetch, and some minutes. A torch with CUDA is taken without CUDA's
libraries, as tools/cuda_link.py does; what is built is the CPU half.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_link import environment
from install_check import ROOT, run, source

PYTHONS = ["3.11", "3.12", "3.13"]
TORCHES = ["2.11", "2.12", "2.13", "2.14", "2.15"]
# What asks torch or the interpreter for something; kernels and accuracy do not.
TESTS = ["autograd", "registration", "func", "compile", "expectations", "swap", "bad_calls", "owned_gradient", "channels"]
TESTS += ["special_values", "softmax", "layouts", "maxout", "sight"]
BUILD = ["--no-build-isolation", "--no-deps", "--editable", "."]
PAGE = ROOT / "docs" / "matrix.md"
LOGS = ROOT / "build" / "matrix"
HEAD = """# Python and torch

What `make matrix` found: for each pair an environment, a build, and {tests}.
CPU builds. `n/a` says why a pair could not be tried there.

| Python | torch | outcome | machine | date |
| --- | --- | --- | --- | --- |
"""


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: on the path, or pyenv's, whose commands on the path may refuse."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for candidate in [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"), reverse=True)]:
        if candidate and not subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode:
            return str(candidate)
    return None


def machine() -> str:
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return f"{len(names)} CPUs {names[0]}" if names else f"{os.cpu_count()} CPUs"


def outcome(python: str, torch: str, wheels: str | None, checkout: Path, folder: Path) -> tuple[str, str, str]:
    """The versions that were had, and what came of them."""
    found = interpreter(python)
    if not found:
        return python, torch, f"n/a: no Python {python} here"
    group = ["--group", f"{ROOT / 'pyproject.toml'}:matrix"]
    try:
        with_torch, site = environment(folder, f"torch=={torch}.*", wheels, group, found)
    except SystemExit as failure:
        log(f"{python}-{torch}", str(failure))
        missing = "No matching distribution found" in str(failure)
        return python, torch, "n/a: pip finds no such torch for it" if missing else "n/a: cannot be installed here"
    python = run(with_torch, "-c", "import platform; print(platform.python_version())").strip()
    torch = next(site.glob("torch-*.dist-info")).name.removesuffix(".dist-info").partition("-")[2]
    try:
        log(f"{python}-{torch}-build", run(with_torch, "-m", "pip", "install", "-v", *BUILD, cwd=checkout))
    except SystemExit as failure:
        log(f"{python}-{torch}-build", str(failure))
        return python, torch, "does not build"
    tests = [f"tests/test_{name}.py" for name in TESTS]
    command = [with_torch, "-m", "pytest", "-n", "auto", "--dist", "loadfile", *tests]
    made = subprocess.run(command, cwd=checkout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log(f"{python}-{torch}-tests", made.stdout)
    counts = re.findall(r"\d+ (?:failed|passed|skipped|errors?)\b", made.stdout.rstrip().rpartition("\n")[2])
    return python, torch, ", ".join(counts) or "tests do not start"


def log(name: str, text: str) -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / f"{name}.log").write_text(text)


def lines() -> dict[tuple[str, str], str]:
    """The lines of the table as it stands, by minor versions."""
    if not PAGE.exists():
        return {}
    rows = re.findall(r"^\| (3\.\d+)\S* \| (\d+\.\d+)\S* \| .+$", PAGE.read_text(), re.M)
    return dict(zip(rows, re.findall(r"^\| 3\..+$", PAGE.read_text(), re.M), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="VERSION")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="VERSION")
    parser.add_argument("--wheels", help="a folder of wheels to take before those of PyPI")
    arguments = parser.parse_args()
    os.environ |= {"FASTACT_CUDA": "0"}
    os.environ.pop("PYTHONPATH", None)
    bad = []
    head = HEAD.format(tests=", ".join(f"`test_{name}.py`" for name in TESTS))
    with tempfile.TemporaryDirectory() as temporary:
        checkout = source(Path(temporary) / "checkout")
        for torch in arguments.torch:
            for python in arguments.python:
                folder = Path(temporary) / "environment"
                line = outcome(python, torch, arguments.wheels, checkout, folder)
                shutil.rmtree(folder, ignore_errors=True)
                table = lines() | {(python, torch): f"| {' | '.join(line)} | {machine()} | {datetime.date.today()} |"}
                print(table[python, torch], flush=True)
                if not re.fullmatch(r"n/a: .+|\d+ passed", line[2]):
                    bad.append(f"Python {python}, torch {torch}: {line[2]}; {LOGS}")
                # After each, so that an end in the middle loses nothing.
                rows = sorted(table, key=lambda pair: [int(part) for part in ".".join(pair).split(".")])
                PAGE.write_text(head + "\n".join(table[pair] for pair in rows) + "\n")
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
