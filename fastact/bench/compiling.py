"""torch.compile as a competitor, within a budget of time and without risk to the run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from fastact.bench.cases import Sides


class Compiler:
    """Makes the compiled side of a measurement, or remembers why there is none."""

    def __init__(self, device: str, seconds: float) -> None:
        # The kernels of "max-autotune", but not in CUDA graphs: a graph of one kernel saves nothing on the device, copies its
        # inputs to where it has recorded them, and overwrites its last result, which a graph that is retained still needs.
        self._mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
        self._device = device
        self._left = seconds
        self._broken: str | None = None
        self._missing: Counter[str] = Counter()

    def probe(self) -> None:
        """Compiles a trifle, so that a missing C++ compiler shows once and not at every case."""
        start = time.perf_counter()
        try:
            self._compile(torch.neg)(torch.zeros(8, device=self._device))
        except Exception as error:
            self._broken = one_line(error)
        self._left -= time.perf_counter() - start

    def __call__(self, side: Sides) -> Callable[[], object] | None:
        """The call, compiled and run once."""
        reason = self._broken
        if not reason and self._left <= 0:
            reason = "the time for compiling was used up (a second run finds more in its cache)"
        if not reason:
            start = time.perf_counter()
            # The functions share their code object, and torch keeps a few versions of one only.
            torch._dynamo.reset()
            try:
                call = side.compiled(self._compile)
                call()
                return call
            except Exception as error:  # whatever it is, it costs a column and not the run
                reason = one_line(error)
            finally:
                self._left -= time.perf_counter() - start
        self._missing[reason] += 1
        return None

    def notes(self) -> list[str]:
        return [f"{n} rows without torch.compile: {why}" for why, n in self._missing.items()]

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False, mode=self._mode)


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
