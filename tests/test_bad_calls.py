"""Wrong and odd calls: each raises what its torch twin raises, or gives what the twin gives; nothing is written, and the next
call works."""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ALONG_DIM, DEVICE, ELEMENTWISE, PUBLIC_ELEMENTWISE, PUBLIC_ROWS
from torch import Tensor

import fastact
from fastact._registry import Row

# What a user had before. A row that has no twin in torch is held to its plain-torch reference.
TWINS: dict[str, Callable[..., Any]] = {
    "sigmoid": torch.sigmoid,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "softmax": F.softmax,
    "log_softmax": F.log_softmax,
}


def quiet(f: Callable[[], Any]) -> Any:
    """Torch says once that sparse, nested and quantized tensors may change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f()


def plain() -> Tensor:
    return torch.tensor([[-2.0, -0.5, 0.0, 3.0], [1.0, -1.0, 0.25, -0.0], [5.0, 2.0, -8.0, 0.5]])


@dataclass(frozen=True)
class Case:
    """`call(f, x)` with f the function or its twin, and x a fresh input. `error`: of our own, where the signatures differ."""

    name: str
    row: Row
    call: Callable[[Callable[..., Any], Any], Any]
    make: Callable[[], Any] = plain
    error: type[Exception] | None = None
    words: str = ""  # of our message: a regular expression
    strides: bool = True  # whether the result has the strides of the twin's
    ours_alone: bool = False  # an argument that the twin has not: the reference says what becomes of it

    @property
    def twin(self) -> Callable[..., Any]:
        return self.row.reference if self.ours_alone else TWINS.get(self.row.name, self.row.reference)

    @property
    def id(self) -> str:
        return f"{self.row.name}-{self.name}"


def call_plainly(row: Row) -> Callable[[Callable[..., Any], Any], Any]:
    return (lambda f, x: f(x, -1)) if row in ALONG_DIM else (lambda f, x: f(x))


WRONG_INPUTS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "list": lambda: [1.0, 2.0],
    "tuple": lambda: (1.0, 2.0),
    "str": lambda: "1.0",
    "bytes": lambda: b"1.0",
    "int": lambda: 1,
    "float": lambda: 1.0,
    "bool": lambda: True,
    "complex": lambda: 1j,
    "dict": lambda: {"x": 1.0},
    "numpy array": lambda: np.ones(3, np.float32),
    "numpy number": lambda: np.float32(1),
    "module": lambda: torch.nn.Identity(),
    "type": lambda: Tensor,
    "dtype": lambda: torch.float32,
    "list of tensors": lambda: [torch.ones(2)],
}

# Tensors without a kernel here: torch computes them, or refuses them.
ODD_TENSORS: dict[str, Callable[[], Tensor]] = {
    "int64": lambda: plain().to(torch.int64),
    "int32": lambda: plain().to(torch.int32),
    "int8": lambda: plain().to(torch.int8),
    "uint8": lambda: plain().abs().to(torch.uint8),
    "uint16": lambda: plain().abs().to(torch.uint16),
    "bool": lambda: plain() > 0,
    "complex64": lambda: torch.complex(plain(), plain().flip(0)),
    "complex128": lambda: torch.complex(plain(), plain().flip(0)).to(torch.complex128),
    "conjugate": lambda: torch.complex(plain(), plain().flip(0)).conj(),
    "float8": lambda: plain().to(torch.float8_e4m3fn),
    "quantized": lambda: torch.quantize_per_tensor(plain(), 0.1, 128, torch.quint8),
    "sparse": lambda: plain().to_sparse(),
    "sparse csr": lambda: plain().to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=torch.jagged),
    "meta": lambda: torch.empty(3, 4, device="meta"),
    "meta float16, transposed": lambda: torch.empty(3, 4, device="meta", dtype=torch.float16).t(),
    "meta int64": lambda: torch.empty(3, 4, device="meta", dtype=torch.int64),
    "65 dimensions": lambda: plain().view([3] + [1] * 63 + [4]),
    "65 dimensions, transposed": lambda: plain().view([3] + [1] * 63 + [4]).transpose(0, 64),
    "zero tensor": lambda: torch._efficientzerotensor(3, 4),
    "negative view": lambda: torch.complex(plain(), plain()).conj().imag,
    "inference": lambda: torch.inference_mode()(plain)(),
    "parameter": lambda: torch.nn.Parameter(plain()),
    "more than memory": lambda: torch.ones(1).expand(2**52),
}
if torch.backends.mkldnn.is_available() and DEVICE == "cpu":
    ODD_TENSORS["mkldnn"] = lambda: plain().to_mkldnn()


NOT_NUMBERS = ["str", "empty str", "None", "list", "tuple", "dict"]
WRONG_PARAMETERS: dict[str, Callable[[], Any]] = {
    "str": lambda: "0.5",
    "empty str": lambda: "",
    "None": lambda: None,
    "list": lambda: [0.5],
    "tuple": lambda: (0.5,),
    "dict": lambda: {},
    "complex": lambda: 0.5 + 1j,
    "NaN": lambda: math.nan,
    "infinity": lambda: math.inf,
    "-infinity": lambda: -math.inf,
    "1e300": lambda: 1e300,
    "bool": lambda: True,
    "int": lambda: 2,
    "2**63": lambda: 2**63,
    "10**400": lambda: 10**400,
    "numpy float32": lambda: np.float32(0.5),
    "numpy float64": lambda: np.float64(0.5),
    "numpy int64": lambda: np.int64(2),
    "numpy array": lambda: np.array([0.5, 0.25]),
    "0-dim tensor": lambda: torch.tensor(0.5),
    "0-dim integer tensor": lambda: torch.tensor(2),
    "0-dim complex tensor": lambda: torch.tensor(0.5 + 1j),
    "1-element tensor": lambda: torch.tensor([0.5]),
    "tensor": lambda: torch.tensor([0.5, 0.25, 1.0, 2.0]),
    "mismatched tensor": lambda: torch.ones(5),
    "tensor with grad": lambda: torch.tensor(0.5, requires_grad=True),
}

NOT_DIMS = [
    "float",
    "str",
    "list",
    "tuple",
    "bool",
    "complex",
    "numpy float64",
    "float tensor",
    "bool tensor",
    "1-element tensor",
]
WRONG_DIMS: dict[str, Callable[[], Any]] = {
    "2": lambda: 2,
    "-3": lambda: -3,
    "2**31": lambda: 2**31,
    "2**63 - 1": lambda: 2**63 - 1,
    "2**63": lambda: 2**63,
    "-2**63": lambda: -(2**63),
    "-2**63 - 1": lambda: -(2**63) - 1,
    "10**30": lambda: 10**30,
    "None": lambda: None,
    "float": lambda: 1.0,
    "str": lambda: "1",
    "list": lambda: [1],
    "tuple": lambda: (1,),
    "bool": lambda: True,
    "complex": lambda: 1j,
    "numpy int64": lambda: np.int64(1),
    "numpy int8": lambda: np.int8(-1),
    "numpy int64 out of range": lambda: np.int64(5),
    "numpy float64": lambda: np.float64(1),
    "0-dim tensor": lambda: torch.tensor(1),
    "0-dim int8 tensor": lambda: torch.tensor(-1, dtype=torch.int8),
    "0-dim tensor out of range": lambda: torch.tensor(5),
    "float tensor": lambda: torch.tensor(1.0),
    "bool tensor": lambda: torch.tensor(True),
    "1-element tensor": lambda: torch.tensor([1]),
}

NOT_DTYPES = ["str", "numpy dtype", "list", "int", "tensor", "layout", "object"]
WRONG_DTYPES: dict[str, Any] = {
    "str": "float32",
    "numpy dtype": np.float32,
    "list": [torch.float32],
    "int": 6,
    "tensor": torch.ones(1),
    "layout": torch.strided,
    "object": object,
    "float (Python's)": float,
    "int (Python's)": int,
    "bool (Python's)": bool,
    "complex (Python's)": complex,
    "int32": torch.int32,
    "bool": torch.bool,
    "complex64": torch.complex64,
    "float8": torch.float8_e4m3fn,
    "quint8": torch.quint8,
}


def cases() -> list[Case]:
    table: list[Case] = []

    def add(name: str, row: Row, call: Callable[..., Any], make: Callable[[], Any] = plain, **rest: Any) -> None:
        table.append(Case(name, row, call, make, **rest))

    # F.softmax asks x for its method before it looks at what x is; torch.softmax looks first.
    looking_first: dict[Any, Any] = {F.softmax: torch.softmax, F.log_softmax: torch.log_softmax}

    def look_first(f: Callable[..., Any], x: Any) -> Any:
        return looking_first.get(f, f)(x, -1)

    for row in PUBLIC_ROWS:
        names = ["dim", "dtype"] if row in ALONG_DIM else list(row.parameters)
        for kind, make in WRONG_INPUTS.items():
            call = look_first if row in ALONG_DIM else call_plainly(row)
            error = None if row.name in TWINS else TypeError  # a formula multiplies whatever can be multiplied
            add(f"{kind} as x", row, call, make, error=error, words=f"{row.name}.*argument 'x' .*must be Tensor, not ")
        for kind, make in ODD_TENSORS.items():
            # These keep the layout of a dense tensor; torch's result is contiguous.
            contiguous = row.along_dim or row.name == "log_sigmoid"
            add(kind, row, call_plainly(row), make, strides=not contiguous or "transposed" not in kind)

        add("no arguments", row, lambda f, x: f(), error=TypeError, words="missing .*'x'")
        add("no x", row, lambda f, x, names=names: f(**{name: 0 for name in names}), error=TypeError, words="'x'|unexpected")
        add("too many arguments", row, lambda f, x: f(x, 1, None, 3, 4, 5, 6), words="positional arguments? but")
        add("unknown keyword", row, lambda f, x: f(x, slop=1.0), words="unexpected keyword argument 'slop'")
        add("empty keyword", row, lambda f, x: f(x, **{"": 1.0}), words="unexpected keyword argument ''")
        add("x twice", row, lambda f, x: f(x, x=x), error=TypeError, words="multiple values for argument 'x'")
        add("x twice, once by torch's name", row, lambda f, x: f(x, input=x), error=TypeError, words="multiple values|'input'")
        add("x by both names", row, lambda f, x: f(x=x, input=x), error=TypeError, words="multiple values for argument")
        add("out", row, lambda f, x: f(x, out=torch.empty_like(x)), error=TypeError, words="unexpected keyword argument 'out'")
        # The name in the documented signature is x, as in the reference.
        by_name = lambda f, x, row=row: f(**{"x" if f is row.reference else "input": x})  # noqa: E731
        add("torch's name for x", row, by_name)
        for name in names:
            by_name = lambda f, x, row=row, name=name: f(**{name: 0, "x" if f is row.reference else "input": x})  # noqa: E731
            add(f"{name}, then torch's name for x", row, by_name)
            call = lambda f, x, name=name, names=names: f(x, *(1 for _ in names), **{name: 1})  # noqa: E731
            add(f"{name} twice", row, call, error=TypeError, words=f"multiple values for argument '{name}'")

    for row in PUBLIC_ELEMENTWISE:
        for name in row.parameters:
            for kind, value in WRONG_PARAMETERS.items():
                call = lambda f, x, name=name, value=value: f(x, **{name: value()})  # noqa: E731
                add(f"{kind} as {name}", row, call, words=f"'{name}'" if kind in NOT_NUMBERS else "")
            if row.name in TWINS:  # a limit of torch's numbers: that of 64 bits
                add(f"2**64 as {name}", row, lambda f, x, name=name: f(x, **{name: 2**64}))

    for row in (row for row in PUBLIC_ELEMENTWISE if "inplace" in row.function.__text_signature__):
        ones = tuple(row.parameters.values())
        for kind, value in {"1": 1, "str": "yes", "None": None, "tensor": torch.tensor(True), "list": []}.items():
            add(f"{kind} as inplace", row, lambda f, x, v=value, ones=ones: f(x, *ones, v))
        add("array as inplace", row, lambda f, x, ones=ones: f(x, *ones, np.zeros(2)))
        add("in place on a leaf", row, lambda f, x: f(x, inplace=True), lambda: plain().requires_grad_())
        add("in place on a view of a leaf", row, lambda f, x: f(x[1:], inplace=True), lambda: plain().requires_grad_())
        add("in place on integers", row, lambda f, x: f(x, inplace=True), ODD_TENSORS["int32"])
        add("in place on bool", row, lambda f, x: f(x, inplace=True), ODD_TENSORS["bool"])
        add("in place on shared elements", row, lambda f, x: f(x, inplace=True), lambda: torch.ones(3, 1).expand(3, 4))
        add("in place on an inference tensor", row, lambda f, x: f(x, inplace=True), ODD_TENSORS["inference"])
        add("in place on None", row, lambda f, x: f(x, inplace=True), lambda: None, words="'x' .*must be Tensor, not NoneType")
        add("in place on meta", row, lambda f, x: f(x, inplace=True), ODD_TENSORS["meta"])
        add(
            "in place, then read",
            row,
            lambda f, x: f(x * 1, inplace=True).exp().sum().backward(),
            lambda: plain().requires_grad_(),
        )

    for row in ALONG_DIM:
        for kind, value in WRONG_DIMS.items():
            words = "argument 'dim' .*must be int" if kind in NOT_DIMS else ""
            error = TypeError if kind == "str" else None  # to torch before 2.13 it is the name of a dimension
            add(f"dim {kind}", row, lambda f, x, value=value: f(x, value()), error=error, words=words)
            add(f"dim {kind} by keyword", row, lambda f, x, value=value: f(x, dim=value()), error=error, words=words)
        for shape in [(), (0,), (3, 0)]:
            for dim in (-3, -2, -1, 0, 1, 2):
                add(f"dim {dim} of shape {shape}", row, lambda f, x, dim=dim: f(x, dim), functools.partial(torch.ones, shape))
        for kind, value in WRONG_DTYPES.items():
            words = "argument 'dtype' .*must be torch.dtype" if kind in NOT_DTYPES else ""
            add(f"dtype {kind}", row, lambda f, x, value=value: f(x, 1, dtype=value), words=words)
            add(
                f"dtype {kind} of integers",
                row,
                lambda f, x, value=value: f(x, 1, dtype=value),
                ODD_TENSORS["int32"],
                words=words,
            )
        add("bad dim and bad dtype", row, lambda f, x: f(x, 7, dtype="float32"), words="'dtype'")
        add("bad dim of integers", row, lambda f, x: f(x, 7), ODD_TENSORS["int32"])
        # Torch does not look at the dim of a meta tensor.
        add("bad dim of meta", row, lambda f, x: f(x, 7), ODD_TENSORS["meta"], error=IndexError, words="out of range")
        add("float32 of meta", row, lambda f, x: f(x, 1, dtype=torch.float32), ODD_TENSORS["meta int64"])

    softmax = next(row for row in ALONG_DIM if row.name == "softmax")  # alone has a temperature and masked_rows
    for kind, value in WRONG_PARAMETERS.items():
        call = lambda f, x, value=value: f(x, 1, temperature=value())  # noqa: E731
        not_numbers = [*NOT_NUMBERS, "complex", "numpy array", "NaN", "infinity", "-infinity", "1e300", "10**400"]
        add(f"{kind} as temperature", softmax, call, words="temperature" if kind in not_numbers else "", ours_alone=True)
    for value in (0, 0.0, -1.5, -0.0, 2.0**-127, 1.01 * 2.0**126):
        call = lambda f, x, value=value: f(x, 1, temperature=value)  # noqa: E731
        for kind in ("float", "int32", "meta"):
            make = ODD_TENSORS.get(kind, plain)
            what = f"{value} as temperature of {kind}"
            add(what, softmax, call, make, error=ValueError, words="temperature", ours_alone=True)
    for value in ("Zero", "", "zero ", b"zero", None, 0, True, ["zero"], "nan\0"):
        call = lambda f, x, value=value: f(x, 1, masked_rows=value)  # noqa: E731
        add(f"{value!r} as masked_rows", softmax, call, error=ValueError, words="masked_rows", ours_alone=True)
        call = lambda f, x, value=value: f(x, 1, None, 2.0, value)  # noqa: E731
        add(f"{value!r} as masked_rows by position", softmax, call, error=ValueError, words="masked_rows", ours_alone=True)
    return table


CASES = cases()


@dataclass
class Outcome:
    error: Exception | None = None
    value: Any = None
    messages: tuple[str, ...] = ()


def run(call: Callable[[], Any]) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return Outcome(value=call(), messages=tuple(str(w.message).partition("\n")[0] for w in caught))
        except Exception as error:  # every one, to be compared
            return Outcome(error=error)


def readable(x: Tensor) -> Tensor | None:
    """The numbers of any tensor, dense and unquantised; None for one that has none to read, or too many."""
    if x.is_meta or x.numel() > 10**6:
        return None
    if x.is_nested:
        return x.detach().to_padded_tensor(-777.0).flatten()
    if x.is_quantized:
        return x.int_repr().flatten()
    x = x.detach()
    # Some of torch's own functions refuse more than 64 dimensions.
    return (x.to_dense() if x.layout != torch.strided else x).flatten()


def snapshot(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return repr(x)
    numbers = quiet(lambda: readable(x))
    return None if numbers is None else numbers.clone().view(torch.uint8).tolist()


def same_result(ours: Any, theirs: Any, strides: bool, what: str) -> None:
    if not isinstance(theirs, Tensor):
        assert ours == theirs, what
        return
    assert type(ours) is type(theirs), what
    assert ours.dtype == theirs.dtype, f"{what}: dtype {ours.dtype} instead of {theirs.dtype}"
    assert ours.layout == theirs.layout, f"{what}: layout {ours.layout} instead of {theirs.layout}"
    assert ours.device == theirs.device, f"{what}: on {ours.device} instead of {theirs.device}"
    assert ours.requires_grad == theirs.requires_grad, f"{what}: requires_grad {ours.requires_grad}"
    if theirs.layout == torch.strided and not theirs.is_nested:
        assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
        assert not strides or ours.stride() == theirs.stride(), f"{what}: strides {ours.stride()} instead of {theirs.stride()}"
    numbers, expected = quiet(lambda: readable(ours)), quiet(lambda: readable(theirs))
    if expected is not None:
        # What a kernel computes may differ from torch in the last digits, which are no concern of this file.
        tolerance = {} if expected.dtype in (torch.float32, torch.float64, torch.float16) else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(numbers, expected, equal_nan=True, **tolerance, msg=lambda m: f"{what}: {m}")


def good_call_works(row: Row) -> None:
    x = plain()
    y = call_plainly(row)(row.function, x)
    expected = call_plainly(row)(row.reference, x)
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-7), f"{row.name} gives {y} after it"
    assert torch.equal(x, plain())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_bad_call(case: Case) -> None:
    ours_x, theirs_x = quiet(case.make), quiet(case.make)
    before = snapshot(ours_x)
    theirs = run(lambda: case.call(case.twin, theirs_x))
    ours = run(lambda: case.call(case.row.function, ours_x))
    expected = case.error or (type(theirs.error) if theirs.error else None)
    if expected:
        assert ours.error is not None, f"returns {ours.value!r} where torch raises {theirs.error!r}"
        assert type(ours.error) is expected, f"raises {ours.error!r}, torch {theirs.error!r}"
        if case.words and str(ours.error) != str(theirs.error):  # torch's op, where it is called, has words of its own
            assert re.search(case.words, str(ours.error)), f"says {str(ours.error)!r}"
        assert str(ours.error), "says nothing"
        assert snapshot(ours_x) == before, "the input was written to"
    else:
        assert ours.error is None, f"raises {ours.error!r} where torch returns {theirs.value!r}"
        same_result(ours.value, theirs.value, case.strides, case.id)
        assert ours.messages == theirs.messages
        # In place or not, the input is what torch leaves.
        assert snapshot(ours_x) == before or ours.value is ours_x or "then read" in case.name
    good_call_works(case.row)


def test_there_are_many() -> None:
    assert len({case.id for case in CASES}) == len(CASES) > 500


# ---- The ops, called directly ----------------------------------------------------------------------------------------


def op_arguments(row: Row) -> tuple[float, ...]:
    return tuple(row.parameters.values()) if row in ELEMENTWISE else (-1,)


BAD_PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any], type[Exception], str]] = {
    "shapes": (lambda: torch.ones(3, 4), lambda: torch.ones(4, 3), RuntimeError, r"dy has shape \[3, 4\] .*\[4, 3\]"),
    "broadcastable shapes": (lambda: torch.ones(4), lambda: torch.ones(3, 4), RuntimeError, r"dy has shape \[4\] .*\[3, 4\]"),
    "one element": (lambda: torch.ones(1), lambda: torch.ones(3, 4), RuntimeError, "dy has shape"),
    "0-dim": (lambda: torch.ones(()), lambda: torch.ones(1), RuntimeError, "dy has shape"),
    "empty": (lambda: torch.ones(0), lambda: torch.ones(3, 0), RuntimeError, "dy has shape"),
    "dtypes": (lambda: torch.ones(3).double(), lambda: torch.ones(3), RuntimeError, "dy has dtype Double .*Float"),
    "16-bit dtypes": (
        lambda: torch.ones(3).half(),
        lambda: torch.ones(3).bfloat16(),
        RuntimeError,
        "dy has dtype Half .*BFloat16",
    ),
    "integers": (lambda: torch.ones(3).int(), lambda: torch.ones(3).int(), NotImplementedError, "not implemented for 'Int'"),
    "complex": (
        lambda: torch.ones(3) * 1j,
        lambda: torch.ones(3) * 1j,
        NotImplementedError,
        "not implemented for 'ComplexFloat'",
    ),
    "devices": (lambda: torch.ones(3).to("meta"), lambda: torch.ones(3), RuntimeError, f"dy is on meta .*{DEVICE}"),
    "devices, turned": (lambda: torch.ones(3), lambda: torch.ones(3).to("meta"), RuntimeError, f"dy is on {DEVICE}.* .*meta"),
    "sparse": (lambda: torch.ones(3).to_sparse(), lambda: torch.ones(3), NotImplementedError, f"Sparse{DEVICE.upper()}"),
    "None": (lambda: None, lambda: torch.ones(3), RuntimeError, "dy"),
    "list": (lambda: [1.0], lambda: torch.ones(1), RuntimeError, "dy"),
}


@pytest.mark.parametrize("pair", BAD_PAIRS)
def test_backward_op(any_row: Row, pair: str) -> None:
    """The ops say the same as the plain-torch ones: RuntimeError, but NotImplementedError where there is no kernel."""
    make_dy, make_saved, error, words = BAD_PAIRS[pair]
    dy, saved = make_dy(), make_saved()
    before = snapshot(dy), snapshot(saved)
    with pytest.raises(error, match=words) as caught:
        any_row.backward_op(dy, saved, *op_arguments(any_row))
    assert caught.type is error
    assert (snapshot(dy), snapshot(saved)) == before
    good_call_works(any_row)


@pytest.mark.parametrize("kind", ["int32", "bool", "complex64", "float8", "meta int64"])
def test_op_without_kernel(any_row: Row, kind: str) -> None:
    x = ODD_TENSORS[kind]()
    before = snapshot(x)
    calls = [lambda: any_row.op(x, *op_arguments(any_row))]
    if any_row in ELEMENTWISE:
        calls.append(lambda: getattr(torch.ops.fastact, any_row.name + "_")(x, *op_arguments(any_row)))
    for call in calls:
        with pytest.raises(NotImplementedError, match=f"fastact::{any_row.name} not implemented for"):
            call()
    assert snapshot(x) == before


@pytest.mark.parametrize("value", ["0.5", None, [0.5], 1j], ids=repr)
def test_op_with_wrong_parameters(any_row: Row, value: Any) -> None:
    """What torch's own ops raise when called as torch.ops.aten.leaky_relu(x, "0.5")."""
    x = plain()
    if op_arguments(any_row):
        with pytest.raises(RuntimeError, match=rf"fastact::{any_row.name}"):
            any_row.op(x, *[value] * len(op_arguments(any_row)))
    with pytest.raises(RuntimeError, match=rf"fastact::{any_row.name}"):
        any_row.op(value, *op_arguments(any_row))
    with pytest.raises(RuntimeError, match=r"missing|expected"):
        any_row.op()
    good_call_works(any_row)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, -math.inf, 2.0**-127, 2.0**127], ids=repr)
