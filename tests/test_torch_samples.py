"""torch's own samples of its activations, run through ours: what torch asks of an implementation of its operators."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL_ROWS, DEVICE, ELEMENTWISE, SEED
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastact import _registry

# torch itself calls it, the first time that forward mode is used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

# Those that torch has too, and so has samples of; `softmax` has a second description, with a dtype.
each_row_of_torch = pytest.mark.parametrize(
    "row_of_torch", [row for row in ALL_ROWS if hasattr(F, row.name)], ids=lambda row: row.name
)


@pytest.fixture(scope="module")
def op_db() -> list[Any]:
    """torch's descriptions of its operators.

    They are made for torch's own test runs: importing them takes seconds, forbids to change flags of torch.backends, replaces
    two methods and sets environment variables. So this is done late, and what it changes is put back for the tests that follow.
    """
    pytest.importorskip("expecttest", reason="torch's samples import expecttest: pip install 'fastact[test]'")
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ), warnings.catch_warnings():
        patch.setattr(torch.backends, "disable_global_flags", lambda: None)
        for replaced in (torch._C.ScriptFunction, torch._C.ScriptMethod):
            patch.setattr(replaced, "__call__", replaced.__call__)
        warnings.filterwarnings("ignore", "Fail to import hypothesis", ImportWarning)
        from torch.testing._internal.common_methods_invocations import op_db

    return op_db


@pytest.fixture
def drawn(generator: torch.Generator) -> Iterator[torch.Generator]:
    """The samples come from torch's global generator: seeded as the others are, and put back."""
    with torch.random.fork_rng(devices=[] if DEVICE == "cpu" else [0]):
        torch.manual_seed(SEED)
        yield generator


def descriptions(op_db: list[Any], row: _registry.Row) -> list[Any]:
    found = [info for info in op_db if info.name in (row.name, f"nn.functional.{row.name}")]
    assert found, f"torch describes no operator {row.name}"
    return found


def assert_close(actual: Tensor, expected: Tensor, x: Tensor, about: str, *, gradient: bool = False) -> None:
    """Within torch's own tolerance for the dtype; the message names the first element that is not."""
    rtol, atol = torch.testing._comparison.default_tolerances(actual, expected)
    if gradient and actual.dtype.itemsize == 2:
        # The output is kept rounded to the dtype. A gradient that is a small difference of terms of the size of dy, which is at
        # most 1 here, shows that rounding in full, and the two outputs need not be rounded alike.
        atol = rtol

    def message(text: str) -> str:
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            return f"{about}: {text}"
        wrong = ~torch.isclose(actual, expected, rtol, atol, equal_nan=True)
        index = tuple(wrong.nonzero()[0].tolist())
        element = [t.detach()[index].item() for t in (x, expected, actual)]
        return "{} {} at {}: x={!r} expected={!r} actual={!r}\n{}".format(about, actual.dtype, index, *element, text)

    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True, msg=message)


def decided_at_nan(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> bool:
    """Whether torch's gradient at NaN is the same in its vector loop as in the tail of that: not so for elu."""
    x = torch.full((65,), torch.nan, dtype=dtype, requires_grad=True)
    (dx,) = torch.autograd.grad(function(x), x, torch.ones_like(x))
    return len(set(dx.isnan().tolist())) == 1


@each_row_of_torch
def test_torch_samples(row_of_torch: _registry.Row, dtype: torch.dtype, op_db: list[Any], drawn: torch.Generator) -> None:
    for info in descriptions(op_db, row_of_torch):
        count = 0
        # Not listed first: a sample that a test changes must not be blamed on another.
        for sample in info.reference_inputs(DEVICE, dtype, requires_grad=True):
            x = sample.input.detach().requires_grad_()
            about = f"{info.full_name} of {tuple(x.shape)} strides {x.stride()} {sample.args} {sample.kwargs}"
            actual = row_of_torch.function(x, *sample.args, **sample.kwargs)
            # On the CPU torch rounds the maximum and the logarithm to 16 bits first, which leaves nothing of a result near 0.
            wide = row_of_torch.name == "log_softmax" and dtype.itemsize == 2
            expected = info.op(x.float() if wide else x, *sample.args, **sample.kwargs).to(actual.dtype)
            assert_close(actual, expected, x, about)
            # Not y.sum(): that hides errors of the formula, above all in softmax, where its gradient is 0.
            dy = (2 * torch.rand(expected.shape, generator=drawn, dtype=torch.float64) - 1).to(expected.dtype)
            gradients = [torch.autograd.grad(y, x, dy)[0] for y in (actual, expected)]
            torch_op = partial(info.op, **sample.kwargs)
            if row_of_torch in ELEMENTWISE and not sample.args and not decided_at_nan(torch_op, dtype):
                gradients = [gradient.masked_fill(x.isnan(), 0) for gradient in gradients]
            assert_close(*gradients, x, f"gradient of {about}", gradient=True)
            count += 1
        assert count >= 7, f"torch gave only {count} samples of {info.full_name}"


@each_row_of_torch
def test_gradients_of_torch_samples(row_of_torch: _registry.Row, op_db: list[Any], drawn: torch.Generator) -> None:
    for info in descriptions(op_db, row_of_torch):
        for sample in info.sample_inputs(DEVICE, torch.float64, requires_grad=True):
            f = partial(row_of_torch.function, **sample.kwargs)
            inputs = (sample.input, *sample.args)
            assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True), info.full_name
            assert gradgradcheck(f, inputs, check_fwd_over_rev=True), info.full_name
