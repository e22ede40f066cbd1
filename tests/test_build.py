"""What the compiler made of the kernels: nothing leaks from the files of one instruction set, and every hot loop is SIMD."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ALONG_DIM, ELEMENTWISE, ISAS, KERNELS, ROOT, compile_kernels

import fastact
from fastact import _C

LEVELS = _C.build_info()["isa_levels"]
REGISTER = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
STORAGE = ["double", "float", "BFloat16", "Float16"]


@pytest.fixture(scope="session")
def unoptimised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kernels with every function that may be inlined standing alone."""
    return compile_kernels(tmp_path_factory.mktemp("unoptimised"), LEVELS, "-O0")


def run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def functions(disassembly: str) -> dict[str, list[str]]:
    """Instructions by demangled function name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in disassembly.splitlines():
        if match := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            # A cold part or a clone belongs to its function.
            name = re.sub(r" \[clone .*\]", "", match[1]).replace("(anonymous namespace)::", "")
            current = found.setdefault(name, [])
        elif match := re.match(r"^\s+[0-9a-f]+:\s+(\S.*)$", line):
            current.append(match[1])
    return found


def disassemble(path: Path) -> dict[str, list[str]]:
    return functions(run("objdump", "-d", "-C", "--no-show-raw-insn", path))


def test_tools() -> None:
    missing = [tool for tool in ("objdump", "nm") if not shutil.which(tool)]
    assert not missing, "these tests read object files: install binutils"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("objects", ["kernel_objects", "unoptimised"])
def test_no_weak_symbol(request: pytest.FixtureRequest, objects: str, level: str) -> None:
    """A weak symbol compiled for AVX-512 may be the copy the linker keeps for every file: a crash on older CPUs."""
    symbols = run("nm", "-C", request.getfixturevalue(objects)[level]).splitlines()
    # DW.ref is the compiler's pointer to the C++ runtime, the same in every file.
    weak = [line for line in symbols if re.search(r" [VWuvw] ", line) and "DW.ref." not in line]
    assert not weak, "\n".join(weak)


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_call_nothing(kernel_objects: dict[str, Path], level: str) -> None:
    """No libm, no STL: a call in a loop would also end its vectorisation."""
    undefined = {line.split()[-1] for line in run("nm", "-u", kernel_objects[level]).splitlines()}
    assert undefined <= {"memcpy", "memset", "__stack_chk_fail", "_GLOBAL_OFFSET_TABLE_"}


def test_no_wide_instruction_outside_its_file() -> None:
    """In the extension as built: AVX only in the functions of the namespaces that are named for it."""
    leaks = []
    beyond = {
        None: r".*%[yz]mm|.*%k[0-7]\b|v[a-z]",
        "avx2": r".*%zmm|.*%k[0-7]\b|.*%[xy]mm(1[6-9]|2\d|3[01])",
        "avx512": r"(?!)",
    }
    for name, instructions in disassemble(Path(_C.__file__)).items():
        home = next((level for level in ("avx2", "avx512") if f"fastact::{level}::" in name), None)
        leaks += [f"{name}: {line}" for line in instructions if re.match(beyond[home], line)]
    assert not leaks, "\n".join(leaks[:20])


@pytest.mark.parametrize("level", LEVELS)
def test_every_hot_loop_is_simd(kernel_objects: dict[str, Path], level: str) -> None:
    """Every kernel does its arithmetic on full registers, and none of it one number at a time."""
    code = disassemble(kernel_objects[level])
    scalar = re.compile(r"v?(add|sub|mul|div|max|min|fn?m(add|sub)\d+|sqrt|scalef)s[sd]\b")
    packed = re.compile(
        rf"v?(add|sub|mul|div|max|min|fn?madd\d+|scalef|and|or|blendm|blendv|cmp\w*|movap|movup|movdq\w*)\w*\s.*%{REGISTER[level]}"
    )
    for row in ELEMENTWISE:
        for direction in ("forward", "backward"):
            for storage in STORAGE:
                name = next(
                    (n for n in code if re.search(rf"::{direction}<fastact::{level}::{row.class_name}, (\S*::)?{storage}>", n)),
                    None,
                )
                assert name, f"no {direction} of {row.name} for {storage} on {level}"
                body = code[name]
                if same := re.match(r"jmp\s+[0-9a-f]+ <(.+)>", body[0]):  # the compiler found two functions to be one
                    body = code[same[1].replace("(anonymous namespace)::", "")]
                assert any(packed.match(line) for line in body), f"{name}: no packed arithmetic"
                alone = [re.match(r"v?([a-z]+?)\d*s[sd]\b", line)[1] for line in body if scalar.match(line)]
                # A functor may divide and multiply its parameters once each, before the loop.
                assert sorted(alone) in ([], ["div"], ["mul"], ["div", "mul"]), f"{name}: {alone}"


@pytest.mark.parametrize("level", LEVELS)
def test_channels_are_simd(kernel_objects: dict[str, Path], level: str) -> None:
    """Forward and gradients; what is scalar there adds up the lanes."""
    code = disassemble(kernel_objects[level])
    for row in re.findall(r"ROW\(\w+, (\w+)", (ROOT / "csrc" / "channels.h").read_text().split("#define")[1]):
        for storage in STORAGE:
            for kernel in ("forward", "gradients"):
                pattern = rf"::channel_{kernel}<fastact::{level}::{row}, (\S*::)?{storage}[,>]"
                lines = [line for name, body in code.items() if re.search(pattern, name) for line in body]
                packed = [line for line in lines if re.match(r"v?(mul|fmadd\d+)p[sd]\b", line) and REGISTER[level] in line]
                scalar = [line for line in lines if re.match(r"v?(mul|div|fn?madd\d+)s[sd]\b", line)]
                assert packed, f"{kernel} of {row} for {storage} on {level}"
                assert not scalar, f"{kernel} of {row} for {storage} on {level}: {scalar[:5]}"


@pytest.mark.parametrize("level", LEVELS)
def test_softmax_is_simd(kernel_objects: dict[str, Path], level: str) -> None:
    """Its rows end in a few scalars (the total, its inverse), so packed arithmetic must outnumber these, not replace them.

    Rows that lie in lanes are computed by functions that storage types share.
    """
    code = disassemble(kernel_objects[level])
    # Those of the rows, and what a row has besides for a temperature of 1.
    functors = {match[1] for name in code if (match := re.search(r"::(?:long_rows|softmax_forward)<\S*::(\w+), ", name))}
    assert functors >= {row.class_name for row in ALONG_DIM}
    for functor, kernel, storage in itertools.product(functors, ("long_rows", "short_rows", "columns"), STORAGE):
        lane = rf"Lanes<{'double' if storage == 'double' else 'float'}, \d+>"
        # Maxima and sums are those of all functors.
        shared = rf"|::Panel<.*{lane} >::(\w+\(|terms<\S*::{functor}>)" if kernel != "long_rows" else ""
        lines = [
            line
            for name, body in code.items()
            if re.search(rf"::({kernel}|softmax_forward)<\S*::{functor}, (\S*::)?{storage}>{shared}", name)
            for line in body
        ]
        packed = [
            line for line in lines if re.match(r"v?(add|sub|mul|div|max|fmadd\d+)p[sd]\b", line) and REGISTER[level] in line
        ]
        scalar = [line for line in lines if re.match(r"v?(mul|fn?madd\d+)s[sd]\b", line)]
        assert len(packed) > 20, f"{kernel}<{functor}, {storage}> on {level}: {len(packed)} packed instructions"
        assert not scalar, f"{kernel}<{functor}, {storage}> on {level}: {scalar[:5]}"


def test_kernel_files_name_no_torch() -> None:
    for path in [*ROOT.glob("csrc/*.h"), *KERNELS.iterdir()]:
        included = re.findall(r"#include\s*[<\"]((?:torch|ATen|c10)/[^>\"]*)", path.read_text())
        assert not included, f"{path.name} includes {included}"


def test_the_mathematics_compiles_for_cuda(tmp_path: Path) -> None:
    """The formulas are ready for a .cu file to include: nvcc where there is one, else its words as plain C++."""
    source = tmp_path / "formulas.cu"
    calls = "\n".join(f"    y[i] += fastact::generic::{row.class_name}<float>(p).forward(x[i]);" for row in ELEMENTWISE)
    source.write_text(
        '#include "activations.h"\n#include "softmax.h"\n#if !defined(__CUDACC__)\n#define __global__\n#endif\n'
        f"__global__ void kernel(const float* x, float* y, const double* p, int i) {{\n{calls}\n}}\n"
    )
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if Path(nvcc).exists():
        command = [nvcc, "-std=c++20", "-arch=sm_90", "-Werror", "all-warnings", "-c"]
    else:
        command = [os.environ.get("CXX", "c++"), "-x", "c++", "-std=c++20", "-Wall", "-Werror", "-c"]
    made = subprocess.run(
        [*command, "-I", str(ROOT / "csrc"), str(source), "-o", str(tmp_path / "o")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stdout + made.stderr


def test_constants_are_the_derived_ones() -> None:
    """The tables in the sources are what tools/coefficients.py prints."""
    printed = run("python", ROOT / "tools" / "coefficients.py")
    stated = "".join(path.read_text() for path in [ROOT / "csrc" / "lane.h", *KERNELS.glob("*.h")])
    literals = re.findall(r"-?0x1(?:\.[0-9a-f]+)?p[+-]?\d+f?", printed)
    assert len(literals) > 200
    missing = [literal for literal in literals if literal not in stated]
    assert not missing


def test_parallel_for_is_parallel(threads: None) -> None:
    """at::parallel_for is a plain loop in a file that is compiled without OpenMP."""
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert _C.parallel_threads() == count


def test_isa_levels() -> None:
    assert fastact.build_info()["isa"] == ISAS[-1]
    assert not _C.use_isa("no such level")
    assert fastact.build_info()["isa"] == ISAS[-1]