def test_softmax_op_with_wrong_temperature(temperature: float) -> None:
    for x in (plain(), plain().to("meta")):
        with pytest.raises(ValueError, match=r"fastact::softmax.*temperature"):
            torch.ops.fastact.softmax(x, 1, temperature)
        with pytest.raises(ValueError, match=r"fastact::softmax.*temperature"):
            torch.ops.fastact.softmax_backward(x, x, 1, temperature)


def test_gradient_of_the_wrong_shape(any_row: Row) -> None:
    x = plain().requires_grad_()
    y = call_plainly(any_row)(any_row.function, x)
    with pytest.raises(RuntimeError, match="shape"):
        y.backward(torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="scalar outputs"):
        y.backward()
    assert x.grad is None
    y.backward(torch.ones(3, 4))
    assert x.grad is not None


def test_modules_say_the_same() -> None:
    """Modules pass on what they were given: torch's too look at it only when they are called."""
    with pytest.raises(TypeError, match=r"argument 'x' .*must be Tensor, not list"):
        fastact.ReLU()([1.0])
    with pytest.raises(TypeError, match=r"argument 'negative_slope' .*must be Number, not str"):
        fastact.LeakyReLU("0.1")(plain())
    with pytest.raises(IndexError, match="Dimension out of range"):
        fastact.Softmax(dim=5)(plain())
    with pytest.raises(TypeError, match="unexpected keyword argument 'slope'"):
        fastact.LeakyReLU(slope=0.1)


@pytest.mark.parametrize(
    "given",
    [{"masked_rows": "Zero"}, {"masked_rows": None}, {"temperature": 0.0}, {"temperature": -1}, {"temperature": "1"}],
    ids=str,
)
def test_softmax_modules_look_at_what_torchs_have_not(given: dict[str, Any]) -> None:
    """When they are made, and they say what the function says."""
    with pytest.raises((TypeError, ValueError)) as expected:
        fastact.softmax(plain(), 1, **given)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        fastact.Softmax(1, **given)
