"""Looks at what nvcc makes of the CUDA kernels. That none spills and that all move 16 bytes at a time shows without a GPU.

    python tools/cuda_check.py             or: make cuda-check
    python tools/cuda_check.py --write     also writes docs/cuda-kernels.md
    python tools/cuda_check.py --nvcc      only says which nvcc it takes

The compiler is the one of CUDA_HOME, of PATH, of CUDA's usual home or of this environment, the first that is new enough.
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
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SITE = Path(sysconfig.get_paths()["platlib"])
TABLE = ROOT / "docs" / "cuda-kernels.md"
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="functions")
# What may be called: for rare operands of a division in IEEE arithmetic; and to divide indices, once a thread
# and in what a monitor looks at, of which there is little.
SUBROUTINES = r".* \w*(div|rcp)_rn_|(softmax|channel|maxout|look).* (div|rem)_[su]"
UNROLL = int(re.search(r"kUnroll = (\d+)", (ROOT / "csrc" / "cuda" / "elementwise.h").read_text())[1])
CHANNEL_PACKS = int(re.search(r"kChannelPacks = (\d+)", (ROOT / "csrc" / "cuda" / "channels.h").read_text())[1])
PHASES = ("whole", "part", "rest")  # Phase of csrc/cuda/softmax.h
OLDEST_NVCC = (13, 0)  # the first that knows all of the default architectures and is of the major version torch is built with


@dataclass
class Kernel:
    name: str  # as softmax_rows<Softmax, BFloat16, 8, 32>
    architecture: str
    registers: int = 0
    shared: int = 0  # bytes, besides those that a launch asks for
    stack: int = 0
    spilled: int = 0
    code: list[str] = field(default_factory=list)

    def count(self, instruction: str) -> int:
        return sum(bool(re.match(rf"(@\S+ +)?({instruction})\b", line)) for line in self.code)

    def subroutines(self) -> set[str]:
        """Those of CUDA's own arithmetic."""
        return {match[1] for line in self.code if (match := re.search(r"CALL.*__cuda_sm\d+x?_(\w+)", line))}

    def faults(self) -> list[str]:
        found = []
        if self.stack or self.spilled:
            found.append(f"{self.stack} bytes of stack, {self.spilled} bytes spilled")
        if local := self.count("LDL|STL"):
            found.append(f"{local} accesses to local memory")
        if called := {name for name in self.subroutines() if not re.match(SUBROUTINES, f"{self.name} {name}")}:
            found.append(f"calls {', '.join(called)}")
        loads, stores = self.count(r"LDG\.E\.(\w+\.)*128"), self.count(r"STG\.E\.(\w+\.)*128")
        least_loads, least_stores = self.wide_accesses()
        if loads < least_loads or stores < least_stores:
            found.append(f"{loads} loads and {stores} stores of 16 bytes rather than {least_loads} and {least_stores}")
        return found

    def wide_accesses(self) -> tuple[int, int]:
        """The 16-byte loads and stores it must have: of every pack that a thread holds, so that none is moved in parts."""
        if match := re.match(r"elementwise<(Forward|Backward)", self.name):
            return UNROLL * (1 if match[1] == "Forward" else 2), UNROLL
        if match := re.match(r"channel_(?:lines|columns)<\w+, \w+, (\d+), (true|false)>", self.name):
            packs = CHANNEL_PACKS if int(match[1]) > 1 else 0
            return packs * (1 if match[2] == "true" else 2), packs  # true: forward
        match = re.match(r"softmax_(backward_)?(rows|columns)<\w+, \w+, (\d+), (\d+)", self.name)
        # Others take one element at a time, for what does not come in packs, or add up what these have left.
        if not match or match[3] == "1":
            return 0, 0
        packs = int(match[4]) // int(match[3]) if match[2] == "rows" else int(match[4])
        # The first of two passes over a long row only sums, for which LogSoftmax has no use for y.
        part = self.name.endswith(" part>")
        inputs = 2 if match[1] and not (part and "<LogSoftmax" in self.name) else 1
        return packs * inputs, 0 if part else packs


def tool(name: str) -> str | None:
    """A program of CUDA's toolkit."""
    homes = [os.environ.get("CUDA_HOME") or "/usr/local/cuda", "/usr/local/cuda", *SITE.glob("nvidia/cu*")]
    paths = [Path(home, "bin", name) for home in homes]
    if on_path := shutil.which(name):
        paths.insert(1, Path(on_path))
    for path in paths:
        if path.exists() and (name != "nvcc" or release(path) >= OLDEST_NVCC):
            return str(path)
    return None


