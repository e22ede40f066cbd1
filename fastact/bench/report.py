"""What a run leaves behind: a table to read, a file to keep, a comparison with an older file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from fastact.bench.cases import TENSORS_MOVED
from fastact.bench.measure import Measurement
from fastact.bench.saved import Saved, saved_table
from fastact.bench.timing import Spread

# A row is slower only if both say so: small times jitter by ratio, large ones by amount.
SLOWER_BY_SHARE = 0.10
SLOWER_BY_SECONDS = {"cpu": 20e-6, "cuda": 2e-6}


def save(path: Path, **parts: Any) -> None:
    """Writes them as an object of JSON, in which a dataclass is an object too."""
    path.write_text(json.dumps(parts, indent=1, default=lambda o: vars(o) if is_dataclass(o) else str(o)) + "\n")


@dataclass
class Report:
    environment: dict[str, Any]
    rows: list[Measurement]
    notes: list[str] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)

    def save(self, path: Path) -> None:
        save(path, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Report:
        data = json.loads(path.read_text())
        for row in data["rows"]:
            for side in ("ours", "eager", "compiled", "call", "call_eager", "call_compiled"):
                row[side] = Spread(**row[side]) if row.get(side) else None
            row["peers"] = {name: Spread(**spread) for name, spread in row.get("peers", {}).items()}
        rows = [Measurement(**row) for row in data["rows"]]
        return cls(data["environment"], rows, data["notes"], [Saved.load(saved) for saved in data.get("saved", [])])

    def title(self) -> str:
        e = self.environment
        isa = e["build"].get("isa")
        processor = f"{e['processor']} ({isa})" if isa and e["device"] == "cpu" else e["processor"]
        how = f"{e['threads']} thread{'s' * (e['threads'] != 1)}" if e["device"] == "cpu" else f"CUDA {e['build'].get('cuda')}"
        return f"{processor}, {how}, torch {e['torch']}, {e['date']}"

    def table(self) -> str:
        build = ", ".join(f"{key} {value}" for key, value in self.environment["build"].items())
        lines = [self.title(), f"build: {build}"]
        ops = list(dict.fromkeys(row.op for row in self.rows))
        dtypes = list(dict.fromkeys(row.dtype for row in self.rows))
        peers = self._peers()
        for op in ops:
            rows = [row for row in self.rows if row.op == op]
            rows.sort(key=lambda row: (dtypes.index(row.dtype), row.elements))  # stable
            baselines = {row.direction: row.baseline for row in rows}
            lines += ["", op, *(f"  {way} against {what}" for way, what in baselines.items())]
            width = max(len("elements"), *(len(_size(row)) for row in rows))
            lines.append(
                f"  {'dtype':8}  {'elements':>{width}}  {'':8} {'median':>9} {'quartiles':>17}"
                f" {'GB/s':>6} {'of copy':>8} {'x eager':>8} {'x compile':>9}" + "".join(f" {'x ' + name:>6}" for name in peers)
            )
            above = ("", "")
            for row in rows:
                # Said once for all directions, so that the eye finds the groups.
                here = (row.dtype, _size(row))
                dtype, size = here if here != above else ("", "")
                above = here
                lines.append(
                    f"  {dtype:8}  {size:>{width}}  {row.direction:8} {_spread(row.ours)}"
                    f" {_number(row.gigabytes_per_second):>6} {row.share_of_copy:8.0%}"
                    f" {row.ratio_eager:8.2f} {_ratio(row.ratio_compiled):>9}"
                    + "".join(f" {_ratio(row.ratio_peers.get(name)):>6}" for name in peers)
                )
            if any(row.call for row in rows):
                lines += self._call_times(rows, width)
        if self.saved:
            lines += ["", *saved_table(self.saved)]
        return "\n".join([*lines, "", *self._summary(ops), *self.notes])

    def _peers(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.peers))

    @staticmethod
    def _call_times(rows: list[Measurement], width: int) -> Iterator[str]:
        yield "  wall time per call, of many calls in a row"
        yield f"  {'dtype':8}  {'elements':>{width}}  {'':8} {'median':>9} {'quartiles':>17} {'x eager':>8} {'x compile':>9}"
        for row in rows:
            if row.call and row.call_eager:
                compiled = row.call_compiled.median / row.call.median if row.call_compiled else None
                yield (
                    f"  {row.dtype:8}  {_size(row):>{width}}  {row.direction:8} {_spread(row.call)}"
                    f" {row.call_eager.median / row.call.median:8.2f} {_ratio(compiled):>9}"
                )

    def _summary(self, ops: list[str]) -> Iterator[str]:
        def mean(op: str | None, direction: str, name: str) -> float | None:
            rows = [row for row in self.rows if op in (row.op, None) and row.direction == direction]
            return _mean([_ratios(row).get(name) for row in rows])

        names = ["eager", "compile", *self._peers()]
        columns = [(way, name) for way in TENSORS_MOVED for name in names if mean(None, way, name) is not None]
        yield "geometric means of their time over ours"
        # A direction is said once, above its first column.
        yield f"  {'':16}" + "".join(f"  {way if name == names[0] else '':>8}" for way, name in columns)
        yield f"  {'':16}" + "".join(f"  {'x ' + name:>8}" for _, name in columns)
        for op in ops:
            yield f"  {op:16}" + "".join(f"  {_ratio(mean(op, *column)):>8}" for column in columns)


def compare(old: Report, new: Report) -> tuple[str, bool]:
    """A table of what changed since the old report, and whether to worry: because something
    became slower, or because nothing could be compared.
    """
    before = {_identity(row): row.ours for row in old.rows}
    pairs = [(before[key], row) for row in new.rows if (key := _identity(row)) in before]
    pairs.sort(key=lambda pair: pair[1].ours.median / pair[0].median, reverse=True)
    seconds = SLOWER_BY_SECONDS[new.environment["device"]]
    slower = [(was, row) for was, row in pairs if _is_slower(row.ours, was, seconds)]
    faster = [(was, row) for was, row in pairs if _is_slower(was, row.ours, seconds)]
    lines = [f"old: {old.title()}", f"new: {new.title()}", ""]
    for word, changed in (("slower", slower), ("faster", faster)):
        for was, row in changed:
            what = f"{row.op} {row.direction}, {row.dtype}, {_size(row)}"
            change = row.ours.median / was.median - 1
            lines.append(f"  {word} {change:+5.0%}  {duration(was)} -> {duration(row.ours)}  {what}")
    lines.append(
        f"{len(pairs)} of {len(new.rows)} rows compared, {len(slower)} slower and {len(faster)} "
        f"faster by {SLOWER_BY_SHARE:.0%} and {seconds * 1e6:.0f} us at least"
    )
    return "\n".join(lines), bool(slower) or not pairs


def _identity(row: Measurement) -> tuple[Any, ...]:
    return row.op, row.direction, row.dtype, *row.shape, row.dim


def _is_slower(one: Spread, other: Spread, seconds: float) -> bool:
    margin = max(other.median * SLOWER_BY_SHARE, seconds)
    return one.median - other.median > margin


def _ratios(row: Measurement) -> dict[str, float | None]:
    return {"eager": row.ratio_eager, "compile": row.ratio_compiled, **row.ratio_peers}


def _mean(ratios: list[float | None]) -> float | None:
    logarithms = [math.log(ratio) for ratio in ratios if ratio is not None]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def _size(row: Measurement) -> str:
    return row.label if row.dim is None else f"{row.label} {tuple(row.shape)}"


def _ratio(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _number(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _unit(spread: Spread) -> tuple[str, float]:
    return ("ms", 1e3) if spread.median >= 1e-3 else ("us", 1e6)


def duration(spread: Spread) -> str:
    unit, factor = _unit(spread)
    return f"{_number(spread.median * factor):>6} {unit}"


def _spread(spread: Spread) -> str:
    factor = _unit(spread)[1]
    q1, q3 = _number(spread.q1 * factor), _number(spread.q3 * factor)
    return f"{duration(spread)} {q1:>7} .. {q3:>6}"
