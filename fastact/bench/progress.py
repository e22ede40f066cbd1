"""Shows on a terminal how far a run is: a tqdm bar, or a plain counter without tqdm."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from fastact.bench.measure import Measurement


def with_progress(rows: Iterable[Measurement], total: int) -> Iterator[Measurement]:
    """Passes the rows on. Writes to stderr, and nothing at all where that is not a terminal."""
    if not sys.stderr.isatty():
        yield from rows
        return
    try:
        from tqdm import tqdm
    except ImportError:
        for done, row in enumerate(rows, 1):
            print(f"\r{done}/{total} {_name(row):60}", end="", file=sys.stderr, flush=True)
            yield row
        print(f"\r{'':79}\r", end="", file=sys.stderr, flush=True)
        return
    with tqdm(total=total, unit="row", leave=False) as bar:
        for row in rows:
            bar.set_description_str(_name(row), refresh=False)
            bar.update()
            yield row


def _name(row: Measurement) -> str:
    return f"{row.op} {row.direction} {row.dtype} {row.label}"
