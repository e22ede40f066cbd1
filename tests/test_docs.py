"""The documents say what is there: generated blocks are current, links lead somewhere, snippets run."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastact
from fastact import _registry

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import activation_plots  # noqa: E402

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_generated_blocks_are_current() -> None:
    made = subprocess.run([sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # forward mode in torch
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_snippets_run(document: Path) -> None:
    for snippet in re.findall(r"```python\n(.*?)```", document.read_text(), re.S):
        exec(compile(snippet, document.name, "exec"), {})


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join((ROOT / "docs" / name).read_text() for name in ("activations.md", "reference.md"))
    for module in (fastact, fastact.compiler, fastact.memory, fastact.sight, fastact.swap):
        for name in module.__all__:
            described = inspect.ismodule(getattr(module, name)) or re.search(
                rf"`fastact\.{name}\(|^### \S+\.{name}$", text, re.M
            )
            assert described, f"{module.__name__}.{name}"


def test_linked_tests_exist() -> None:
    """docs/expectations.md says of every cell which test shows it."""
    found = re.findall(r"\[(test_\w+)\]\(\.\./(tests/\w+\.py)\)", (ROOT / "docs" / "expectations.md").read_text())
    assert len(found) >= 40
    for name, file in found:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file} has no {name}"


def test_the_site_has_every_document() -> None:
    """mkdocs.yml names each file of docs/ once; `make docs` finds the rest: broken links and anchors."""
    named = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    made = ["index.md", "contributing.md", "changelog.md"]
    assert sorted(named) == sorted([*made, *(path.name for path in ROOT.glob("docs/*.md"))])


def test_every_activation_has_its_plot(public_row: _registry.Row) -> None:
    """What each legend would say stands in the file; else it was drawn for another row: run tools/activation_plots.py."""
    plot = (ROOT / "docs" / "plots" / f"{public_row.name}.svg").read_text()
    assert public_row.name in plot
    for label in activation_plots.labels(public_row):
        assert label in plot


def test_the_design_names_every_source_file() -> None:
    """docs/design.md names the files of the house; a name without a folder belongs to the folder of the one before it."""
    folder, named = ROOT, set()
    for cell in re.findall(r"^\| (`.+?`) \|", (ROOT / "docs" / "design.md").read_text(), re.M):
        for name in re.findall(r"`([^`]+)`", cell):
            path = ROOT / name if "/" in name or (ROOT / name).exists() else folder / name
            folder = path.parent
            assert path.exists(), name
            named.add(path)
    files = [path for house in ("csrc", "fastact", "tools", "examples") for path in (ROOT / house).rglob("*")]
    sources = {path for path in files if path.suffix in {".h", ".cpp", ".cu", ".py", ".pyi"}}
    missing = sources - named - {ROOT / "fastact" / "_built.py"}  # which setup.py writes
    assert not missing, sorted(str(path.relative_to(ROOT)) for path in missing)


def test_contributing_shows_what_was_done() -> None:
    """Every line that the diff adds stands in the file it names (formatters may have broken long ones)."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    diff = text[text.index("```diff") : text.index("```", text.index("```diff") + 3)]
    files = set(re.findall(r"^\+\+\+ b/(\S+)", diff, re.M))
    assert len(files) == 2
    present = "".join("".join((ROOT / name).read_text().split()) for name in files).replace("\\", "")
    for line in re.findall(r"^\+(?!\+\+)(.*)$", diff, re.M):
        assert "".join(line.split()).replace("\\", "") in present, line
