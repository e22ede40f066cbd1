"""The command line: `python -m fastact.bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from fastact import build_info
from fastact.bench.cases import DTYPES, QUICK_DTYPES, TENSORS_MOVED, make_cases, op_names
from fastact.bench.check import WrongResult
from fastact.bench.compiling import Compiler
from fastact.bench.environment import Neighbours, environment
from fastact.bench.measure import measure
from fastact.bench.peers import Peers
from fastact.bench.progress import with_progress
from fastact.bench.report import Report, compare
from fastact.bench.saved import saved_bytes

# By device and --quick: on a GPU torch.compile tries several kernels for every shape.
COMPILE_SECONDS = {"cpu": {True: 25.0, False: 150.0}, "cuda": {True: 60.0, False: 600.0}}
CASE_SECONDS = {True: 0.03, False: 0.1}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    # Whatever can fail is tried before the minutes of measuring.
    if options.plot and not find_spec("matplotlib"):
        parser.error("--plot needs matplotlib: pip install 'fastact[bench]'")
    if options.device == "cuda" and options.peers:
        parser.error("--peers measures on the CPU only")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch finds no CUDA device")
    if options.device == "cuda" and (missing := build_info()["cuda_missing"]):
        parser.error(f"--device cuda: this fastact was built without CUDA: {missing}")
    for path in filter(None, (options.json, options.plot)):
        if not path.absolute().parent.is_dir():
            parser.error(f"no such directory: {path.parent}")
    try:
        old = Report.load(options.compare) if options.compare else None
        report = Report.load(options.replot) if options.replot else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"not a report of this program: {error}")

    if report is None:
        if options.threads:
            torch.set_num_threads(options.threads)
        try:
            report = _run(options, arguments)
        except WrongResult as wrong:
            print(f"wrong result, so no more is timed: {wrong}", file=sys.stderr)
            return 1
    if not options.replot or not (options.plot or options.compare):
        print(report.table())
    if options.json:
        report.save(options.json)
    if options.plot:
        from fastact.bench.plot import plot  # matplotlib is optional

        plot(report, options.plot)
    if old:
        text, slower = compare(old, report)
        print(f"\n{text}")
        return int(slower)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastact.bench",
        description="Measures every activation against torch eager and torch.compile: forward, "
        "backward, and both through autograd. Every result is checked before it is timed.",
        epilog="Exit codes: 0 done; 1 a wrong result, or with --compare a slower row or nothing "
        "to compare; 2 a mistake in the command line.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few sizes and dtypes, under a minute")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--ops", nargs="+", choices=op_names(), metavar="OP", help=", ".join(op_names()))
    add("--dtypes", nargs="+", choices=DTYPES, metavar="DTYPE", help=", ".join(DTYPES))
    add("--json", type=Path, metavar="FILE", help="write the rows and the environment here")
    add("--plot", type=Path, metavar="FILE", help="write a PNG of the ratios (needs matplotlib)")
    add("--compare", type=Path, metavar="FILE", help="exit with 1 if a row is slower than in FILE")
    add("--from", dest="replot", type=Path, metavar="FILE", help="use these rows, measure nothing")
    add("--threads", type=int, metavar="N", help="threads torch and fastact use on the CPU")
    add("--compile-seconds", type=float, metavar="S", help="time for torch.compile, after which its column stays empty")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--peers", action="store_true", help="measure ONNX Runtime and JAX too, those that are installed (CPU)")
    return parser


def _run(options: argparse.Namespace, arguments: Sequence[str]) -> Report:
    dtypes = options.dtypes or (QUICK_DTYPES if options.quick else DTYPES)
    cases = make_cases(options.ops or op_names(), dtypes, options.quick, options.device)
    report = Report(environment(options.device, arguments), rows=[])
    neighbours = Neighbours()
    compiler = None
    if not options.no_compile:
        seconds = COMPILE_SECONDS[options.device][options.quick]
        compiler = Compiler(options.device, seconds if options.compile_seconds is None else options.compile_seconds)
        compiler.probe()
    peers = Peers() if options.peers else None
    try:
        report.saved = saved_bytes(cases, options.device)
        rows = measure(cases, options.device, CASE_SECONDS[options.quick], compiler, peers)
        for row in with_progress(rows, len(cases) * len(TENSORS_MOVED)):
            report.rows.append(row)
    except KeyboardInterrupt:
        report.notes.append("interrupted: the remaining rows were not measured")
    for competitors in (compiler, peers):
        report.notes += competitors.notes() if competitors else []
    report.notes += neighbours.notes()
    return report


if __name__ == "__main__":
    sys.exit(main())
