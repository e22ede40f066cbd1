"""Builds the extension `fastact._C`. Knows no activation: sources are found by glob, rows are in csrc/activations.h.

Torch is not a build requirement in pyproject.toml, because pip would then fetch a second one into its isolated build
environment. The torch of the environment that is installed into is found instead; only where there is none is one asked for.

The CUDA half is built where that torch has CUDA and there is an nvcc of the same major version. Environment variables:
FASTACT_CUDA=0 leaves it out, FASTACT_CUDA=1 fails without it; TORCH_CUDA_ARCH_LIST and MAX_JOBS are torch's.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
TORCH_REQUIREMENT = "torch>=2.11"

# No fast-math of any kind: NaN, infinities and signed zeros are part of what is promised. Contraction is off because formulas
# say themselves where a fused multiply-add belongs, and results must not depend on where the compiler sees one.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden"]
# OpenMP's runtime is torch's own: compiled for it, not linked to a second one.
CXX_FLAGS += ["-fopenmp", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
CXX_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
NVCC_FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden"]
# In torch's spelling. PTX of the last serves what comes after it.
CUDA_ARCHITECTURES = "8.0;9.0;10.0+PTX"
CUDA_BOUNDARY = "csrc/torch/cuda.cpp"


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def cuda_missing(torch_cuda: str | None, nvcc: str | None, wanted: str | None) -> str | None:
    """Why the CUDA half is not built, in a few words; None where it is. Arguments: the CUDA versions of torch and of nvcc, and
    the value of FASTACT_CUDA. Ends the program where it is wanted but cannot be had.
    """
    if wanted not in (None, "", "0", "1"):
        raise SystemExit(f"FASTACT_CUDA is {wanted!r}; it may be 0 or 1")
    if wanted == "0":
        return "FASTACT_CUDA=0"
    reason = None
    if torch_cuda is None:
        reason = "the torch it was built against has no CUDA"
    elif nvcc is None:
        reason = f"there was no nvcc of CUDA {torch_cuda.partition('.')[0]}"
    elif nvcc.partition(".")[0] != torch_cuda.partition(".")[0]:
        reason = f"nvcc was of CUDA {nvcc}, torch of CUDA {torch_cuda}"
    if reason and wanted == "1":
        raise SystemExit(f"FASTACT_CUDA=1, but {reason}")
    return reason


def nvcc_version(nvcc: Path) -> str | None:
    """ "13.0"; None where it does not run."""
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+\.\d+)", text)
    return release[1] if release else None


def architecture_flags(architectures: str) -> list[str]:
    """nvcc's flags for a list in torch's spelling: "8.0;9.0+PTX"."""
    flags = []
    for entry in re.split(r"[;\s]+", architectures.strip()):
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def torch_found() -> bool:
    """Whether torch can be imported, after a look into the environment outside pip's isolated one.

    Pip runs this file with the target environment's own interpreter, and only hides its packages: their folder is still what
    sysconfig names. It goes last on the path, so that everything else comes from the isolated environment.
    """
    if importlib.util.find_spec("torch"):
        return True
    for folder in {sysconfig.get_paths()["platlib"], sysconfig.get_paths()["purelib"]}:
        if (Path(folder) / "torch" / "__init__.py").exists():
            sys.path.append(folder)
            return True
    return False


def build_ext_class() -> type:
    """BuildExtension, imported late, so that metadata and sdist need no torch."""
    import torch
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    nvcc = nvcc_version(Path(home) / "bin" / "nvcc") if home else None
    missing = cuda_missing(torch.version.cuda, nvcc, os.environ.get("FASTACT_CUDA"))
    device = "cpu" if missing else "cuda"
    # What torch's builder reads: it makes the same flags of it.
    architectures = [] if missing else architecture_flags(os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES))

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects stay where the next build finds them, so that an edit costs the time of one file: editable builds would
            # put them into a temporary folder.
            self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}-{device}")

        def run(self) -> None:
            for extension in self.extensions:
                extension.include_dirs += cpp_extension.include_paths(device)
                extension.library_dirs += cpp_extension.library_paths(device)
                extension.libraries += ["c10", "torch", "torch_cpu", "torch_python"]
                extension.language = "c++"
                if not missing:
                    extension.sources += [*sources("cuda/*.cu"), CUDA_BOUNDARY]
                    extension.libraries += ["c10_cuda", "torch_cuda", "cudart"]
                    extension.define_macros.append(("FASTACT_CUDA", "1"))
                    extension.extra_compile_args = {"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS}
            print(f"fastact: without CUDA: {missing}" if missing else f"fastact: with CUDA {nvcc}", flush=True)
            super().run()
            package = (ROOT if self.inplace else Path(self.build_lib)) / "fastact"
            package.mkdir(parents=True, exist_ok=True)
            (package / "_built.py").write_text(
                '"""Written by setup.py: what the extension was built against."""\n\n'
                f"TORCH = {str(torch.__version__)!r}\n"
                f"CUDA = {None if missing else nvcc!r}\n"
                f"CUDA_ARCHITECTURES: list[str] = {[flag.rpartition('code=')[2] for flag in architectures]!r}\n"
                f"CUDA_MISSING = {missing!r}\n"
            )

    return Build


def extension() -> Extension:
    cpu_sources = [source for source in sources("*/*.cpp") if source != CUDA_BOUNDARY]
    return Extension(
        "fastact._C",
        cpu_sources,
        depends=sources("**/*.h"),
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-Wl,-z,relro,-z,now"],
    )


BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"}


def main() -> None:
    if torch_found():
        requirements = []
        command_classes = {"build_ext": build_ext_class()} if BUILD_COMMANDS & set(sys.argv) else {}
    else:
        requirements = [TORCH_REQUIREMENT]
        command_classes = {}
    os.chdir(ROOT)
    setup(ext_modules=[extension()], cmdclass=command_classes, setup_requires=requirements)


if __name__ == "__main__":
    main()
