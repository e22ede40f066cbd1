"""Compiles the CUDA kernels for every architecture of the build and reads what the compiler made of them; needs no GPU.

Fails on a compiler warning, on a byte of spilled registers or of stack, on an access to local memory, and on a kernel whose
16-byte loads and stores are not all there. `--write` puts the table into docs/cuda-kernels.md.

    python tools/cuda_check.py [--nvcc PATH] [--write]

Compiler and disassembler are those of the optional dependencies [cuda-check], or the machine's.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"))
DOCUMENT = ROOT / "docs" / "cuda-kernels.md"
# csrc/cuda/elementwise.h: kUnroll.
UNROLL = 2


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    instructions: int = 0
    loads: int = 0  # of 16 bytes
    stores: int = 0
    local: int = 0  # accesses to local memory

    def wide(self) -> tuple[int, int]:
        """How many 16-byte loads and stores it must have at least."""
        if match := re.match(r"elementwise<(Forward|Backward)", self.name):
            return (UNROLL, UNROLL) if match[1] == "Forward" else (2 * UNROLL, UNROLL)
        if match := re.match(r"softmax(_backward)?_(rows|columns)<\w+, (\d+), (\d+)", self.name):
            width, share = int(match[3]), int(match[4])
            packs = share // width if match[2] == "rows" else share
            inputs = 2 if match[1] else 1
            return (0, 0) if width == 1 else (inputs * packs, 0 if self.name.endswith("part>") else packs)
        return 0, 0

    def faults(self) -> list[str]:
        found = []
        loads, stores = self.wide()
        if self.stack or self.spilled:
            found.append(f"{self.stack} bytes of stack, {self.spilled} spilled")
        if self.local:
            found.append(f"{self.local} accesses to local memory")
        if self.loads < loads or self.stores < stores:
            found.append(f"{self.loads} loads and {self.stores} stores of 16 bytes rather than {loads} and {stores}")
        return found


def tool(name: str) -> str | None:
    """From the packages of this Python, so that it is the same compiler everywhere; else that of the machine."""
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    places = [*packages.glob("*/bin"), Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin"]
    found = [str(place / name) for place in places if (place / name).is_file()]
    return next(iter(found), shutil.which(name))


def run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(str(part) for part in command)}\n{done.stdout}")
    return done.stdout


def readable(mangled: list[str]) -> dict[str, str]:
    """elementwise<ForwardOf<Sigmoid<float>>, float> for what the compiler calls by 150 characters."""
    plain = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    names = {}
    for symbol, name in zip(mangled, plain.splitlines(), strict=True):
        name = re.sub(r"\(anonymous namespace\)::|fastact::|device::|^void ", "", name)
        for number, phase in enumerate(("whole", "part", "rest")):
            name = re.sub(rf"\(Phase\){number}\b|\({number}\)", phase, name)
        name = name[: name.rindex("(")] if "(" in name else name
        names[symbol] = re.sub(r", [12]>$", ">", name).replace("> >", ">>").replace("> >", ">>")
    return names


def compile_and_read(nvcc: str, source: Path, folder: Path) -> tuple[str, Path]:
    target = folder / f"{source.stem}.o"
    flags = [*SETUP["NVCC_FLAGS"], *SETUP["architecture_flags"](SETUP["CUDA_ARCHITECTURES"])]
    return run(nvcc, *flags, "-Werror", "all-warnings", "-Xptxas", "-v", "-c", source, "-o", target), target


def resources(log: str) -> dict[tuple[str, str], Kernel]:
    """From what ptxas prints, by mangled name and architecture."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        head = re.match(r"'(\w+)' for '(\w+)'", part)
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not (head and memory and registers):
            sys.exit(f"ptxas says something else than expected:\n{part}")
        spilled = int(memory[2]) + int(memory[3])
        found[head[1], head[2]] = Kernel(head[1], head[2], int(registers[1]), int(memory[1]), spilled)
    return found


def read_code(disassembly: str, kernels: dict[tuple[str, str], Kernel]) -> None:
    architecture, kernel = "", None
    for line in disassembly.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            kernel = kernels[match[1], architecture]
        elif kernel and (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)):
            operation = match[1]
            kernel.instructions += operation != "NOP"
            kernel.loads += operation.startswith("LDG") and ".128" in operation
            kernel.stores += operation.startswith("STG") and ".128" in operation
            kernel.local += operation.startswith(("LDL", "STL"))


def table(kernels: list[Kernel], version: str) -> str:
    architectures = sorted({kernel.architecture for kernel in kernels}, key=lambda name: int(name[3:]))
    lines = [
        "# The CUDA kernels as compiled",
        "",
        "Registers and instructions of every kernel, by architecture. None spills, has a stack, or touches local memory, and",
        "the 16-byte loads and stores of every vectorised kernel are all there: `make cuda-check` holds that.",
        "",
        f"Made by `python tools/cuda_check.py --write` with nvcc {version}, {datetime.date.today()}. No GPU was involved.",
        "",
        "| kernel | " + " | ".join(architectures) + " |",
        "| --- |" + " --- |" * len(architectures),
    ]
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    for name, row in sorted(by_name.items()):
        cells = [f"{row[a].registers} / {row[a].instructions}" if a in row else "" for a in architectures]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nvcc", default=tool("nvcc"), help="default: that of the package nvidia-cuda-nvcc, else of the machine"
    )
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.relative_to(ROOT)}")
    arguments = parser.parse_args()
    disassembler = tool("cuobjdump")
    if not arguments.nvcc:
        sys.exit("there is no nvcc: install CUDA 13, or `pip install '.[cuda-check]'`")
    if not disassembler:
        sys.exit("there is no cuobjdump: `pip install '.[cuda-check]'`")
    # cuobjdump calls nvdisasm, which lies beside it.
    os.environ["PATH"] += os.pathsep + str(Path(disassembler).parent)

    kernels: dict[tuple[str, str], Kernel] = {}
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: compile_and_read(arguments.nvcc, source, Path(folder)), sources)
        for log, target in made:
            found = resources(log)
            if found:
                read_code(run(disassembler, "-sass", target), found)
            kernels |= found
    names = readable([kernel.name for kernel in kernels.values()])
    for kernel in kernels.values():
        kernel.name = names[kernel.name]

    failed = [(kernel, fault) for kernel in kernels.values() for fault in kernel.faults()]
    for kernel, fault in failed:
        print(f"{kernel.architecture}  {kernel.name}: {fault}")
    if failed:
        sys.exit(1)
    architectures = ", ".join(sorted({kernel.architecture for kernel in kernels.values()}))
    vectorised = sum(kernel.wide() != (0, 0) for kernel in kernels.values())
    print(f"{len(kernels)} kernels for {architectures}: no warning, no spill; 16-byte accesses complete in {vectorised}")
    if arguments.write:
        version = SETUP["nvcc_version"](Path(arguments.nvcc))
        DOCUMENT.write_text(table(list(kernels.values()), version))


if __name__ == "__main__":
    main()