def output(*command: str | Path, cwd: Path = ROOT) -> str:
    made = subprocess.run([str(part) for part in command], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if made.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{made.stdout}")
    return made.stdout


def release(nvcc: str | Path) -> tuple[int, ...]:
    return tuple(map(int, re.search(r"release (\d+)\.(\d+)", output(nvcc, "--version")).groups()))


def readable(mangled: list[str]) -> dict[str, str]:
    """elementwise<BackwardOf<ELU>, Float16> for the names of kernels in objects."""
    demangled = output("c++filt", *mangled).splitlines()
    names = [re.sub(r"\(anonymous namespace\)::|fastact::|device::|^void ", "", name) for name in demangled]
    names = [name[: name.rindex(">(") + 1] for name in names]
    for number, phase in enumerate(PHASES):
        names = [name.replace(f"(Phase){number}", phase) for name in names]
    # The lane type and the number of inputs follow from the rest.
    return dict(zip(mangled, [re.sub(r"<\w+> ?>, (\w+), \d>", r">, \1>", name) for name in names], strict=True))


def compiled(source: Path, folder: Path, nvcc: str) -> list[Kernel]:
    """All kernels of a file, for all architectures."""
    made = folder / f"{source.stem}.o"
    architectures = SETUP["gpu_architectures"](None, output(nvcc, "--list-gpu-code").split())
    flags = SETUP["nvcc_flags"](architectures)
    report = output(nvcc, *flags, "-Werror", "all-warnings", "-Xptxas", "-v", "-c", source, "-o", made)
    kernels: dict[tuple[str, str], Kernel] = {}
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            current = kernels[match[1], match[2]] = Kernel(match[1], match[2])
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack += int(match[1])
            current.spilled += int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?", line):
            current.registers, current.shared = int(match[1]), int(match[2] or 0)

    output(tool("cuobjdump"), "-xelf", "all", made, cwd=folder)
    for cubin in folder.glob(f"{source.stem}.*.cubin"):
        code: list[str] = []
        for line in output(tool("nvdisasm"), "-c", cubin).splitlines():
            if match := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
                code = kernels[match[1], cubin.suffixes[-2][1:]].code
            elif (match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.+?) *;", line)) and match[1] != "NOP":
                code.append(match[1])
    names = readable(sorted({name for name, _ in kernels})) if kernels else {}
    for kernel in kernels.values():
        kernel.name = names[kernel.name]
    return list(kernels.values())


def table(kernels: list[Kernel], version: str) -> str:
    architectures = list(dict.fromkeys(kernel.architecture for kernel in kernels))
    dtypes = {"double": "float64", "float": "float32", "BFloat16": "bfloat16", "Float16": "float16", "Quick": "16 bits"}
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for kernel in kernels:
        dtype = re.search(r"[<,] ?(double|float|BFloat16|Float16|Quick)\b", kernel.name)
        name = (kernel.name[: dtype.start(1)] + kernel.name[dtype.end(1) :]).replace("<, ", "<").replace(", >", ">")
        cell = f"{kernel.registers} / {kernel.shared} / {kernel.spilled} / {len(kernel.code)}"
        rows.setdefault((name, dtypes[dtype[1]]), {})[kernel.architecture] = cell
    lines = [
        "# What nvcc makes of the CUDA kernels",
        "",
        f"Written by `python tools/cuda_check.py --write` on {datetime.date.today()} with nvcc {version}.",
        "For each architecture: registers / bytes of static shared memory / bytes spilled / instructions.",
        "",
        f"| kernel | dtype | {' | '.join(architectures)} |",
        f"| --- | --- |{' --- |' * len(architectures)}",
    ]
    for (name, dtype), cells in sorted(rows.items()):
        lines.append(f"| `{name}` | {dtype} | {' | '.join(cells[architecture] for architecture in architectures)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/cuda-kernels.md")
    parser.add_argument("--nvcc", action="store_true", help="say which nvcc is taken, and stop")
    arguments = parser.parse_args()
    nvcc = tool("nvcc") or sys.exit("no nvcc of CUDA 13.0 or later: `pip install --group cuda-compiler` has one")
    if arguments.nvcc:
        print(nvcc)
        return
    if not (tool("cuobjdump") and tool("nvdisasm")):
        sys.exit("no cuobjdump and nvdisasm: `pip install --group cuda-check` has them")

    sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda source: compiled(source, Path(folder), nvcc), sources)
        kernels = [kernel for those in made for kernel in those]

    for architecture in dict.fromkeys(kernel.architecture for kernel in kernels):
        those = [kernel for kernel in kernels if kernel.architecture == architecture]
        most = max(those, key=lambda kernel: kernel.registers)
        print(f"{architecture}: {len(those)} kernels, {sum(len(k.code) for k in those)} instructions; ", end="")
        print(f"most registers: {most.registers} in {most.name}")
    for name in sorted(set().union(*(kernel.subroutines() for kernel in kernels))):
        print(f"{name} is called by {sum(name in kernel.subroutines() for kernel in kernels)} of {len(kernels)}")
    if arguments.write:
        TABLE.write_text(table(kernels, re.search(r"V([\d.]+)", output(nvcc, "--version"))[1]))
    if faulty := [kernel for kernel in kernels if kernel.faults()]:
        width = max(len(kernel.name) for kernel in faulty)
        sys.exit("\n".join(f"{k.name:<{width}}  {k.architecture:<7} {'; '.join(k.faults())}" for k in faulty))


if __name__ == "__main__":
    main()
