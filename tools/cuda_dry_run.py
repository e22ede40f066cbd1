"""Runs the tests for a GPU on a machine without one: with torch's CUDA build, on a stand-in for CUDA's runtime.

    python tools/cuda_dry_run.py                           or: make cuda-dry-run
    python tools/cuda_dry_run.py tests/test_cuda.py -k graph    what pytest is asked for instead
    python tools/cuda_dry_run.py --torch torch==2.13.0     another than the oldest supported

What is real: torch and all of its host code for CUDA (dispatch, allocator, streams, events, graphs, what it says of
synchronisations), fastact's Python and its host code. What is played (tests/cuda_stand_in): the device, its memory and its
streams; fastact's kernels run on the host, compiled with tests/cuda_shim; torch's are its CPU's. So nothing here is said about
what nvcc makes of a kernel, about the order of memory accesses, or about speed.

The environment, in .venv-dry-run, is made once (it fetches 0.7 GB), and the build there is kept.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from cuda_link import BUILD, OLDEST_TORCH, environment, undefined
from install_check import ROOT, run, source

FOLDER = ROOT / ".venv-dry-run"
STAND_IN = ROOT / "tests" / "cuda_stand_in"
PACKAGES = [*BUILD, "pytest", "pytest-xdist", "expecttest", "matplotlib"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter"]
UNSUPPORTED = 801  # cudaErrorNotSupported


def runtime_library(site: Path, folder: Path) -> Path:
    """Puts the stand-in in the place of CUDA's runtime. What torch takes from that and the stand-in lacks is not supported."""
    (library,) = site.glob("nvidia/cu*/lib/libcudart.so.*")
    compiler, compiled = os.environ.get("CXX", "c++"), folder / "runtime.o"
    include = library.parent.parent / "include"
    run(compiler, *FLAGS, f"-I{include}", "-c", STAND_IN / "runtime.cpp", "-o", compiled)
    version = f"@{library.name}"
    wanted = {
        symbol.removesuffix(version)
        for path in (site / "torch" / "lib").glob("*.so")
        for symbol in undefined(path)
        if symbol.endswith(version)
    }
    there = {line.split()[-1] for line in run("nm", "--defined-only", compiled).splitlines()}
    rest, script = folder / "rest.c", folder / "runtime.map"
    rest.write_text("\n".join(f"int {name}(void) {{ return {UNSUPPORTED}; }}" for name in sorted(wanted - there)))
    script.write_text(f"{library.name} {{ *; }};")
    run(os.environ.get("CC", "cc"), "-fPIC", "-fno-builtin", "-c", rest, "-o", folder / "rest.o")
    linking = ["-shared", f"-Wl,-soname,{library.name}", f"-Wl,--version-script={script}"]
    # First elsewhere, for it may be in use.
    run(compiler, *linking, compiled, folder / "rest.o", "-o", folder / library.name)
    (folder / library.name).replace(library)
    return library


def torch_ops(site: Path, folder: Path, runtime: Path) -> None:
    """Builds torch's ops for the stand-in, and has every `import torch` load them: as torch loads other makers' devices."""
    torch, library = site / "torch", folder / "torch_ops.so"
    includes = [torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include", runtime.parent.parent / "include"]
    libraries = [f"-L{torch / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-lc10_cuda", "-ltorch_cuda", runtime]
    compiler = os.environ.get("CXX", "c++")
    run(
        compiler,
        *FLAGS,
        "-shared",
        *(f"-isystem{path}" for path in includes),
        STAND_IN / "torch_ops.cpp",
        *libraries,
        "-o",
        library,
    )
    (site / "stand_in_device.py").write_text(
        "import torch\n\n\n"
        "def load():\n"
        f"    torch.ops.load_library({str(library)!r})\n"
        "    torch.backends.cudnn.enabled = False\n"
    )
    package = site / "stand_in_device-0.dist-info"
    package.mkdir(exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: stand-in-device\nVersion: 0\n")
    (package / "entry_points.txt").write_text("[torch.backends]\nstand_in = stand_in_device:load\n")


def toolkit(folder: Path, runtime: Path) -> Path:
    """What setup.py takes for CUDA's: a compiler for the host."""
    for name, target in {
        "bin/nvcc": STAND_IN / "nvcc",
        "include": runtime.parent.parent / "include",
        f"lib/{runtime.name}": runtime,
    }.items():
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch", default=OLDEST_TORCH, help=f"a requirement that pip finds with CUDA (default: {OLDEST_TORCH})"
    )
    parser.add_argument("--wheels", help="a folder of wheels to take before those of PyPI")
    arguments, of_pytest = parser.parse_known_args()

    folder = FOLDER / arguments.torch
    made, of_what = folder / "made", "\n".join([sys.version, *PACKAGES])
    start = time.perf_counter()
    if made.exists() and made.read_text() == of_what:
        python = folder / "environment" / "bin" / "python"
        site = Path(sysconfig.get_path("platlib", vars={"platbase": str(folder / "environment")}))
    else:
        shutil.rmtree(folder, ignore_errors=True)
        python, site = environment(folder / "environment", arguments.torch, arguments.wheels, PACKAGES)
        made.write_text(of_what)
    print(f"environment with {arguments.torch}: {time.perf_counter() - start:.0f} s", flush=True)
    if not (site / "torch" / "lib" / "libtorch_cuda.so").exists():
        sys.exit(f"{arguments.torch} has no CUDA where pip finds it")
    start = time.perf_counter()
    os.environ["STAND_IN_CUDA"] = run(python, "-c", "import torch; print(torch.version.cuda)").strip()
    runtime = runtime_library(site, folder)
    torch_ops(site, folder, runtime)
    tools = toolkit(folder / "toolkit", runtime)
    os.environ |= {"FASTACT_CUDA": "1", "CUDA_HOME": str(tools), "STAND_IN_TOOLKIT": str(tools)}
    checkout = source(folder / "checkout")
    for path in checkout.glob("tests/*.py"):
        if not (ROOT / path.relative_to(checkout)).exists():
            path.unlink()
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--editable", ".", cwd=checkout)
    print(f"build: {time.perf_counter() - start:.0f} s", flush=True)
    ran = subprocess.run([python, "tests/cuda_sanitize.py"], cwd=checkout)
    options = ["--device", "cuda", "-m", "not large", *(of_pytest or ["-n", "auto", "--dist", "loadfile"])]
    return ran.returncode or subprocess.run([python, "-m", "pytest", *options], cwd=checkout).returncode


if __name__ == "__main__":
    sys.exit(main())
