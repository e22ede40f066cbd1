"""Times calls side by side, so that a change of the machine's speed meets all of them."""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Seconds per call."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
        return cls(median, q1, q3)


def settle() -> None:
    """Waits until no other thread of this process runs, but not forever. The threads of a call spin for some milliseconds after
    it, on cores that those of another library want.
    """
    for _ in range(100):
        time.sleep(200e-6)
        if not others_run():
            break


def others_run() -> bool:
    me = str(threading.get_native_id())
    try:
        # The state follows the name of the thread, which stands in parentheses.
        stats = [(task / "stat").read_text() for task in Path("/proc/self/task").iterdir() if task.name != me]
    except OSError:  # a thread that has just ended; a system without /proc
        return False
    return any(stat.rpartition(")")[2].split()[0] == "R" for stat in stats)


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
                # There and back again: whatever a call leaves behind meets the same calls no more often than others.
                for name, take in list(takers.items())[:: -1 if done % 2 else 1]:
                    samples[name].append(take())
        finally:
            if collecting:
                gc.enable()
        return {name: Spread.of(times) for name, times in samples.items()}

    def stranger(self, call: Call, seconds: float) -> Spread:
        """Of a call on threads other than torch's. It gets no turns with others: threads that have slept are slow for a
        millisecond, and there would be some awake and some asleep at every turn.
        """
        settle()
        try:
            return self({"": call}, seconds)[""]
        finally:
            settle()

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


class CallTimer(CpuTimer):
    """Wall time per call on a GPU, from host to host: of many calls in a row and one wait at the end. For small tensors, whose
    kernels take less time than it takes to launch them.
    """

    SAMPLE_SECONDS = 2e-3  # so that the wait, of some 10 us, does not matter

    @staticmethod
    def _sample(call: Call, loops: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in repeat(None, loops):
            call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / loops


class CudaTimer(Timer):
    """Device time of one call, by events. The write before it does two things. It leaves nothing useful in the L2 cache, but
    lines still to be written, as the op before a call leaves them in a program: what of the call's own result is still in the
    cache when the call ends is paid for by what it had to write of others. And it lasts while the host launches, so that only
    kernels are timed: a sample whose kernels waited for the host is taken again, behind more writing.
    """

    FLUSH_BYTES = 1 << 30
    MOST_FLUSHES = 256  # about 0.1 s: a call that takes the host longer, or waits for the device itself, is timed as it is

    def __init__(self) -> None:
        self._flush = torch.empty(self.FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._start, self._stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushes: dict[int, int] = {}  # by call: how many it takes to hide its launch

    def prepare(self, call: Call) -> Callable[[], float]:
        for _ in range(3):
            call()
        self._flushes[id(call)] = 1
        return partial(self._sample, call)

    def _sample(self, call: Call) -> float:
        while True:
            flushes = self._flushes[id(call)]
            torch.cuda.synchronize()
            for _ in repeat(None, flushes):
                self._flush.zero_()
            self._start.record()
            call()
            self._stop.record()
            # Still writing, now that everything has been launched: nothing waited for the host.
            hidden = not self._start.query()
            self._stop.synchronize()
            if hidden or flushes >= self.MOST_FLUSHES:
                return float(self._start.elapsed_time(self._stop)) * 1e-3
            self._flushes[id(call)] = 2 * flushes
