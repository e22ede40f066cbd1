"""Builds the extension `fastact._C`. Knows no activation: sources are found by glob, rows are in csrc/activations.h.

Torch is not a build requirement in pyproject.toml, because pip would then fetch a second one into its isolated build
environment. The torch of the environment that is installed into is found instead; only where there is none is one asked for.
"""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent
TORCH_REQUIREMENT = "torch>=2.11"


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
    from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Objects stay where the next build finds them, so that an edit costs the time of one file: editable builds would
            # put them into a temporary folder.
            self.build_temp = str(ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}")

        def run(self) -> None:
            for extension in self.extensions:
                extension.include_dirs += include_paths()
                extension.library_dirs += library_paths()
                extension.libraries += ["c10", "torch", "torch_cpu", "torch_python"]
                extension.language = "c++"
            super().run()
            package = (ROOT if self.inplace else Path(self.build_lib)) / "fastact"
            package.mkdir(parents=True, exist_ok=True)
            (package / "_built.py").write_text(
                f'"""Written by setup.py: the torch that the extension was built against."""\n\nTORCH = "{torch.__version__}"\n'
            )

    return Build


def extension() -> Extension:
    # No fast-math of any kind: NaN, infinities and signed zeros are part of what is promised. Contraction is off because
    # formulas say themselves where a fused multiply-add belongs, and results must not depend on where the compiler sees one.
    flags = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden"]
    # OpenMP's runtime is torch's own: compiled for it, not linked to a second one.
    flags += [
        "-fopenmp",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-Wno-unused-parameter",
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
    ]
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("**/*.h"))
    return Extension("fastact._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=["-Wl,-z,relro,-z,now"])


BUILD_COMMANDS = {"build", "build_ext", "bdist_wheel", "install", "develop", "editable_wheel"}

if torch_found():
    requirements = []
    command_classes = {"build_ext": build_ext_class()} if BUILD_COMMANDS & set(sys.argv) else {}
else:
    requirements = [TORCH_REQUIREMENT]
    command_classes = {}

os.chdir(ROOT)
setup(ext_modules=[extension()], cmdclass=command_classes, setup_requires=requirements)
