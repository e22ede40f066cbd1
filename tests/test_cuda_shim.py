"""The CUDA kernels, run on the CPU: their own source, compiled as plain C++ with each CUDA thread a fiber (tests/cuda_shim).

`python tests/test_cuda_shim.py` prints how many of the 65,536 numbers of each 16-bit type come out one step off.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
# The CPU's kernels, with which results are compared: as they are built, without sanitizers.
CPU_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-Wno-psabi"]
# Fibers are stacks of their own, which this option of the sanitizer does not know. The CPU's kernels for AVX-512 take tanh from
# a table, those for AVX2 have the arithmetic of a CUDA thread.
ENVIRONMENT = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0", "FASTACT_ISA": "avx2"}

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="fibers are switched in the assembly of x86-64"),
]


def build(folder: Path, program: str, *others: Path) -> Path:
    """`program` of tests/cuda_shim, linked with the other sources."""

    def compiled(source: Path) -> str:
        target = folder / f"{program}-{source.parent.name}-{source.stem}.o"
        flags = CPU_FLAGS if source.parent.name == "cpu" else FLAGS
        command = [os.environ.get("CXX", "c++"), "-x", "c++", *flags, "-c", source, "-o", target]
        made = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        assert made.returncode == 0, made.stderr
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*others, SHIM / f"{program}.cpp"]))
    target = folder / program
    link = [os.environ.get("CXX", "c++"), "-fsanitize=address,undefined", *objects, "-o", str(target)]
    made = subprocess.run(link, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return target


def build_driver(folder: Path) -> Path:
    return build(folder, "driver", *ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cpu/*.cpp"))


def run(program: Path, argument: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, argument], capture_output=True, text=True, timeout=600, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def selftest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("selftest"), "selftest")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


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
    """But for 4 of the 65,536 numbers in bfloat16 and 6 in float16, whichever way the hardware's instructions are off."""
    done = run(driver, "table")
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()]
    assert len(rows) == 6
    for _, dtype, *counts in rows:
        assert len(counts) == 5
        assert max(map(int, counts)) <= {"bfloat16": 4, "float16": 6}[dtype], done.stdout


if __name__ == "__main__":
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        sys.exit("a C++ compiler is needed")
    with tempfile.TemporaryDirectory() as folder:
        print("| | | -2 | -1 | 0 | 1 | 2 |\n| --- | --- | --- | --- | --- | --- | --- |")
        print(run(build_driver(Path(folder)), "table").stdout, end="")
