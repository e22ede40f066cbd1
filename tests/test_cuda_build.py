"""When the CUDA half is built, for which architectures, and what a build without it says. Needs neither CUDA nor a GPU."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastact
from fastact import _build, _built

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
WITHOUT_CUDA = pytest.mark.skipif(_built.CUDA is not None, reason="this build has CUDA")


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "wanted", "missing"),
    [
        ("13.0", "13.0", None, None),
        ("13.0", "13.2", "1", None),
        ("13.0", "13.0", "", None),
        ("13.0", "13.0", "0", "FASTACT_CUDA=0"),
        (None, "13.0", None, "the torch it was built against has no CUDA"),
        ("13.0", None, None, "there was no nvcc of CUDA 13"),
        ("13.0", "12.8", None, "nvcc was of CUDA 12.8, torch of CUDA 13.0"),
    ],
)
def test_when_the_cuda_half_is_built(torch_cuda: str | None, nvcc: str | None, wanted: str | None, missing: str | None) -> None:
    assert SETUP["cuda_missing"](torch_cuda, nvcc, wanted) == missing


@pytest.mark.parametrize(("torch_cuda", "nvcc"), [(None, "13.0"), ("13.0", None), ("13.0", "12.8")])
def test_a_wanted_cuda_half_that_cannot_be_built_ends_the_build(torch_cuda: str | None, nvcc: str | None) -> None:
    with pytest.raises(SystemExit, match="FASTACT_CUDA=1, but "):
        SETUP["cuda_missing"](torch_cuda, nvcc, "1")


def test_fastact_cuda_is_0_or_1() -> None:
    with pytest.raises(SystemExit, match="'yes'; it may be 0 or 1"):
        SETUP["cuda_missing"]("13.0", "13.0", "yes")


KNOWN = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]


@pytest.mark.parametrize(
    ("wanted", "architectures"),
    [
        (None, ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("", ["sm_80", "sm_90", "sm_100", "compute_100"]),
        ("9.0", ["sm_90"]),
        ("8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        (" 8.6 9.0a ", ["sm_86", "sm_90a"]),
        ("7.5;8.0", ["sm_80"]),
    ],
)
def test_architectures(wanted: str | None, architectures: list[str]) -> None:
    """In torch's spelling; what is older than the kernels is left out."""
    assert SETUP["gpu_architectures"](wanted, KNOWN) == architectures


def test_default_architectures_are_those_that_nvcc_knows() -> None:
    assert SETUP["gpu_architectures"](None, ["sm_80", "sm_90"]) == ["sm_80", "sm_90", "compute_90"]


@pytest.mark.parametrize(
    ("wanted", "message"), [("Hopper", "'Hopper' is not like 9.0"), ("7.5", "need 8.0 or more"), ("9", "'9' is not like")]
)
def test_architectures_that_make_no_sense(wanted: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        SETUP["gpu_architectures"](wanted, KNOWN)


def test_flags_are_those_torch_would_give(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a;10.0+PTX")
    ours = SETUP["nvcc_flags"](SETUP["gpu_architectures"]("8.0;9.0a;10.0+PTX", KNOWN))
    assert sorted(flag for flag in ours if "gencode" in flag) == sorted(_get_cuda_arch_flags())


def test_the_boundary_with_cuda_is_left_out_of_a_build_without() -> None:
    built = SETUP["extension"]().sources
    assert "csrc/torch/ops.cpp" in built
    assert SETUP["CUDA_BOUNDARY"] not in built
    assert (ROOT / SETUP["CUDA_BOUNDARY"]).exists()


def test_nvcc_version(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    assert SETUP["nvcc_version"](str(nvcc)) is None
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    assert SETUP["nvcc_version"](str(nvcc)) == "13.0"
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    assert SETUP["nvcc_version"](str(nvcc)) is None


def test_build_info_says_why_there_is_no_cuda() -> None:
    info = fastact.build_info()
    assert (info["cuda"] is None) == bool(info["cuda_missing"])
    assert bool(info["cuda_architectures"]) == (info["cuda"] is not None)


@pytest.mark.parametrize(("built", "installed"), [("13.0", None), ("13.0", "12.8")])
def test_a_torch_of_another_cuda_is_refused(built: str, installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_built, "CUDA", built)
    monkeypatch.setattr(torch.version, "cuda", installed)
    with pytest.raises(ImportError, match=rf"built with CUDA {built}, but torch .* is installed: run `pip install "):
        _build.check()


@WITHOUT_CUDA
def test_a_build_without_cuda_says_so_once() -> None:
    """Asked as a call with a CUDA tensor asks: such a tensor cannot be made here."""
    code = """if True:
        import warnings
        from fastact import _C
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [_C.device_has_kernels(device) for device in ("cpu", "meta", "cuda", "cuda:1", "xpu")] == [1, 1, 0, 0, 0]
        print(*(warning.message for warning in caught), sep="\\n")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "fastact was built without CUDA (fastact.build_info() says why), so CUDA tensors get torch's own operators. "
        "(This is said once.)"
    ]
