"""What pip asks of setup.py: torch only where there is none, and metadata without any."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
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


def hook(code: str, hidden: bool, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", (HIDE_TORCH if hidden else "") + "from setuptools import build_meta\n" + code],
        cwd=cwd,
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


@pytest.mark.parametrize(("hidden", "expected"), [(False, False), (True, True)], ids=["torch present", "torch absent"])
def test_torch_is_asked_for_only_where_there_is_none(source: Path, hidden: bool, expected: bool) -> None:
    made = hook("print(build_meta.get_requires_for_build_wheel())", hidden, source)
    assert made.returncode == 0, made.stderr
    assert ("torch" in made.stdout.splitlines()[-1]) is expected


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
