"""Processes and threads: forks, many Python threads, the interpreter lock, the floating-point mode, environment variables, a
torch that does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ISAS

import fastact
from fastact import _build, _registry


def python(code: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
    )


@pytest.mark.cpu_only("a process of its own, which computes there")
def test_call_in_a_forked_child_returns() -> None:
    """The child has none of the parent's OpenMP threads: torch's own ops wait for them for ever."""
    made = python(
        """
import os, torch, fastact
torch.set_num_threads(2)
x = torch.linspace(-4, 4, 1 << 20)
before = fastact.sigmoid(x), fastact.softmax(x.view(1024, 1024), 1)
child = os.fork()
if child == 0:
    after = fastact.sigmoid(x), fastact.softmax(x.view(1024, 1024), 1)
    # Compared by numpy: torch.equal would wait for those threads.
    os._exit(0 if all((a.numpy() == b.numpy()).all() for a, b in zip(after, before)) else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
assert torch.equal(fastact.sigmoid(x), before[0])
""",
        timeout=60,
    )
    assert made.returncode == 0, made.stderr


def test_python_threads_agree(any_row: _registry.Row) -> None:
    """16 threads x 1,000 calls, each bitwise what one call gave."""
    x = torch.linspace(-5, 5, 7 * 33).view(7, 33)
    extra = (1,) if any_row.name in _registry.along_dim else ()
    expected = any_row.function(x, *extra)
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(1000):
            if not torch.equal(any_row.function(x, *extra), expected):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.cpu_only("calls on a GPU return before the work is done")
def test_interpreter_lock_is_released_in_long_calls() -> None:
    """Another Python thread gets on while a large tensor is computed."""
    x = torch.linspace(-1, 1, 1 << 25)
    stop = threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    before = sys.getswitchinterval()
    worker = threading.Thread(target=tick)
    worker.start()
    try:
        sys.setswitchinterval(1000)  # so that only a released lock lets the other thread in
        for _ in range(4):
            fastact.softmax(x.view(64, -1), 1)
    finally:
        sys.setswitchinterval(before)
        stop.set()
        worker.join()
    assert ticks > 4


@pytest.mark.cpu_only("a process of its own, which computes there")
def test_import_leaves_the_floating_point_mode() -> None:
    """A library linked with fast-math turns gradual underflow off for the whole thread when it is loaded."""
    made = python(
        """
import torch, fastact
assert 1e-310 / 16 > 0
assert (torch.tensor(1e-38) / 16).item() > 0
"""
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.cpu_only("a process of its own, which computes there")
def test_flush_mode_of_the_user_is_kept() -> None:
    made = python(
        """
import torch, fastact
torch.set_flush_denormal(True)
fastact.sigmoid(torch.ones(9))
assert (torch.tensor(1e-38) / 16).item() == 0
"""
    )
    assert made.returncode == 0, made.stderr


@pytest.mark.cpu_only("the instruction sets of the CPU")
@pytest.mark.parametrize("level", [*ISAS, "amx", ""])
def test_environment_lowers_the_isa_and_never_raises_it(level: str) -> None:
    made = python("import fastact; print(fastact.build_info()['isa'])", FASTACT_ISA=level)
    assert made.stdout.strip() == (level if level in ISAS else ISAS[-1]), made.stderr


def test_another_torch_is_named_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions and the command, in one ImportError; a build of the same release for another device is fine."""
    from fastact import _built

    monkeypatch.setattr(torch, "__version__", "1.0.0+cu999")
    with pytest.raises(ImportError, match=r"1\.0\.0\+cu999.*pip install") as raised:
        _build.check()
    assert _built.TORCH in str(raised.value)
    monkeypatch.setattr(torch, "__version__", _build.release(_built.TORCH) + "+cu130")
    _build.check()


def test_another_cuda_is_named_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build for one CUDA under a torch for another, or for none: both have other libraries."""
    from fastact import _built

    monkeypatch.setattr(_built, "CUDA", "13.0")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    _build.check()
    for other in ("12.8", None):
        monkeypatch.setattr(torch.version, "cuda", other)
        with pytest.raises(ImportError, match=r"built with CUDA 13\.0.*pip install"):
            _build.check()


def test_source_folder_without_a_build_says_so(tmp_path: Path) -> None:
    (tmp_path / "fastact").mkdir()
    for name in ("__init__.py", "_build.py"):
        (tmp_path / "fastact" / name).write_text((Path(fastact.__file__).parent / name).read_text())
    # An editable install finds the missing module in the real folder.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import fastact"
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError: fastact is not built" in made.stderr


def test_info_program() -> None:
    made = subprocess.run([sys.executable, "-m", "fastact.info"], capture_output=True, text=True, check=True)
    for expected in ("torch built against", "isa levels", "baseline", ISAS[-1], "cuda"):
        assert expected in made.stdout
    assert not made.stderr


def test_build_info_keys() -> None:
    info = fastact.build_info()
    assert _build.release(info["torch"]) == _build.release(torch.__version__)
    assert info["isa"] in info["isa_levels"]
    assert info["threads"] == torch.get_num_threads()
    if info["cuda"] is None:
        assert info["cuda_architectures"] == []
        assert info["cuda_missing"]
    else:
        assert info["cuda_missing"] is None
        assert torch.version.cuda is not None, "a build for CUDA under a torch without it"
        assert info["cuda_architectures"]
