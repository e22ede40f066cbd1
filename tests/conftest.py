"""The axes of the suite: rows, dtypes, instruction sets, seeds. A test names an activation only if it alone has the property.

A parameter called `row`, `any_row` or `dtype` runs over all of them; `isa` runs over the instruction sets this CPU has and
puts the best one back. A randomly drawn input comes from the `generator` fixture, whose seed a failure prints;
FASTACT_TEST_SEED sets it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from fastact import _C, _registry

ELEMENTWISE = list(_registry.elementwise.values())
ALL_ROWS = [*ELEMENTWISE, _registry.softmax]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEED = int(os.environ.get("FASTACT_TEST_SEED", random.SystemRandom().randrange(2**31)))

BEST_ISA = _C.build_info()["isa"]
ISAS = _C.build_info()["isa_levels"][: _C.build_info()["isa_levels"].index(BEST_ISA) + 1]

# Parameters besides the defaults: both signs, zero, and values that are not powers of two.
EXTRA_PARAMETERS = {0: [], 1: [(0.2,), (0.0,), (1.5,), (-0.3,)], 2: [(4.0, 1.0), (-1.0, 1.0), (2.5, -0.7), (0.0, 1.0)]}


def parameter_sets(row: _registry.Row) -> list[tuple[float, ...]]:
    """The defaults, then values that try every branch."""
    return [tuple(row.parameters.values()), *EXTRA_PARAMETERS[len(row.parameters)]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
    if "any_row" in metafunc.fixturenames:
        metafunc.parametrize("any_row", ALL_ROWS, ids=lambda row: row.name)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", ISAS, indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    assert _C.use_isa(request.param)
    yield request.param
    _C.use_isa(BEST_ISA)


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    request.node.add_report_section("setup", "seed", f"FASTACT_TEST_SEED={SEED}")
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
