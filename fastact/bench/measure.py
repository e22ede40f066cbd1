"""The measurement itself: check, compile, time; one row per case and direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fastact.bench.cases import TENSORS_MOVED, Case, Inputs, sides
from fastact.bench.check import check
from fastact.bench.compiling import Compiler
from fastact.bench.peers import Peers
from fastact.bench.timing import Call, CallTimer, CpuTimer, CudaTimer, Spread

# Up to here the wall time of a call is reported beside the time on a GPU: there the launch is most of it.
CALL_ELEMENTS = 65536


@dataclass(frozen=True)
class Measurement:
    """A row of the report. Ratios are torch's median over ours: above 1, fastact is faster."""

    op: str
    direction: str
    dtype: str
    label: str
    shape: list[int]
    dim: int | None
    elements: int
    baseline: str
    ours: Spread
    eager: Spread
    compiled: Spread | None
    gigabytes_per_second: float
    share_of_copy: float
    ratio_eager: float
    ratio_compiled: float | None
    # Wall times per call, for small tensors on a GPU: there the others are those of the device.
    call: Spread | None = None
    call_eager: Spread | None = None
    call_compiled: Spread | None = None
    # The same op in other libraries, by their short names.
    peers: dict[str, Spread] = field(default_factory=dict)

    @property
    def ratio_peers(self) -> dict[str, float]:
        return {name: spread.median / self.ours.median for name, spread in self.peers.items()}


def measure(
    cases: Iterable[Case],
    device: str,
    seconds: float,
    compiler: Compiler | None = None,
    peers: Peers | None = None,
) -> Iterator[Measurement]:
    """Yields three rows per case, each timed for about `seconds`; raises WrongResult."""
    timer = CudaTimer() if device == "cuda" else CpuTimer()
    inputs, made_for = None, None
    for case in cases:
        if inputs is None or made_for != (case.dtype, case.shape):
            inputs = None  # lets go of the old tensors before there are new ones
            inputs, made_for = Inputs(case, device), (case.dtype, case.shape)
        directions = sides(case, inputs)
        check(case, inputs, directions)
        for direction, side in directions.items():
            calls: dict[str, Call] = {"ours": side.ours, "eager": side.eager}
            if compiler and (compiled := compiler(side)):
                calls["compiled"] = compiled
            walls: dict[str, Spread] = {}
            if device == "cuda" and case.elements <= CALL_ELEMENTS:
                walls = CallTimer()(calls, seconds)
            calls["copy"] = inputs.copy(direction)
            times = timer(calls, seconds)
            rivals = peers(case, inputs, direction, side.ours) if peers else {}
            ours, compiled_time = times["ours"], times.get("compiled")
            moved = TENSORS_MOVED[direction] * case.elements * inputs.x.element_size()
            yield Measurement(
                op=case.row.name,
                direction=direction,
                dtype=case.dtype,
                label=case.label,
                shape=list(case.shape),
                dim=case.dim,
                elements=case.elements,
                baseline=side.baseline,
                ours=ours,
                eager=times["eager"],
                compiled=compiled_time,
                gigabytes_per_second=moved / ours.median * 1e-9,
                share_of_copy=times["copy"].median / ours.median,
                ratio_eager=times["eager"].median / ours.median,
                ratio_compiled=compiled_time.median / ours.median if compiled_time else None,
                call=walls.get("ours"),
                call_eager=walls.get("eager"),
                call_compiled=walls.get("compiled"),
                peers={name: timer.stranger(call, seconds / 2) for name, call in rivals.items()},
            )
