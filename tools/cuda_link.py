"""Links the whole extension, both halves, against a CUDA build of torch, and looks for every undefined symbol; needs no GPU.

Torch comes from PyPI into a temporary folder, without its dependencies (530 MB instead of several GB): enough to compile and
link against, not to import. So files are compiled here as setup.py has them compiled, with its flags.

    python tools/cuda_link.py [--torch torch==2.11.0] [--find-links FOLDER]

Compiler and CUDA runtime are those of the optional dependencies [cuda-check], or the machine's.
"""

from __future__ import annotations

import argparse
import os
import runpy
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
CHECK = runpy.run_path(str(ROOT / "tools" / "cuda_check.py"))
LIBRARIES = ["torch_python", "torch_cuda", "torch_cpu", "torch", "c10_cuda", "c10"]


def symbols(libraries: Iterable[Path], kind: str) -> set[str]:
    """Names without their versions: memcpy for memcpy@@GLIBC_2.14."""
    lines = CHECK["run"]("nm", "--dynamic", f"--{kind}-only", *libraries).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if len(line.split()) > 1}


def weak(library: Path) -> set[str]:
    """What may stay undefined."""
    lines = CHECK["run"]("nm", "--dynamic", "--undefined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.split()[0] == "w"}


def loaded_libraries(library: Path) -> list[Path]:
    """The C and C++ runtimes and the dynamic linker itself: what it finds on this machine."""
    words = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout.split()
    return [Path(word) for word in words if word.startswith("/")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch==2.11.0", help="default: %(default)s")
    parser.add_argument("--find-links", help="a folder with its wheel, instead of PyPI")
    arguments = parser.parse_args()
    nvcc = CHECK["tool"]("nvcc")
    if not nvcc:
        sys.exit("there is no nvcc: install CUDA 13, or `pip install '.[cuda-check]'`")
    cuda = Path(nvcc).parent.parent
    run = CHECK["run"]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = ["--no-index", "--find-links", arguments.find_links] if arguments.find_links else []
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *source, arguments.torch)
        torch = folder / "torch"
        includes = [
            torch / "include",
            torch / "include" / "torch" / "csrc" / "api" / "include",
            cuda / "include",
            pybind11.get_include(),
            sysconfig.get_paths()["include"],
        ]
        flags = [
            *(f"-I{path}" for path in includes),
            "-DFASTACT_CUDA=1",
            "-DTORCH_EXTENSION_NAME=_C",
            "-DTORCH_API_INCLUDE_EXTENSION_H",
        ]

        def compiled(path: str) -> Path:
            target = folder / (path.replace("/", "-") + ".o")
            if path.endswith(".cu"):
                architectures = SETUP["architecture_flags"](SETUP["CUDA_ARCHITECTURES"])
                run(nvcc, *SETUP["NVCC_FLAGS"], *architectures, *flags, "-c", ROOT / path, "-o", target)
            else:
                run(os.environ.get("CXX", "c++"), *SETUP["CXX_FLAGS"], *flags, "-fPIC", "-c", ROOT / path, "-o", target)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compiled, SETUP["sources"]("*/*.cpp") + SETUP["sources"]("cuda/*.cu")))
        extension = folder / "_C.so"
        runtime = next(iter(sorted([*cuda.glob("lib*/libcudart.so*"), *cuda.glob("targets/*/lib/libcudart.so*")])))
        libraries = [torch / "lib" / f"lib{name}.so" for name in LIBRARIES]
        # Torch's libraries need others that are not here; what the extension itself needs is looked for below.
        link = ["-shared", "-Wl,--allow-shlib-undefined", *objects, *libraries, runtime, "-o", extension]
        run(os.environ.get("CXX", "c++"), *link)

        python = [Path(sys.executable).resolve(), *Path(sysconfig.get_config_var("LIBDIR")).glob("libpython3*.so*")]
        providers = {
            # OpenMP's runtime comes with torch.
            "torch": symbols([*libraries, *(torch / "lib").glob("libgomp*")], "defined"),
            "the CUDA runtime": symbols([runtime], "defined"),
            "Python": symbols(python, "defined"),
            "the C and C++ runtimes": symbols(loaded_libraries(extension), "defined"),
        }
        missing = symbols([extension], "undefined") - weak(extension)
        total = len(missing)
        for name, provided in providers.items():
            print(f"{len(missing & provided):5} of {total} undefined symbols are provided by {name}")
            missing -= provided
        for symbol in sorted(missing):
            print(f"nobody provides {symbol}")
        if missing:
            sys.exit(1)
        print(f"the extension links against {arguments.torch} with nvcc {SETUP['nvcc_version'](Path(nvcc))}")


if __name__ == "__main__":
    main()
