"""Memory for large outputs on the CPU.

The system hands out a large block page by page, each zeroed when it is first touched, and takes it back when the
tensor is freed: for outputs of many MiB that takes longer than computing them. fastact therefore keeps freed output
blocks of 1 MiB and more for its next outputs, up to a limit, and puts new ones on huge pages where the system has
them.

The limit is 1 GiB, or an eighth of the machine's memory if that is less. What is held counts as used memory of the
process. `FASTACT_POOL_LIMIT` (bytes) sets another limit; 0 turns the pool off. `FASTACT_HUGE_PAGES=0` leaves pages as
they are. With both, outputs come from torch's allocator. Outputs above the limit, and above 32 MiB where the pool is
off, still lie on huge pages.

The functions may be called from any thread. After a fork each process has a pool of its own.
"""

from __future__ import annotations

import operator

from fastact import _C

__all__ = ["empty_cache", "limit", "stats"]


def limit(bytes: int | None = None) -> int:
    """The most bytes that are held for later outputs.

    Args:
        bytes: the new limit; what is held beyond it is released at once, what was freed longest ago first. 0 holds nothing.
            None leaves it as it is.

    Returns:
        The limit from now on, in bytes.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is negative.
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
    """What the pool does now, and has done since the start of the process.

    Returns:
        limit: the most bytes it may hold.
        held: bytes of freed blocks that wait for the next output; never more than `limit`.
        blocks: how many these are.
        in_use: bytes of the blocks that live tensors lie in.
        hits, misses: outputs that got a block from the pool, and that got a new one.
    """
    return _C.pool_stats()
