"""The same activation in ONNX Runtime and in JAX on the CPU, side by side with ours: `python -m fastact.bench --peers`.

Each gets what is fastest for a user of its Python API: torch's tensors lent without a copy, torch's number of threads, a new
output in memory of its own allocator for every call. One that is not installed is named in a note.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastact.bench.cases import DTYPES, Case, Inputs
from fastact.bench.compiling import one_line
from fastact.bench.processes import variables
from fastact.bench.timing import Call

# Of the element and of the mean magnitude. It tells another formula or dim from other roundings, of which the 16-bit types get
# four; how exact a peer is, is its own affair.
TOLERANCE = {dtype: max(1e-5, 4 * torch.finfo(torch_dtype).eps) for dtype, torch_dtype in DTYPES.items()}


# The ONNX operator, and its attributes for the parameters; it has no others than the default ones of softplus.
OPERATORS: dict[str, tuple[str, Callable[..., dict[str, Any]]]] = {
    "sigmoid": ("Sigmoid", dict),
    "relu": ("Relu", dict),
    "leaky_relu": ("LeakyRelu", lambda slope: {"alpha": slope}),
    "tanh": ("Tanh", dict),
    "elu": ("Elu", lambda alpha: {"alpha": alpha}),
    "softplus": ("Softplus", lambda beta, threshold: {}),
    "hardsigmoid": ("HardSigmoid", lambda: {"alpha": 1 / 6, "beta": 0.5}),
    "softmax": ("Softmax", lambda dim: {"axis": dim}),
    "log_softmax": ("LogSoftmax", lambda dim: {"axis": dim}),
}
ONNX_TYPES = {"float32": "FLOAT", "bfloat16": "BFLOAT16", "float16": "FLOAT16", "float64": "DOUBLE"}


class Contender(NamedTuple):
    call: Call
    result: Callable[[], Tensor]  # calls, and makes a torch tensor of what comes out


class Peer(Protocol):
    name: str

    def note(self) -> str:
        """Which version on how many threads, and what its column holds."""

    def contender(self, case: Case, inputs: Inputs, direction: str) -> Contender | None:
        """None for what its column does not hold; an exception says what is missing."""


class OnnxRuntime:
    """Models of one node."""

    name = "ort"

    OPSET, IR_VERSION = 22, 10  # the first with bfloat16 for all of them; since onnxruntime 1.20

    def __init__(self, threads: int) -> None:
        self._ort, self._onnx = import_module("onnxruntime"), import_module("onnx")
        self._threads = threads

    def note(self) -> str:
        return (
            f"ort: onnxruntime {self._ort.__version__}, threads: {self._threads}; models of one node, input and output bound; "
            "forward only, its training is in other packages"
        )

    def contender(self, case: Case, inputs: Inputs, direction: str) -> Contender | None:
        if direction != "forward" or case.row.name not in OPERATORS:
            return None
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 4  # what it lacks is said in a note
        try:
            session = self._ort.InferenceSession(self._model(case), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            if type(error).__name__ == "NotImplemented":
                raise NotImplementedError(f"no kernel for {case.dtype}") from None
            raise
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", self._ort.OrtValue.from_dlpack(inputs.x))

        def call() -> None:
            binding.bind_output("y", "cpu")  # else it writes over its last output
            session.run_with_iobinding(binding)

        def result() -> Tensor:
            call()
            return torch.from_numpy(binding.get_outputs()[0].numpy())

        return Contender(call, result)

    def _model(self, case: Case) -> bytes:
        operator, attributes = OPERATORS[case.row.name]
        helper, kind = self._onnx.helper, getattr(self._onnx.TensorProto, ONNX_TYPES[case.dtype])
        x, y = (helper.make_tensor_value_info(name, kind, case.shape) for name in "xy")
        node = helper.make_node(operator, ["x"], ["y"], **attributes(*case.args))
        graph = helper.make_graph([node], operator, [x], [y])
        opset = helper.make_opsetid("", self.OPSET)
        model: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=self.IR_VERSION).SerializeToString()
        return model


class Jax:
    """Functions under jax.jit. A backward is the formula of dy and of what ours saves, the output or the input: jax.vjp inside
    one jit would compute the forward once more, and split in two it moves work of the backward into the forward.
    """

    name = "jax"

    def __init__(self, threads: int) -> None:
        self._jax, self._numpy = import_module("jax"), import_module("jax.numpy")
        self._threads = threads
        self._jax.config.update("jax_platforms", "cpu")
        self._jax.config.update("jax_enable_x64", True)
        with variables({"NPROC": str(threads)}):  # XLA reads it once, when it makes its threads
            self._jax.devices()

    def note(self) -> str:
        return (
            f"jax: jax {self._jax.__version__}, threads: {self._threads} (by NPROC); jitted, until the result is ready; "
            "backward: the formula of dy and of what ours saves"
        )

    def contender(self, case: Case, inputs: Inputs, direction: str) -> Contender | None:
        pair = self._formulas().get(case.row.name)
        if direction == "both" or pair is None:
            return None
        formula = pair[direction == "backward"]
        tensors = [inputs.x]
        if direction == "backward":
            y = case.row.function(inputs.x, *case.args)
            tensors = [inputs.dy, inputs.x if case.row.saves_input(*case.args) else y]
        function = self._jax.jit(lambda *arrays: formula(*arrays, *case.args))
        arrays = [self._jax.dlpack.from_dlpack(tensor) for tensor in tensors]

        def call() -> Any:
            return function(*arrays).block_until_ready()

        return Contender(call, lambda: torch.utils.dlpack.from_dlpack(call()))

    def _formulas(self) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
        """By op: the forward of (x, parameters), and the backward of (dy, y, parameters); of silu (dy, x)."""
        nn, where = self._jax.nn, self._numpy.where

        def silu_backward(dy: Any, x: Any) -> Any:
            s = nn.sigmoid(x)
            return dy * s * (1 + x * (1 - s))

        def softmax_backward(dy: Any, y: Any, dim: int) -> Any:
            return y * (dy - (dy * y).sum(dim, keepdims=True))

        def log_softmax_backward(dy: Any, y: Any, dim: int) -> Any:
            return dy - self._numpy.exp(y) * dy.sum(dim, keepdims=True)

        return {
            "sigmoid": (nn.sigmoid, lambda dy, y: dy * y * (1 - y)),
            "relu": (nn.relu, lambda dy, y: where(y > 0, dy, 0)),
            "leaky_relu": (nn.leaky_relu, lambda dy, y, slope: where(y > 0, dy, slope * dy)),
            "tanh": (self._numpy.tanh, lambda dy, y: dy * (1 - y * y)),
            "scaled_sigmoid": (
                lambda x, scale, slope: scale * nn.sigmoid(slope * x),
                lambda dy, y, scale, slope: dy * slope * y * (1 - y / scale),
            ),
            "elu": (nn.elu, lambda dy, x, alpha: where(x > 0, dy, dy * alpha * self._numpy.exp(x))),
            "silu": (nn.silu, silu_backward),
            "softplus": (
                lambda x, beta, threshold: where(beta * x > threshold, x, nn.softplus(beta * x) / beta),
                lambda dy, x, beta, threshold: where(beta * x > threshold, dy, dy * nn.sigmoid(beta * x)),
            ),
            "log_sigmoid": (nn.log_sigmoid, lambda dy, x: dy * nn.sigmoid(-x)),
            "hardsigmoid": (nn.hard_sigmoid, lambda dy, x: where((x > -3) & (x < 3), dy / 6, 0)),
            "softmax": (nn.softmax, softmax_backward),
            "log_softmax": (nn.log_softmax, log_softmax_backward),
        }


class Peers:
    """Those that are installed."""

    def __init__(self) -> None:
        self._peers: list[Peer] = []
        self._absent: list[str] = []
        self._missing: Counter[tuple[str, str]] = Counter()
        for make in (OnnxRuntime, Jax):
            try:
                self._peers.append(make(torch.get_num_threads()))
            except ImportError as error:
                self._absent.append(f"{make.name}: left out, {error.name} is missing: pip install 'fastact[bench]'")

    def __call__(self, case: Case, inputs: Inputs, direction: str, ours: Call) -> dict[str, Call]:
        """Their calls by name, each checked against the result of ours."""
        calls = {}
        for peer in self._peers:
            try:
                if contender := peer.contender(case, inputs, direction):
                    _check(contender.result(), ours(), case.dtype)
                    calls[peer.name] = contender.call
            except Exception as error:  # whatever it is, it costs a cell and not the run
                self._missing[peer.name, str(error) if isinstance(error, NotImplementedError) else one_line(error)] += 1
        return calls

    def notes(self) -> list[str]:
        missing = [f"{n} rows without {name}: {why}" for (name, why), n in self._missing.items()]
        return [*(peer.note() for peer in self._peers), *self._absent, *missing]


def _check(got: Tensor, want: Any, dtype: str) -> None:
    tolerance = TOLERANCE[dtype]
    if got.shape != want.shape:  # which allclose may broadcast; another dtype it refuses
        raise ArithmeticError(f"returned shape {tuple(got.shape)}")
    if not torch.allclose(got, want, rtol=tolerance, atol=tolerance * want.abs().mean().item()):
        raise ArithmeticError("another result than ours")
