"""What pip asks of setup.py: torch only where there is none, and metadata without any."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HIDE_TORCH = """
import importlib.abc, sys, sysconfig
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Hidden())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "torch" else find_spec(name, package)
sysconfig.get_paths = lambda *a, **k: {"platlib": "/nowhere", "purelib": "/nowhere"}
"""


# How a program that builds is known, and what it is told where it hides torch.
PROGRAMS = {
    "pip": ({"PIP_BUILD_TRACKER": "/nowhere"}, "pip install --no-build-isolation ."),
    "uv": ({"UV": "uv"}, "uv pip install --no-build-isolation ."),
    "build": ({}, "python -m build --no-isolation"),
}


def hook(code: str, hidden: bool, cwd: Path, program: str = "pip") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PIP_BUILD_TRACKER", "UV")}
    return subprocess.run(
        [sys.executable, "-c", (HIDE_TORCH if hidden else "") + "from setuptools import build_meta\n" + code],
        cwd=cwd,
        env=environment | PROGRAMS[program][0],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files alone, so that the hooks write nothing into the checkout."""
    folder = tmp_path_factory.mktemp("source")
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


@pytest.mark.parametrize("hidden", [False, True], ids=["torch present", "torch absent"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_torch_is_asked_for_only_where_there_is_none(source: Path, program: str, hidden: bool) -> None:
    """And of pip alone, which shows setup.py the environment that is installed into: there may be another torch in it."""
    made = hook("print(build_meta.get_requires_for_build_wheel())", hidden, source, program)
    assert made.returncode == 0, made.stderr
    assert ("torch" in made.stdout.splitlines()[-1]) is (hidden and program == "pip")


@pytest.mark.parametrize("hook_name", ["build_wheel", "build_editable"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_build_that_sees_no_torch_says_what_to_run(source: Path, tmp_path: Path, program: str, hook_name: str) -> None:
    made = hook(f"build_meta.{hook_name}({str(tmp_path)!r})", True, source, program)
    assert made.returncode != 0
    assert PROGRAMS[program][1] in made.stderr
    assert "Traceback" not in made.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_uv_is_told_to_put_the_torch_in_use_beside_the_build(source: Path) -> None:
    """And what a build depends on: uv would else take an earlier one after an edit of a kernel."""
    settings = tomllib.loads((source / "pyproject.toml").read_text())["tool"]["uv"]
    assert settings["extra-build-dependencies"] == {"fastact": [{"requirement": "torch", "match-runtime": True}]}
    matched = {path for key in settings["cache-keys"] for path in source.glob(key["file"])}
    built_from = {path for path in (source / "csrc").rglob("*") if path.is_file()} | set((source / "fastact").rglob("*.py"))
    assert built_from | {source / "setup.py", source / "pyproject.toml"} <= matched


def test_the_outer_torch_is_found_from_an_isolated_environment(source: Path, tmp_path: Path) -> None:
    """As under pip's isolation: this interpreter, with its site-packages taken off the path and the build tools elsewhere."""
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(Path(importlib.util.find_spec(name).submodule_search_locations[0]))
    code = f"""
import runpy, sys, sysconfig
sys.path = [folder for folder in sys.path if "site-packages" not in folder] + [{str(tmp_path)!r}]
found = runpy.run_path("setup.py", run_name="probe")
assert found["torch_found"]()
import torch
assert sys.path[-1] == sysconfig.get_paths()["platlib"]
"""
    made = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def test_sdist_needs_no_torch_and_holds_the_sources(source: Path, tmp_path: Path) -> None:
    made = hook(f"print(build_meta.build_sdist({str(tmp_path)!r}))", True, source)
    assert made.returncode == 0, made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    tracked = {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")}
    assert tracked <= names, tracked - names
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "fastact/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_metadata_needs_no_torch(source: Path, tmp_path: Path) -> None:
    made = hook(f"print(build_meta.prepare_metadata_for_build_wheel({str(tmp_path)!r}))", True, source)
    assert made.returncode == 0, made.stderr
    metadata = next(tmp_path.glob("*.dist-info/METADATA")).read_text()
    assert "Requires-Dist: torch>=" in metadata
    requires = (source / "pyproject.toml").read_text().split("requires = [", 1)[1].split("]", 1)[0]
    assert "torch" not in requires
