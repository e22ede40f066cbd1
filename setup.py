"""Builds the extension `fastact._C`. Knows no activation: sources are found by glob, rows are in csrc/activations.h.

Torch is not a build requirement in pyproject.toml, because pip would then fetch a second one into its isolated build
environment. The torch of the environment that is installed into is found instead; only where there is none is pip asked for
one. Other programs (python -m build) hide that environment altogether: they are told to build without isolation, rather than
handed another torch than the one the result will meet. pyproject.toml tells uv to put the right one beside the build.

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
# The generations of data centre GPUs; others run one of these, or make their own of the PTX of the last.
DEFAULT_GPUS = ["8.0", "9.0", "10.0"]
OLDEST_GPU = (8, 0)
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


def output(*command: str) -> str:
    """What a program prints; nothing where there is none."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def nvcc_version(nvcc: str) -> str | None:
    """ "13.0"; None where it does not run."""
    release = re.search(r"release (\d+\.\d+)", output(nvcc, "--version"))
    return release[1] if release else None


def gpu_architectures(wanted: str | None, known: list[str]) -> list[str]:
    """What to compile for, such as ["sm_90", "compute_90"]: code for a GPU, and PTX for later ones.

    `wanted`: TORCH_CUDA_ARCH_LIST, as in "8.0;9.0+PTX"; `known`: the "sm_90" of all that nvcc can compile for.
    """
    if wanted:
        gpus = re.split(r"[;\s]+", wanted.strip("; "))
    else:
        gpus = [gpu for gpu in DEFAULT_GPUS if f"sm_{gpu.replace('.', '')}" in known]
        gpus[-1] += "+PTX"
    code, ptx = [], []
    for gpu in gpus:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", gpu)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST is {wanted!r}: {gpu!r} is not like 9.0, 9.0a or 9.0+PTX")
        # Lists are often set for all that is built on a machine.
        if (int(match[1]), int(match[2])) < OLDEST_GPU:
            continue
        name = match[1] + match[2] + match[3]
        code.append(f"sm_{name}")
        if match[4]:
            ptx.append(f"compute_{name}")
    if not code:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST is {wanted!r}: the kernels need 8.0 or more; FASTACT_CUDA=0 leaves them out")
    return list(dict.fromkeys(code + ptx))


def nvcc_flags(architectures: list[str]) -> list[str]:
    return NVCC_FLAGS + [f"-gencode=arch=compute_{name.partition('_')[2]},code={name}" for name in architectures]


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

    nvcc = os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")
    version = nvcc_version(nvcc)
    missing = cuda_missing(torch.version.cuda, version, os.environ.get("FASTACT_CUDA"))
    architectures = []
    if not missing:
        architectures = gpu_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), output(nvcc, "--list-gpu-code").split())

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects stay where the next build finds them, so that an edit costs the time of one file: editable builds would
            # put them into a temporary folder.
            self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}")

        def run(self) -> None:
            (extension,) = self.extensions
            extension.include_dirs += cpp_extension.include_paths()
            extension.library_dirs += cpp_extension.library_paths()
            extension.libraries += ["c10", "torch", "torch_cpu", "torch_python"]
            extension.language = "c++"
            if missing:
                print(f"fastact: without CUDA: {missing}", flush=True)
            else:
                print(f"fastact: with CUDA {version} for {', '.join(architectures)}", flush=True)
                add_cuda(extension, nvcc, architectures)
            super().run()
            package = (ROOT if self.inplace else Path(self.build_lib)) / "fastact"
            package.mkdir(parents=True, exist_ok=True)
            (package / "_built.py").write_text(
                '"""Written by setup.py: what the extension was built against."""\n\n'
                f"TORCH = {str(torch.__version__)!r}\n"
                f"CUDA = {None if missing else version!r}\n"
                f"CUDA_ARCHITECTURES: list[str] = {architectures!r}\n"
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


def add_cuda(extension: Extension, nvcc: str, architectures: list[str]) -> None:
    extension.sources += [CUDA_BOUNDARY, *sources("cuda/*.cu")]
    extension.define_macros.append(("FASTACT_CUDA", "1"))
    extension.extra_compile_args = {"cxx": CXX_FLAGS, "nvcc": nvcc_flags(architectures)}
    # What is found on the path may be a link or a wrapper, so nvcc itself is asked where its toolkit is.
    toolkit = Path(re.search(r"TOP=(.+)", output(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull))[1]).resolve()
    extension.include_dirs.append(str(toolkit / "include"))
    # PyPI's packages have the runtime in `lib`, under its versioned name alone.
    runtime = min(toolkit.glob("lib*/libcudart.so*"), default=Path("libcudart.so"), key=lambda path: len(path.name))
    extension.library_dirs.append(str(runtime.parent))
    extension.libraries += ["c10_cuda", "torch_cuda", f":{runtime.name}"]


BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"}
NO_TORCH = """fastact is built against an installed torch, and this build sees none.
Where torch, setuptools and ninja are installed, run
    {}"""


def command_without_isolation() -> str:
    if "UV" in os.environ:
        return "uv pip install --no-build-isolation ."
    if "PIP_BUILD_TRACKER" in os.environ:
        return "pip install --no-build-isolation ."
    return "python -m build --no-isolation"


def main() -> None:
    requirements = []
    command_classes = {}
    building = BUILD_COMMANDS & set(sys.argv)
    if torch_found():
        command_classes = {"build_ext": build_ext_class()} if building else {}
    elif building:
        raise SystemExit(NO_TORCH.format(command_without_isolation()))
    elif "PIP_BUILD_TRACKER" in os.environ:  # pip asks what to install before it builds
        requirements = [TORCH_REQUIREMENT]
    os.chdir(ROOT)
    setup(ext_modules=[extension()], cmdclass=command_classes, setup_requires=requirements)


if __name__ == "__main__":
    main()
