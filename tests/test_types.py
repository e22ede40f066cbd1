"""What `mypy --strict` says of a program that uses fastact: the types of right calls, and the errors of wrong ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import PUBLIC_ROWS

from fastact import _registry

ROOT = Path(__file__).parent.parent
HEAD = """
import torch
from torch import Tensor, nn

import fastact
import fastact.functional
from fastact import {names}

x = torch.ones(2, 3)
""".format(names=", ".join(row.name for row in PUBLIC_ROWS))
TENSOR = 'Revealed type is "torch._tensor.Tensor"'

# A line, and a pattern of what is said of it; None for nothing.
Line = tuple[str, str | None]


def of_row(row: _registry.Row) -> list[Line]:
    """Where the function is found, what it takes and gives; the module, which stands in for torch's."""
    name, module = row.name, row.class_name
    number = next(iter(row.parameters), None)
    wrong = [
        (f"fastact.{name}()", rf'Missing positional argument "x" in call to "{name}".*\[call-arg\]'),
        (f"fastact.{name}('x')", rf'Argument 1 to "{name}" has incompatible type "str"; expected "Tensor".*\[arg-type\]'),
        (f"fastact.{name}(x, other=1)", rf'Unexpected keyword argument "other" for "{name}".*\[call-arg\]'),
        (f"fastact.{name}(x).other", r"has no attribute \"other\".*\[attr-defined\]"),
        (f"text_of_{name}: str = fastact.{name}(x)", r"Incompatible types in assignment.*\[assignment\]"),
    ]
    if number:
        wrong += [
            (f"fastact.{name}(x, {number}='1')", rf'Argument "{number}" to "{name}" has incompatible type "str"'),
            (f"fastact.{module}({number}='1')", rf'Argument "{number}" to "{module}" has incompatible type "str"'),
        ]
    return [
        (f"reveal_type(fastact.{name}(x))", TENSOR),
        (f"reveal_type({name}(x))", TENSOR),
        (f"reveal_type(fastact.functional.{name}(x))", TENSOR),
        *((f"fastact.{name}(x, {number}=2)", None) for _ in range(bool(number))),
        (f"reveal_type(fastact.{module}())", f'Revealed type is "fastact.activations.{module}"'),
        (f"reveal_type(fastact.modules.{module}())", f'Revealed type is "fastact.activations.{module}"'),
        (f"reveal_type(fastact.{module}().forward(x))", TENSOR),
        (f"model = nn.Sequential(nn.Linear(3, 3), fastact.{module}())", None),
        (f"function_of_{name}: type[torch.autograd.Function] = fastact.autograd.{module}", None),
        *wrong,
    ]


SOFTMAX: list[Line] = [
    ("reveal_type(fastact.softmax(x, dim=1, dtype=torch.float64))", TENSOR),
    ("fastact.softmax(x, dim='1')", r'Argument "dim" to "softmax" has incompatible type "str"; expected "int \| None"'),
    ("fastact.softmax(x, axis=1)", r'Unexpected keyword argument "axis" for "softmax"'),
]
OTHERS: list[Line] = [
    ("fastact.no_such_activation(x)", r"has no attribute \"no_such_activation\".*\[attr-defined\]"),
    ("reveal_type(fastact.build_info()['torch'])", 'Revealed type is "Any"'),
    ("reveal_type(fastact.memory.stats()['hits'])", 'Revealed type is "(builtins.)?int"'),
    ("reveal_type(fastact.__version__)", 'Revealed type is "(builtins.)?str"'),
    ("def apply(layer: nn.Module) -> Tensor: return fastact.relu(layer.weight)", r"\[arg-type\]"),
]


def test_a_users_program(tmp_path: Path) -> None:
    lines = [line for row in PUBLIC_ROWS for line in of_row(row)] + SOFTMAX + OTHERS
    program = tmp_path / "program.py"
    program.write_text(HEAD + "".join(f"{code}\n" for code, _ in lines))
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--allow-redefinition",
        f"--cache-dir={ROOT / '.mypy_cache'}",
    ]
    made = subprocess.run(
        [*command, program], cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT)}, capture_output=True, text=True
    )
    said: dict[int, str] = {}
    for file, number, text in re.findall(r"^(.+?):(\d+): (?:error|note): (.+)$", made.stdout, re.M):
        if file.endswith(program.name):
            said[int(number)] = said.get(int(number), "") + text
        else:  # of a wrong call mypy also says where the function stands; of the package it says nothing else
            assert text.endswith("defined here"), f"{file}:{number}: {text}"
    assert said, made.stdout + made.stderr
    first = HEAD.count("\n") + 1
    for number, (code, expected) in enumerate(lines, first):
        if expected is None:
            assert number not in said, f"{code}: {said[number]}"
        else:
            assert re.search(expected, said.get(number, "")), f"{code}: {said.get(number, 'nothing is said')}"
    assert not {number for number in said if number < first}
