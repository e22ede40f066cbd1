"""The CUDA kernels, run on the CPU: their own source, compiled as plain C++ with each CUDA thread a fiber (tests/cuda_shim).

`python tests/test_cuda_shim.py` prints how many of the 65,536 numbers of each 16-bit type come out one step off.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import KERNELS, ROOT, compile_kernels

from fastact._registry import elementwise

SHIM = ROOT / "tests" / "cuda_shim"
# Every overrun and every misaligned access is an error; fused multiply-adds only where formulas say so, as on the GPU.
FLAGS = [
    *(
        "-std=c++20",
        "-O1",
        "-g1",
        "-mfma",
        "-mf16c",
        "-ffp-contract=off",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", f"-I{ROOT / 'csrc'}", f"-I{SHIM}"),
]
# Fibers are stacks of their own, which this option of the sanitizer does not know. The CPU's kernels for AVX-512 take tanh from
# a table, those for AVX2 have the arithmetic of a CUDA thread.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0", "FASTACT_ISA": "avx2"}

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="fibers are switched in the assembly of x86-64"),
]


def build(folder: Path, program: str, sources: Iterable[Path] = (), objects: Iterable[Path] = ()) -> Path:
    """`program` of tests/cuda_shim, linked with the other sources, and with objects that no sanitizer watches."""

    def compiled(source: Path) -> Path:
        target = folder / f"{program}-{source.stem}.o"
        command = [os.environ.get("CXX", "c++"), "-x", "c++", *FLAGS, "-c", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(compiled, [*sources, SHIM / f"{program}.cpp"]))
    target = folder / program
    link = [os.environ.get("CXX", "c++"), "-fsanitize=address,undefined", *made, *objects, "-o", target]
    linked = subprocess.run(link, capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    return target


def build_driver(folder: Path, kernel_objects: Iterable[Path]) -> Path:
    """With the CPU's kernels as they are built, since results are compared with theirs."""
    return build(folder, "driver", ROOT.glob("csrc/cuda/*.cu"), kernel_objects)


def run(program: Path, argument: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, argument], capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("selftest"), "selftest")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, kernel_objects: dict[str, Path]) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"), kernel_objects.values())


@pytest.mark.parametrize("kernel", ["sound", "sound cluster"])
def test_sound_kernels_pass(selftest: Path, kernel: str) -> None:
    done = run(selftest, kernel)
    assert done.returncode == 0, done.stderr


FAULTS = {
    "first barrier": "wrong result",
    "second barrier": "wrong result",
    "first cluster barrier": "wrong result",
    "last cluster barrier": "asks for a block that has ended",
    "block barriers for a cluster": "wrong result",
    "order of blocks": "wrong result",
    "read out of bounds": "heap-buffer-overflow",
    "shared overrun": "heap-buffer-overflow",
    "no shared memory": "Sanitizer",
    "unwritten shared memory": "wrong result",
    "divergent barrier": "waits at a barrier that not all threads reach",
    "divergent shuffle": "waits at a barrier that not all threads reach",
    "part of a warp": "shuffles with a part of a warp",
    "block outside the cluster": "asks for a block that is not in its cluster",
    "misaligned access": "misaligned address",
    "too many threads": "launch refused",
    "too much shared memory": "launch refused",
    "uneven clusters": "launch refused",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(selftest: Path, fault: str) -> None:
    done = run(selftest, fault)
    assert done.returncode != 0
    assert FAULTS[fault] in done.stderr


DTYPES = ["float64", "float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def runs(driver: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """Of the driver, by dtype: two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(DTYPES, pool.map(lambda dtype: run(driver, dtype), DTYPES), strict=True))


@pytest.mark.parametrize("numbers", DTYPES)
def test_kernels(runs: dict[str, subprocess.CompletedProcess[str]], numbers: str) -> None:
    """Every row, forward and backward: right, without an overrun, and the same under every schedule."""
    done = runs[numbers]
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    print(done.stdout)


def test_16_bit_results_are_correctly_rounded(driver: Path) -> None:
    """But for 4 of the 65,536 numbers in bfloat16 and 6 in float16, whichever way the hardware's instructions are off.
    SiLU halves the smallest normal numbers: of the 128 odd ones, half may take the wrong side of a middle.
    """
    done = run(driver, "table")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    exponential = set(elementwise) - {"relu", "leaky_relu", "hardsigmoid"}
    assert sorted((name, dtype) for name, dtype, *_ in rows) == sorted(itertools.product(exponential, ("bfloat16", "float16")))
    for name, dtype, *counts in rows:
        assert len(counts) == 5
        halves = 64 if (name, dtype) == ("silu", "bfloat16") else 0
        assert max(map(int, counts)) <= {"bfloat16": 4, "float16": 6}[dtype] + halves, done.stdout


if __name__ == "__main__":
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        sys.exit("a C++ compiler is needed")
    with tempfile.TemporaryDirectory() as folder:
        kernels = compile_kernels(Path(folder), [path.stem for path in KERNELS.glob("*.cpp")])
        print("| | | -2 | -1 | 0 | 1 | 2 |\n| --- | --- | --- | --- | --- | --- | --- |")
        print(run(build_driver(Path(folder), kernels.values()), "table").stdout, end="")
