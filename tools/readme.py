"""Writes the generated blocks of the documents: activations from the rows, speeds from benchmark runs, and what `make matrix`
found.

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
from pathlib import Path
from typing import Any

from fastact import _registry
from fastact import activations as activations_module
from fastact.bench import channels, sight
from fastact.bench.cases import TENSORS_MOVED
from fastact.bench.report import Report
from fastact.bench.timing import Spread

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MATRIX = ROOT / "docs" / "matrix.md"

DIRECTIONS = "forward / backward / both through autograd"
PEERS = {"ort": "ONNX Runtime", "jax": "JAX"}
# A small, a middle and a large tensor: one call, one cache, and memory.
SHOWN = {"64": "64", "100,000": "100,000", "33,554,432": "33 million"}


def sentence(doc: str, word: str) -> str:
    """What follows `word:` in a docstring, up to the end of the sentence."""
    match = re.search(rf"{word}: (.+?)\.(?:\s|$)", doc, re.S)
    return re.sub(r"\s+", " ", match[1]) if match else ""


def facts(row: _registry.Row) -> dict[str, str]:
    """What the docstring of a row says of it, and its promise."""
    doc = inspect.getdoc(row.function) or ""
    return {
        "formula": re.split(r",? (?:elementwise|along)", doc, maxsplit=1)[0],
        "gradient": sentence(doc, "Gradient").partition(", at most")[0],
        "saved": sentence(doc, "Saved").partition(",")[0].replace("the output; for", "output; for") or "output",
        "error": "none" if row.ulp == 0 else f"{row.ulp:g} ULP" if row.ulp else "see docstring",
    }


def call(row: _registry.Row) -> str:
    return f"{row.name}{inspect.signature(row.function)}"


def constructor(row: _registry.Row) -> str:
    """The arguments of the module, without their types and the `*args` of those that take none."""
    named = inspect.signature(getattr(activations_module, row.class_name)).parameters.values()
    return f"({', '.join(f'{p.name}={p.default!r}' for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)})"


def table_line(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def activations() -> str:
    lines = ["| function | module | formula | gradient | saved | error |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [table_line(f"`{call(row)}`", f"`{row.class_name}`", *facts(row).values()) for row in _registry.rows.values()]
    return "\n".join(lines)


LABELS = r"(?:Gradient|Saved|Shape|Shape and dtype|Error)"


def common() -> str:
    """What the docstring of fastact.activations says of all functions: its list."""
    doc = inspect.getdoc(activations_module) or ""
    return doc[doc.index("- **") :]


def rows() -> str:
    """A section for each row: its plot, its names, and its docstring, taken apart."""
    parts = []
    for row in _registry.rows.values():
        head, _, rest = (inspect.getdoc(row.function) or "").partition("\n\n")
        notes = re.sub(rf"\b{LABELS}: .+?\.(?:\s+|$)", "", rest, flags=re.S).strip()
        said = {label: sentence(rest, label) for label in ("Gradient", "Saved", "Shape", "Shape and dtype", "Error")}
        table = [
            ("module", f"`fastact.{row.class_name}{constructor(row)}`"),
            ("autograd Function", f"`fastact.autograd.{row.class_name}`"),
            ("ops", f"`torch.ops.fastact.{row.name}`, `torch.ops.fastact.{row.name}_backward`"),
            *((label.lower(), text) for label, text in (said | {"Saved": said["Saved"] or "the output"}).items() if text),
        ]
        lines = [
            f"## {row.name}",
            "",
            f"`fastact.{call(row)}`",
            "",
            re.sub(r"\s+", " ", head).replace(": `torch", ", as `torch"),
            "",
        ]
        lines += [f"![{row.name} and its derivative](plots/{row.name}.svg)", ""]
        lines += [table_line(*table[0]), "| --- | --- |", *(table_line(*line) for line in table[1:])]
        parts.append("\n".join([*lines, *(["", notes] if notes else [])]))
    return "\n\n".join(parts)


def speeds() -> str:
    report = Report.load(RESULTS / "cpu.json")
    dtypes = ["float32", "bfloat16"]
    ratios = {(row.op, row.label, row.dtype, row.direction): row.ratio_eager for row in report.rows}
    elementwise = [op for op in _registry.elementwise if (op, "64", dtypes[0], "forward") in ratios]
    lines = [f"{report.title()}. Torch's median time over fastact's in one run: {DIRECTIONS}.", ""]
    lines += ["| elements | dtype | " + " | ".join(elementwise) + " |", "| --- | --- |" + " --- |" * len(elementwise)]
    for label, shown in SHOWN.items():
        for dtype in dtypes:
            cells = [ratio(ratios, op, label, dtype) for op in elementwise]
            lines.append(f"| {shown} | {dtype} | " + " | ".join(cells) + " |")
    for op in _registry.along_dim:
        shapes = [row for row in report.rows if row.op == op and row.dtype == dtypes[0] and row.direction == "forward"]
        if shapes:
            lines += ["", f"| {op} | shape, dim | " + " | ".join(dtypes) + " |", "| --- | --- | --- | --- |"]
        for row in shapes:
            cells = [ratio(ratios, op, row.label, dtype) for dtype in dtypes]
            lines.append(f"| {row.label} | {tuple(row.shape)}, {row.dim} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *rivals(report)])


def one_thread() -> str:
    """In cache, a line for each op."""
    report = Report.load(RESULTS / "cpu-1-thread.json")
    rows = [row for row in report.rows if row.label == "100,000"]
    ratios = {(row.op, row.label, row.dtype, row.direction): row.ratio_eager for row in rows}
    ops, dtypes = dict.fromkeys(row.op for row in rows), dict.fromkeys(row.dtype for row in rows)
    lines = [f"{report.title()}. {DIRECTIONS.capitalize()}.", "", table_line("", *dtypes), "| --- |" + " --- |" * len(dtypes)]
    lines += [table_line(op, *(ratio(ratios, op, "100,000", dtype) for dtype in dtypes)) for op in ops]
    return "\n".join(lines)


def rivals(report: Report) -> list[str]:
    """Every kernel row of the run against everything measured beside it."""
    lines = ["| forward and backward rows against | rows | median | worst | below 1.0 |", "| --- | --- | --- | --- | --- |"]
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
    lines = [table_line("Python", *(f"torch {torch}" for torch in torches)), "| --- |" + " --- |" * len(torches)]
    for python in sorted({python for python, _ in outcomes}, key=version):
        lines.append(table_line(python, *(outcomes.get((python, torch), "not tried") for torch in torches)))
    return "\n".join(lines)


def version(text: str) -> list[int]:
    return [int(part) for part in text.split(".")]


BLOCKS = {
    "README.md": {"activations": activations, "speeds": speeds, "matrix": matrix},
    "docs/activations.md": {"common": common, "rows": rows},
    "docs/performance.md": {"one-thread": one_thread, "channels": channel_speeds},
    "docs/sight.md": {"cost": cost},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    for document, blocks in BLOCKS.items():
        path = ROOT / document
        text = new = path.read_text()
        for name, make in blocks.items():
            block = f"<!-- {name} -->\n{make()}\n<!-- end {name} -->"
            new = re.sub(rf"<!-- {name} -->.*<!-- end {name} -->", lambda _, block=block: block, new, flags=re.S)
        if check and new != text:
            sys.exit(f"{document} is not what tools/readme.py writes: run it")
        if not check:
            path.write_text(new)


if __name__ == "__main__":
    main()
