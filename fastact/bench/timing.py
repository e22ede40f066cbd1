"""Times calls side by side, so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Seconds per call."""

    median: float
    q1: float
    q3: float


class Timer:
    """Takes samples of all calls in turn, for the given time but within these numbers."""

    LEAST, MOST = 5, 51

    def __call__(self, calls: dict[str, Call], seconds: float) -> dict[str, Spread]:
        collecting = gc.isenabled()
        gc.disable()
        try:
            takers = {name: self.prepare(call) for name, call in calls.items()}
            samples: dict[str, list[float]] = {name: [] for name in calls}
            end = time.perf_counter() + seconds
            for done in range(self.MOST):
                if done >= self.LEAST and time.perf_counter() > end:
                    break
                for name, take in takers.items():
                    samples[name].append(take())
        finally:
            if collecting:
                gc.enable()
        spreads = {}
        for name, times in samples.items():
            q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
            spreads[name] = Spread(median, q1, q3)
        return spreads

    def prepare(self, call: Call) -> Callable[[], float]:
        """Warms the call up; returns what takes a sample of it, in seconds per call."""
        raise NotImplementedError


class CpuTimer(Timer):
    """Wall time. A sample repeats its call until the clock's resolution does not matter."""

    SAMPLE_SECONDS = 200e-6

    def prepare(self, call: Call) -> Callable[[], float]:
        loops = 1
        if self._sample(call, loops) < 50 * self.SAMPLE_SECONDS:  # else the first says enough
            while self._sample(call, loops) * loops < self.SAMPLE_SECONDS:
                loops *= 2
        return partial(self._sample, call, loops)

    @staticmethod
    def _sample(call: Call, loops: int) -> float:
        start = time.perf_counter()
        for _ in repeat(None, loops):
            call()
        return (time.perf_counter() - start) / loops


class CudaTimer(Timer):
    """Device time of one call, by events. The write before it does two things: it leaves nothing
    useful in the L2 cache, and it lasts while the host launches, so that only kernels are timed.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def prepare(self, call: Call) -> Callable[[], float]:
        for _ in range(3):
            call()
        return partial(self._sample, call)

    def _sample(self, call: Call) -> float:
        torch.cuda.synchronize()
        self._flush.zero_()
        self._start.record()
        call()
        self._stop.record()
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) * 1e-3
