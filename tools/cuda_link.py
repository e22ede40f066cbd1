"""Builds fastact with CUDA against a torch that has it, on a machine that need not have a GPU, and sees that everything links.

    python tools/cuda_link.py                          or: make cuda-link
    python tools/cuda_link.py --torch torch==2.13.0    another than the oldest supported
    python tools/cuda_link.py --wheels FOLDER          takes the wheels that are there from FOLDER

In a temporary environment: torch, and CUDA's compiler and runtime. The other libraries of CUDA that torch is linked to would be
another 2 GB, and are not needed by fastact. An empty one stands for them all, so that torch can be imported.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from install_check import ROOT, run, source

OLDEST_TORCH = "torch==2.11.0"
BUILD = ["setuptools>=77", "ninja", "numpy", "--group", f"{ROOT / 'pyproject.toml'}:cuda-compiler"]
STAND_IN = "libstand_in.so"
# Not CUDA's runtime, whose functions begin with cuda and a capital letter.
LEFT_OUT = r"cu(?!da[A-Z])|nccl|nv"
TRY = """
import torch, fastact
x = torch.linspace(-1, 1, 9, requires_grad=True)
fastact.softmax(fastact.tanh(x), 0)[0].backward()
assert x.grad.isfinite().all()
for name in torch._C._dispatch_get_all_op_names():
    if name.startswith("fastact::"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), name
info = fastact.build_info()
assert info["cuda"], info
print("imports; CUDA", info["cuda"], "for", ", ".join(info["cuda_architectures"]))
"""


def undefined(library: Path) -> set[str]:
    """Dynamic symbols it takes from others, with their versions. A weak one that is missing is no error."""
    lines = run("nm", "-D", "--undefined-only", library).splitlines()
    return {line.split()[-1] for line in lines if line.split()[-2] == "U"}


def defined(library: Path) -> set[str]:
    """Those it has, with and without their versions: what was linked without knowing of one takes any."""
    names = {line.split()[-1].replace("@@", "@") for line in run("nm", "-D", "--defined-only", library).splitlines()}
    return names | {name.partition("@")[0] for name in names}


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", run("readelf", "-d", library)))


def stand_in(libraries: Path, there: set[str]) -> None:
    """Makes the empty library, and gives it the names of all that torch's libraries need and this machine lacks."""
    of_torch = list(libraries.glob("*.so"))
    versions: dict[str, list[str]] = {}
    for symbol in set().union(*map(undefined, of_torch)):
        name, _, version = symbol.partition("@")
        if re.match(LEFT_OUT, name):
            versions.setdefault(version, []).append(name)
    code, script = libraries / "stand_in.c", libraries / "stand_in.map"
    code.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for names in versions.values() for name in names))
    script.write_text("\n".join(f"{version} {{ {'; '.join(names)}; }};" for version, names in versions.items() if version))
    flags = ["-shared", "-fno-builtin", f"-Wl,--version-script={script}"]
    run(os.environ.get("CC", "cc"), *flags, code, "-o", libraries / STAND_IN)
    for name in set().union(*map(needed, of_torch)) - there:
        if re.match(f"lib({LEFT_OUT})", name):
            (libraries / name).symlink_to(STAND_IN)


def environment(
    folder: Path, torch: str, wheels: str | None, packages: list[str | Path], interpreter: str | Path = sys.executable
) -> tuple[Path, Path]:
    """A Python with torch and the packages, CUDA's runtime among them; and its site-packages."""
    run(interpreter, "-m", "venv", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['platlib'])").strip())
    pip = [python, "-m", "pip", "install", "--quiet", *(["--find-links", wheels] if wheels else [])]
    run(*pip, "--upgrade", "pip")
    run(*pip, "--no-deps", torch)
    metadata = email.message_from_string(next(site.glob("torch-*.dist-info/METADATA")).read_text())
    # CUDA's libraries are asked for under a condition, the Python packages are not.
    required = [package for package in metadata.get_all("Requires-Dist") if ";" not in package]
    run(*pip, *required, *packages)
    runtime = next(site.glob("nvidia/cu*/lib/libcudart.so.*"))
    # The name that linkers look for is not in the wheel.
    runtime.with_name("libcudart.so").symlink_to(runtime.name)
    if (site / "torch" / "lib" / "libtorch_cuda.so").exists():
        stand_in(site / "torch" / "lib", {runtime.name})
    return python, site


def providers(extension: Path, python: Path, site: Path) -> list[Path]:
    """The libraries whose symbols the extension may use."""
    interpreter = python.resolve()
    linked = {run("ldd", path) for path in (extension, interpreter)}
    system = {Path(found) for text in linked for found in re.findall(r"(/\S+) \(0x", text)}
    of_torch = {path for path in (site / "torch" / "lib").glob("lib*.so*") if path.resolve().name != STAND_IN}
    return [*sorted(of_torch), *site.glob("nvidia/cu*/lib/libcudart.so.*"), interpreter, *sorted(system - of_torch)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch", default=OLDEST_TORCH, help=f"a requirement that pip finds with CUDA (default: {OLDEST_TORCH})"
    )
    parser.add_argument("--wheels", help="a folder of wheels to take before those of PyPI")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        start = time.perf_counter()
        python, site = environment(Path(temporary) / "environment", arguments.torch, arguments.wheels, BUILD)
        print(f"environment with {arguments.torch}: {time.perf_counter() - start:.0f} s", flush=True)
        os.environ |= {"FASTACT_CUDA": "1", "CUDA_HOME": str(next(site.glob("nvidia/cu*")))}
        start = time.perf_counter()
        run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", ".", cwd=source(Path(temporary) / "checkout"))
        print(f"build: {time.perf_counter() - start:.0f} s")

        (extension,) = site.glob("fastact/_C*.so")
        missing = undefined(extension)
        count = Counter[str]()
        for library in providers(extension, python, site):
            found = missing & defined(library)
            count[library.name] += len(found)
            missing -= found
        for name, number in count.items():
            if number:
                print(f"{number:4} symbols from {name}")
        if missing:
            sys.exit("nothing provides:\n" + run("c++filt", *sorted(missing)))
        print(run(python, "-c", TRY, cwd=Path(temporary)).strip())


if __name__ == "__main__":
    main()
