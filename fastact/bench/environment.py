"""Where and when a run took place, and whether it had the machine to itself."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import fastact


def environment(device: str, arguments: Sequence[str], program: str = "python -m fastact.bench") -> dict[str, Any]:
    return {
        "device": device,
        "processor": torch.cuda.get_device_name() if device == "cuda" else _cpu_model(),
        "cpu": _cpu_model(),
        "build": fastact.build_info(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": datetime.now().astimezone().isoformat(sep=" ", timespec="minutes"),
        "commit": _commit(),
        "command": shlex.join([*program.split(), *arguments]),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout this file belongs to; an installed copy may lie inside somebody else's."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


class Neighbours:
    """What other programs use of the CPU from now on. They disturb: a call on all threads waits for
    the one whose core is taken, and then takes milliseconds where it needs microseconds.
    """

    def __init__(self) -> None:
        self._before = self._seconds()

    def cores(self) -> float:
        """How many they kept busy on average; 0 where the system does not tell."""
        wall, used = (now - then for now, then in zip(self._seconds(), self._before, strict=True))
        return used / wall

    def notes(self) -> list[str]:
        cores = self.cores()
        return [f"other programs kept {cores:.1f} cores busy: times may be far off"] if cores > 0.1 else []

    @staticmethod
    def _seconds() -> tuple[float, float]:
        try:
            fields = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
        except (OSError, ValueError):
            return time.monotonic(), 0.0
        idle = fields[3] + fields[4]  # idle, and waiting for input and output
        all_programs = (sum(fields) - idle) / os.sysconf("SC_CLK_TCK")
        return time.monotonic(), all_programs - sum(os.times()[:4])
