"""Environment variables that are read once and memory that is never given back: both need a process of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def variables(changes: Mapping[str, str | None]) -> Iterator[None]:
    """These environment variables inside the block; None: not set."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _set(changes)
        yield
    finally:
        _set(before)


def _set(changes: Mapping[str, str | None]) -> None:
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class Worker:
    """A fresh process that calls what it is told, one call at a time; it sleeps in between."""

    def __init__(self, changes: Mapping[str, str | None] | None = None) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with variables(changes or {}):  # the first call starts the process
            self(os.getpid)

    def __call__(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What `function(*args)` returns there. It is pickled, so it must be importable."""
        return self._pool.submit(function, *args, **kwargs).result()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.shutdown()


def resident_bytes() -> tuple[int, int]:
    """Of this process: now, and at most so far. Not from getrusage, whose peak a child inherits from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak
