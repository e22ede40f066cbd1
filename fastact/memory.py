"""Memory for large outputs on the CPU.

The system hands out a large block page by page, each zeroed when it is first touched, and takes it back when the
tensor is freed: for outputs of many MiB that takes longer than computing them. The C library keeps smaller blocks, but
tidies up with every one of 64 KiB and more that is freed, and spreads the next outputs over more of them than caches
hold. fastact therefore keeps freed output blocks of 64 KiB and more for its next outputs, up to a limit, and puts new
ones of 1 MiB and more on huge pages where the system has them.

The limit is 1 GiB, or an eighth of the memory that the process may have (the machine's, or its control group's) if
that is less. What is held counts as used memory of the process. `FASTACT_POOL_LIMIT` (bytes) sets another limit; 0
turns the pool off. `FASTACT_HUGE_PAGES=0` leaves pages as they are. Outputs above both the limit and 32 MiB lie on
huge pages all the same.

The functions may be called from any thread. After a fork each process has a pool of its own.
"""

from __future__ import annotations

import operator
import os
import re
from pathlib import Path

from fastact import _C

__all__ = ["empty_cache", "limit", "stats"]

MOST = 1 << 30  # enough for the activations of most networks
SHARE = 8  # of the memory, at most one part in so many


def memory_there_is(root: Path = Path("/")) -> int:
    """Bytes this process may have: the machine's memory, or what a control group (a container) allows it if that is less."""
    amounts = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        groups = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if not controllers:
            top, file = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A group's limit holds for those within it. Seen from a container, the path may name groups outside it.
        inner = top / path.lstrip("/")
        for directory in [inner, *inner.parents][: len(inner.parts) - len(top.parts) + 1]:
            try:
                text = (directory / file).read_text().strip()
            except OSError:
                continue
            if text.isdecimal():  # "max" where there is none
                amounts.append(int(text))
    return min(amounts)


def from_environment(variable: str, default: int) -> int:
    """A number of at least 0; the default where the variable is empty or not set."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not re.fullmatch("[0-9]{1,18}", text):
        raise ImportError(f"{variable} is {text!r}; it must be a whole number from 0 to {10**18 - 1}")
    return int(text)


_C.pool_start(
    from_environment("FASTACT_POOL_LIMIT", min(MOST, memory_there_is() // SHARE)),
    from_environment("FASTACT_HUGE_PAGES", 1) != 0,
)


def limit(bytes: int | None = None) -> int:
    """Sets the most bytes that are held for later outputs, and returns the limit from now on.

    `bytes`: the new limit; what is held beyond it is released at once, what was freed longest ago first. 0 holds nothing, None
    leaves the limit as it is. Raises `TypeError` where it is not an integer, `ValueError` where it is negative.
    """
    if bytes is not None:
        number = operator.index(bytes)
        if number < 0:
            raise ValueError(f"limit(): bytes must be at least 0, not {number}")
        _C.pool_limit(min(number, 2**63 - 1))
    return _C.pool_stats()["limit"]


def empty_cache() -> None:
    """Releases everything that is held to the system. Tensors in use stay as they are."""
    _C.pool_empty_cache()


def stats() -> dict[str, int]:
    """What the pool does now, and has done since the start of the process, as a dict.

    - `limit`: the most bytes it may hold
    - `held`: bytes of freed blocks that wait for the next output; never more than `limit`
    - `blocks`: how many these are
    - `in_use`: bytes of the blocks that live tensors lie in
    - `hits`, `misses`: outputs that got a block from the pool, and that got a new one
    """
    return _C.pool_stats()
