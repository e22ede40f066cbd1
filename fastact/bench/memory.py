"""Large outputs under what can be set about memory: `python -m fastact.bench.memory --help`.

From some MiB on, the time goes into the pages of a fresh output rather than into its elements. Torch and fastact can each be
told to do something about that, by environment variables that they read once: so every setting has a process of its own. These
take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fastact._registry import elementwise
from fastact.bench.cases import Case, Inputs, Sides, sides
from fastact.bench.check import WrongResult, check
from fastact.bench.environment import Neighbours, environment
from fastact.bench.processes import Worker
from fastact.bench.report import Report, duration, save
from fastact.bench.timing import CpuTimer, Spread

# Whose call is timed, and the variables it is timed under; those that a setting does not name are not set.
SETTINGS: dict[str, tuple[str, dict[str, str]]] = {
    "torch": ("eager", {}),
    "torch, THP": ("eager", {"THP_MEM_ALLOC_ENABLE": "1"}),
    "neither": ("ours", {"FASTACT_POOL_LIMIT": "0", "FASTACT_HUGE_PAGES": "0"}),
    "huge pages": ("ours", {"FASTACT_POOL_LIMIT": "0"}),
    "pool": ("ours", {}),
}
VARIABLES = sorted({name for _, variables in SETTINGS.values() for name in variables})
COPY = "copy_"  # into a tensor that is there, of as many bytes as the op has to move: no page of it is fresh

CALLS = (("relu", "forward"), ("sigmoid", "forward"), ("relu", "backward"))
SIZES = (1 << 20, 1 << 22, 1 << 25)
ROUNDS = 15
THP_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True)
class Row:
    op: str
    direction: str
    elements: int
    times: dict[str, Spread]  # by setting, and of the copy


@lru_cache(maxsize=1)  # the tensors of one size at a time
def _prepare(elements: int) -> tuple[Inputs, dict[str, dict[str, Sides]]]:
    cases = {op: Case(elementwise[op], "float32", f"{elements:,}", (elements,)) for op, _ in CALLS}
    inputs = Inputs(next(iter(cases.values())), "cpu")
    directions = {op: sides(case, inputs) for op, case in cases.items()}
    for op, case in cases.items():
        check(case, inputs, directions[op])
    return inputs, directions


def sample(op: str, direction: str, elements: int, whose: str) -> float:
    """Seconds per call in this process, of which the first does not count."""
    inputs, directions = _prepare(elements)
    call = inputs.copy(direction) if whose == COPY else getattr(directions[op][direction], whose)
    return CpuTimer().prepare(call)()


def measure(sizes: Sequence[int], rounds: int, threads: int) -> Iterator[Row]:
    """Raises WrongResult."""
    with ExitStack() as stack:
        workers = {}
        for name, (_, variables) in SETTINGS.items():
            workers[name] = stack.enter_context(Worker(dict.fromkeys(VARIABLES) | variables))
            workers[name](torch.set_num_threads, threads)
        sources = [(name, workers[name], whose) for name, (whose, _) in SETTINGS.items()]
        # A setting has nothing to do with the copy: the first process takes it.
        sources.append((COPY, sources[0][1], COPY))
        for elements in sizes:
            for op, direction in CALLS:
                times: dict[str, list[float]] = {name: [] for name, _, _ in sources}
                for _ in range(rounds):
                    for name, worker, whose in sources:
                        times[name].append(worker(sample, op, direction, elements, whose))
                yield Row(op, direction, elements, {name: Spread.of(samples) for name, samples in times.items()})


def table(rows: Sequence[Row]) -> Iterator[str]:
    names = list(rows[0].times)
    yield f"{'output':>10}  {'':16}" + "".join(f"{name:>12}" for name in names)
    for row in rows:
        size = f"{row.elements * 4 / 2**20:,.4g} MiB"
        yield f"{size:>10}  {row.op + ' ' + row.direction:16}" + "".join(f"{duration(row.times[name]):>12}" for name in names)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    settings = (
        f"{name}: {' '.join(f'{key}={value}' for key, value in variables.items()) or 'nothing set'}"
        for name, (_, variables) in SETTINGS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m fastact.bench.memory",
        description="Times calls with large float32 outputs under what can be set about memory, each setting in a process of "
        "its own. " + "; ".join(settings) + "; copy_: of as many bytes, into a tensor that is there.",
        epilog="Exit codes: 0 done; 1 a wrong result; 2 a mistake in the command line.",
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=SIZES, metavar="ELEMENTS", help="default: %(default)s")
    add("--rounds", type=int, default=ROUNDS, metavar="N", help="samples of every call, default: %(default)s")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the rows and the environment here")
    options = parser.parse_args(arguments)
    if min(*options.sizes, options.threads, options.rounds - 1) < 1:
        parser.error("--sizes and --threads must be at least 1, --rounds at least 2")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"no such directory: {options.json.parent}")

    torch.set_num_threads(options.threads)
    about = environment("cpu", arguments, "python -m fastact.bench.memory")
    about["transparent_hugepage"] = THP_MODE.read_text().strip() if THP_MODE.exists() else None
    neighbours = Neighbours()
    try:
        rows = list(measure(options.sizes, options.rounds, options.threads))
    except WrongResult as wrong:
        print(f"wrong result, so no more is timed: {wrong}", file=sys.stderr)
        return 1
    notes = neighbours.notes()
    print(Report(about, []).title())
    print(f"transparent huge pages: {about['transparent_hugepage']}\n")
    print("\n".join([*table(rows), *notes]))
    if options.json:
        save(options.json, environment=about, notes=notes, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
