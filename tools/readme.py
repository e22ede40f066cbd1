"""Writes the generated blocks of the documents: activations from the rows, the reference from docstrings, verdicts from their
rules, speeds from benchmark runs, and what `make matrix` found.

    python tools/readme.py             writes them
    python tools/readme.py --check     exits 1 if a document does not hold what this would write

A block stands between `<!-- name -->` and `<!-- end name -->`. Speeds come from benchmarks/results, whose files are written by

    python -m fastact.bench --peers --json benchmarks/results/cpu.json --plot benchmarks/results/cpu.png
    python -m fastact.bench --threads 1 --no-compile --dtypes float32 bfloat16 float16 \\
        --json benchmarks/results/cpu-1-thread.json
    python -m fastact.bench.channels --json benchmarks/results/channels.json
    python -m fastact.bench.sight --rounds 11 --json benchmarks/results/sight.json
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import fastact
from fastact import _registry
from fastact.bench import channels, sight
from fastact.bench.cases import TENSORS_MOVED
from fastact.bench.report import Report
from fastact.bench.timing import Spread
from fastact.sight import verdicts

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MATRIX = ROOT / "docs" / "matrix.md"

DIRECTIONS = "forward / backward / both through autograd"
PEERS = {"ort": "ONNX Runtime", "jax": "JAX"}
# The functions without a row, and their modules.
CHANNELS = {"prelu": "PReLU", "channel_scaled_sigmoid": "ScaledSigmoid(learnable=True)", "maxout": "Maxout"}
# A small, a middle and a large tensor: one call, one cache, and memory.
SHOWN = {"64": "64", "100,000": "100,000", "33,554,432": "33 million"}


def sentence(doc: str, word: str) -> str:
    """What follows `word:` in a docstring, up to the end of the sentence."""
    match = re.search(rf"{word}: (.+?)\.(?:\s|$)", doc, re.S)
    return re.sub(r"\s+", " ", match[1]) if match else ""


def facts(function: Callable[..., Any]) -> dict[str, str]:
    """What the docstring of an activation says of it, in short."""
    doc = inspect.getdoc(function) or ""
    promised = re.match(r"(?:at most )?(none|[\d.]+ ULP)", sentence(doc, "Error"))
    return {
        "formula": re.split(r",? (?:elementwise|along)", doc, maxsplit=1)[0],
        "error": promised[1] if promised else "stated there",
    }


def arguments(function: Callable[..., Any]) -> str:
    """Names and defaults, without their types and the `*args` of modules that take none."""
    named = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return f"({', '.join(p.name if p.default is p.empty else f'{p.name}={p.default!r}' for p in named)})"


def table_line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def head(*cells: str) -> list[str]:
    return [table_line(*cells), "|" + " --- |" * len(cells)]


def activations() -> str:
    modules = {name: row.class_name for name, row in _registry.rows.items()} | CHANNELS
    lines = head("function", "module", "formula", "error")
    for name, module in modules.items():
        function = getattr(fastact, name)
        call = f"[`{name}{arguments(function)}`](docs/activations.md#{name})"
        lines.append(table_line(call, f"`{module}`", *facts(function).values()))
    return "\n".join(lines)


def common(module: ModuleType) -> str:
    """What the docstring of a module says of all its functions: its list."""
    doc = inspect.getdoc(module) or ""
    return doc[doc.index("- **") :]


def rows() -> str:
    """A section for each row."""
    return "\n\n".join(
        section(
            row.name,
            row.class_name,
            f"![{row.name} and its derivative](plots/{row.name}.svg)",
            ("autograd Function", f"`fastact.autograd.{row.class_name}`"),
        )
        for row in _registry.rows.values()
    )


def section(name: str, call: str, plot: str = "", *more: tuple[str, str]) -> str:
    """Of an activation: its plot, its names, and its docstring, taken apart. `call`: its module, with arguments if it has a
    section of its own elsewhere."""
    function = getattr(fastact, name)
    module = None if "(" in call else getattr(fastact, call)
    first, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
    labels = ("Gradient", "Saved", "Shape", "Shape and dtype", "Error")
    said = {label: sentence(rest, label) for label in labels}
    table = [
        ("module", f"`fastact.{call}{arguments(module) if module else ''}`"),
        *more,
        ("ops", f"`torch.ops.fastact.{name}`, `torch.ops.fastact.{name}_backward`"),
        *((label.lower(), text) for label, text in (said | {"Saved": said["Saved"] or "the output"}).items() if text),
    ]
    lines = [*head(*table[0]), *(table_line(*line) for line in table[1:])]
    notes = re.sub(rf"\b(?:{'|'.join(labels)}): .+?\.(?:\s+|$)", "", rest, flags=re.S).strip()
    of_module = (inspect.getdoc(module) or "").partition("\n\n")[2] if module else ""
    parts = [
        f"## {name}",
        f"`fastact.{name}{arguments(function)}`",
        re.sub(r"\s+", " ", first).replace(": `torch", ", as `torch"),
        plot,
        "\n".join(lines),
        notes,
        of_module and f"**The module.** {of_module}",
    ]
    return "\n\n".join(filter(None, parts))


def channel_sections() -> str:
    return "\n\n".join("#" + section(name, module) for name, module in CHANNELS.items())


def reference(*names: str) -> str:
    """Of what `fastact` has under these names: signatures and docstrings, and those of the methods of a class."""
    parts = []
    for name in names:
        thing = attrgetter(name)(fastact)
        parts.append(f"### fastact.{name}")
        if inspect.isfunction(thing):
            parts.append(f"`fastact.{name}{typed(thing)}`")
        parts.append(inspect.getdoc(thing) or "")
        for member, method in vars(thing).items() if inspect.isclass(thing) else ():
            if isinstance(method, FunctionType | property) and not member.startswith("_"):
                parts.append(f"**`{member}{typed(method, 1) if isinstance(method, FunctionType) else ''}`**")
                parts.append(inspect.getdoc(method) or "")
    return "\n\n".join(parts)


def typed(function: FunctionType, skipped: int = 0) -> str:
    """The signature, without its first parameters, and without quotes around the types."""
    signature = inspect.signature(function)
    rest = list(signature.parameters.values())[skipped:]
    return re.sub(r"(?<=: |> )'([^']+)'", r"\1", str(signature.replace(parameters=rest)))


def kinds() -> str:
    """The verdicts with the docstrings of their rules."""
    lines = head("verdict", "when")
    found: list[str] = []
    for rule in verdicts.RULES:
        given = [kind for kind in verdicts.KINDS if f'"{kind}"' in inspect.getsource(rule)]
        found += given
        doc = re.sub(r"\s+", " ", inspect.getdoc(rule) or "")
        lines.append(table_line(", ".join(given), re.sub(r"\b[A-Z]{4,}(?:_[A-Z]+)*\b", r"`\g<0>`", doc)))
    assert found == list(verdicts.KINDS)
    return "\n".join(lines)


def thresholds() -> str:
    """The constants that rules name, with the comments above them."""
    lines = head("threshold", "", "reason")
    for comment, name, value in re.findall(r"((?:^# .+\n)+)([A-Z_]+) = ([\d.e-]+)$", inspect.getsource(verdicts), re.M):
        lines.append(table_line(f"`{name}`", value, re.sub(r"\s*^# ", " ", comment, flags=re.M).strip()))
    return "\n".join(lines)


def speeds() -> str:
    report = Report.load(RESULTS / "cpu.json")
    dtypes = ["float32", "bfloat16"]
    ratios = {(row.op, row.label, row.dtype, row.direction): row.ratio_eager for row in report.rows}
    elementwise = [op for op in _registry.elementwise if (op, "64", dtypes[0], "forward") in ratios]
    columns = [(label, dtype) for label in SHOWN for dtype in dtypes]
    lines = [f"{report.title()}. Torch's median time over fastact's in one run, by elements and dtype: {DIRECTIONS}.", ""]
    lines += head("", *(f"{SHOWN[label]}, {dtype}" for label, dtype in columns))
    lines += [table_line(op, *(ratio(ratios, op, label, dtype) for label, dtype in columns)) for op in elementwise]
    for op in _registry.along_dim:
        shapes = [row for row in report.rows if row.op == op and row.dtype == dtypes[0] and row.direction == "forward"]
        if shapes:
            lines += ["", *head(op, "shape, dim", *dtypes)]
        for row in shapes:
            cells = [ratio(ratios, op, row.label, dtype) for dtype in dtypes]
            lines.append(table_line(row.label, f"{tuple(row.shape)}, {row.dim}", *cells))
    return "\n".join([*lines, "", *rivals(report)])


def one_thread() -> str:
    """In cache, a line for each op."""
    report = Report.load(RESULTS / "cpu-1-thread.json")
    rows = [row for row in report.rows if row.label == "100,000"]
    ratios = {(row.op, row.label, row.dtype, row.direction): row.ratio_eager for row in rows}
    ops, dtypes = dict.fromkeys(row.op for row in rows), dict.fromkeys(row.dtype for row in rows)
    lines = [f"{report.title()}. {DIRECTIONS.capitalize()}.", "", *head("", *dtypes)]
    lines += [table_line(op, *(ratio(ratios, op, "100,000", dtype) for dtype in dtypes)) for op in ops]
    return "\n".join(lines)


def rivals(report: Report) -> list[str]:
    """Every kernel row of the run against everything measured beside it."""
    lines = head("forward and backward rows against", "rows", "median", "worst", "below 1.0")
    against: dict[str, list[tuple[float, str]]] = {}
    for row in report.rows:
        if row.direction == "both":
            continue
        others = {"torch": row.eager, "torch.compile": row.compiled, **{PEERS[name]: row.peers[name] for name in row.peers}}
        for name, other in others.items():
            if other:
                what = f"{row.op} {row.direction}, {row.dtype}, {row.label}"
                against.setdefault(name, []).append((other.median / row.ours.median, what))
    for name, ratios in against.items():
        ratios.sort()
        least, what = ratios[0]
        below = sum(ratio < 1 for ratio, _ in ratios)
        median = ratios[len(ratios) // 2][0]
        lines.append(f"| {name} | {len(ratios)} | {median:.1f} | {least:.2f} ({what}) | {below} |")
    return lines


def ratio(ratios: dict[tuple[str, str, str, str], float], op: str, label: str, dtype: str) -> str:
    return " / ".join(f"{ratios[op, label, dtype, direction]:.1f}" for direction in TENSORS_MOVED)


def channel_speeds() -> str:
    about, rows = recorded("channels.json")
    lines = [channels.Row(**row | {side: Spread(**row[side]) for side in ("ours", "torch")}).line() for row in rows]
    return "\n".join([about, "", channels.HEAD, *lines])


def cost() -> str:
    about, rows = recorded("sight.json")
    return "\n".join([about, "", sight.HEAD, *(sight.Row(**row).line() for row in rows)])


def recorded(name: str) -> tuple[str, list[dict[str, Any]]]:
    """Where and when a file of results was made, and its rows."""
    data = json.loads((RESULTS / name).read_text())
    return Report(data["environment"], [], []).title() + ".", data["rows"]


def matrix() -> str:
    """The table of docs/matrix.md, a line for each Python."""
    found = re.findall(r"^\| (3\.\d+)\S* \| (\d+\.\d+)\S* \| (.+?) \|", MATRIX.read_text(), re.M)
    outcomes = {(python, torch): outcome for python, torch, outcome in found}
    torches = sorted({torch for _, torch in outcomes}, key=version)
    lines = head("Python", *(f"torch {torch}" for torch in torches))
    for python in sorted({python for python, _ in outcomes}, key=version):
        lines.append(table_line(python, *(outcomes.get((python, torch), "not tried") for torch in torches)))
    return "\n".join(lines)


def version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


BLOCKS = {
    "README.md": {"activations": activations, "speeds": speeds, "matrix": matrix},
    "docs/activations.md": {
        "common": partial(common, fastact.activations),
        "rows": rows,
        "channels-common": partial(common, fastact.channels),
        "channels": channel_sections,
    },
    "docs/performance.md": {"one-thread": one_thread, "channels": channel_speeds},
    "docs/reference.md": {
        "monitoring": partial(reference, "monitor", "sight.Watch", "sight.Report", "gradient_images"),
        "swapping": partial(reference, "patch", "unpatch", "functional_patch", "swap.Report", "swap.Entry"),
        "compiling": partial(reference, "compiler.opaque"),
        "memory": partial(reference, "memory", "memory.limit", "memory.empty_cache", "memory.stats"),
        "build": partial(reference, "build_info"),
    },
    "docs/sight.md": {"cost": cost, "kinds": kinds, "thresholds": thresholds},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for document, blocks in BLOCKS.items():
        path = ROOT / document
        text = new = path.read_text()
        for name, make in blocks.items():
            if f"<!-- {name} -->" not in text:
                sys.exit(f"{document} has no block {name}")
            block = f"<!-- {name} -->\n{make()}\n<!-- end {name} -->"
            new = re.sub(rf"<!-- {name} -->.*<!-- end {name} -->", lambda _, block=block: block, new, flags=re.S)
        if check and new != text:
            sys.exit(f"{document} is not what tools/readme.py writes: run it")
        if not check:
            path.write_text(new)


if __name__ == "__main__":
    main()
