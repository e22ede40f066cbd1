"""The axes of the suite: devices, rows, dtypes, instruction sets, seeds. A test names an activation only if it alone has the
property.

`pytest --device cuda` runs the suite on a GPU: every tensor that a test makes without naming a device lies there. What is about
the CPU alone says so by the mark `cpu_only`, or by its file in CPU_ONLY_FILES, and is skipped with that reason.

A parameter called `row` (an elementwise one), `along` (softmax and its relatives), `any_row` or `dtype` runs over all of them,
`public_row` over those with a function of their own; `isa` runs over the instruction sets this CPU has and puts the best one
back (on a GPU there is nothing to run over). A randomly drawn input comes from the `generator` fixture, whose seed a failure
prints; FASTACT_TEST_SEED sets it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastact
from fastact import _C, _registry

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "csrc" / "cpu"

PUBLIC_ELEMENTWISE = list(_registry.elementwise.values())
ELEMENTWISE = [*PUBLIC_ELEMENTWISE, *_registry.variants.values()]
ALONG_DIM = list(_registry.along_dim.values())
PUBLIC_ROWS = [*PUBLIC_ELEMENTWISE, *ALONG_DIM]
ALL_ROWS = [*ELEMENTWISE, *ALONG_DIM]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEED = int(os.environ.get("FASTACT_TEST_SEED", random.SystemRandom().randrange(2**31)))

BEST_ISA = _C.build_info()["isa"]
ISAS = _C.build_info()["isa_levels"][: _C.build_info()["isa_levels"].index(BEST_ISA) + 1]

# Of any number of dims, where dim 1 is that of the channels.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t,
    "reversed": lambda t: t.permute([*range(t.dim())][::-1]).contiguous().permute([*range(t.dim())][::-1]),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 1],
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)

# What a stand-in cannot do, by a word in the name of a test.
NOT_PLAYED = {
    "sparse": "there are no kernels of torch for sparse tensors",
    "nested": "there are no kernels of torch for nested tensors",
    "quantized": "there are no kernels of torch for quantized tensors",
    "fast_path_of_transformers": "there is no kernel of torch for fused attention",
    "softmax-float16-float32": "torch's softmax for the CPU takes no other dtype for its result",
    "more than memory": "torch's op runs out of the CPU's memory",
    "inductor": "there is no Triton",
}

# Set from the command line before any test file is imported; and how many threads a test compares, where that is its subject.
DEVICE = "cpu"
THREAD_COUNTS = [1, 2, 3]

# Whether the GPU is one that the host plays (tests/cuda_stand_in). It does the same in every run, at a hundredth of the speed.
STAND_IN = importlib.util.find_spec("stand_in_device") is not None

# Whole files that look at the CPU, or at no device: why a GPU would tell nothing more.
CPU_ONLY_FILES = {
    "test_bench": "measures on the CPU whatever the device; test_cuda.py measures on the GPU",
    "test_build": "reads the machine code of the CPU kernels",
    "test_cuda_build": "compiles, and runs nothing",
    "test_cuda_shim": "runs the CUDA kernels on the CPU",
    "test_demo": "runs the demo on the CPU, in a process of its own",
    "test_docs": "reads the documents",
    "test_memory": "looks at the memory of CPU tensors",
    "test_packaging": "builds packages",
    "test_sight_report": "computes with NumPy",
    "test_types": "asks a type checker",
}

# Parameters besides the defaults: both signs, zero, and values that are not powers of two.
EXTRA_PARAMETERS = {0: [], 1: [(0.2,), (0.0,), (1.5,), (-0.3,)], 2: [(4.0, 1.0), (-1.0, 1.0), (2.5, -0.7), (0.0, 1.0)]}

# What torch's float64 gradient is off by: it multiplies by 1/6 as a float32.
REFERENCE_ERROR = {"hardsigmoid": 2.0**-24}

# Plain torch whose derivatives can be taken again, where those of the reference cannot.
SMOOTH_REFERENCE = {"hardsigmoid": lambda x: (x + 3).clamp(0, 6) / 6}


def smooth_reference(row: _registry.Row) -> Callable[..., Tensor]:
    return SMOOTH_REFERENCE.get(row.name, row.reference)


INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by size in bytes


# Where those would say little: a threshold below 20 leaves a step in the function.
EXTRA_PARAMETERS_OF = {"softplus": [(2.5, 20.0), (-1.0, 25.0), (0.5, 10.0)]}


def parameter_sets(row: _registry.Row) -> list[tuple[float, ...]]:
    """The defaults, then values that try every branch."""
    return [tuple(row.parameters.values()), *EXTRA_PARAMETERS_OF.get(row.name, EXTRA_PARAMETERS[len(row.parameters)])]


class InACopy(torch.nn.Module):
    """Calls a module that works in place with a copy of the input."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.clone())


def module_class(row: _registry.Row) -> Callable[..., torch.nn.Module]:
    """What makes the module of a row, which may share it with another row."""
    if row.name.startswith("precise_"):
        return functools.partial(getattr(fastact, row.class_name.removeprefix("Precise")), precise_grad=True)
    if row.name.startswith("result_"):
        return lambda *values: InACopy(getattr(fastact, row.class_name.removeprefix("Result"))(*values, inplace=True))
    return getattr(fastact, row.class_name)


def bits(t: Tensor) -> Tensor:
    """The elements as integers of their size."""
    return t.contiguous().view(INTEGER[t.dtype.itemsize])


def softmax_slack(
    dtype: torch.dtype, dim: int, y: Tensor, dy: Tensor | None = None, *, logarithm: bool = False
) -> Tensor | None:
    """How far two results of softmax, or with dy of its backward, may lie apart for the same values in different layouts; with
    logarithm, of log_softmax.

    On the CPU, where rows are summed in one order in every layout: None, for not at all. On CUDA the order follows from how the
    tensor lies in memory. Each of the two sums is then off by at most a unit of the compute type for every addition, and a few
    more for the roundings beside it; and the results of 16-bit types may round to two neighbours.
    """
    if DEVICE == "cpu":
        return None
    unit = torch.finfo(dtype if dtype.itemsize > 2 else torch.float32).eps / 2
    y = y.detach().double()
    scale = (y.abs() + 1).nan_to_num(posinf=1) if logarithm else y.abs()
    if dy is not None:
        y, dy = (y.exp() if logarithm else y.abs()), dy.detach().double().abs()
        product = dy if logarithm else y * dy
        scale = product + y * product.sum(dim, keepdim=True)
    slack = 2 * (y.shape[dim] + 8 if y.dim() else 8) * unit * scale
    if dtype.itemsize == 2:
        slack = slack + torch.finfo(dtype).eps * scale + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return slack


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the tensors of the tests lie")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): about the CPU, so skipped with --device cuda")
    config.addinivalue_line("markers", "large: needs many GiB of GPU memory")
    config.addinivalue_line("markers", "exhaustive: tries millions of numbers or thousands of lengths; not on a stand-in")
    if config.getoption("--device") == "cpu":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no CUDA device here")
    info = fastact.build_info()
    if info["cuda"] is None:
        raise pytest.UsageError(f"--device cuda: this fastact was built without CUDA: {info['cuda_missing']}")
    global DEVICE, THREAD_COUNTS
    DEVICE, THREAD_COUNTS = "cuda", [1]
    # Not torch.set_default_device, which is a mode of torch functions: every call of an activation would go through Python, as
    # calls under such a mode do, and never take the way that calls without one take.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*set_default_tensor_type\(\) is deprecated", UserWarning)
        torch.set_default_tensor_type(torch.cuda.FloatTensor)


def pytest_report_header(config: pytest.Config) -> str:
    return f"device: {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'cpu'}; FASTACT_TEST_SEED={SEED}"


def not_played(item: pytest.Item) -> str | None:
    """Why a test is not for a stand-in."""
    if item.get_closest_marker("exhaustive"):
        return "tries millions of numbers or thousands of lengths"
    return next((reason for word, reason in NOT_PLAYED.items() if word in item.name), None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE == "cpu":
        return
    for item in items:
        mark = item.get_closest_marker("cpu_only")
        reason = mark.args[0] if mark else CPU_ONLY_FILES.get(item.path.stem)
        if reason:
            item.add_marker(pytest.mark.skip(reason=f"about the CPU: {reason}"))
        elif STAND_IN and (reason := not_played(item)):
            item.add_marker(pytest.mark.skip(reason=f"on a stand-in for a GPU: {reason}"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        metafunc.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
    if "along" in metafunc.fixturenames:
        metafunc.parametrize("along", ALONG_DIM, ids=lambda row: row.name)
    if "any_row" in metafunc.fixturenames:
        metafunc.parametrize("any_row", ALL_ROWS, ids=lambda row: row.name)
    if "public_row" in metafunc.fixturenames:
        metafunc.parametrize("public_row", PUBLIC_ROWS, ids=lambda row: row.name)
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
    if "isa" in metafunc.fixturenames:
        metafunc.parametrize("isa", ISAS if DEVICE == "cpu" else ["cuda"], indirect=True)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if DEVICE == "cpu":
        assert _C.use_isa(request.param)
    yield request.param
    if DEVICE == "cpu":
        _C.use_isa(BEST_ISA)


@pytest.fixture(autouse=True, scope="module")
def fresh_dynamo() -> None:
    """What Dynamo has learnt in another file of code that both run, as that of torch.nn, is forgotten: what it gave up there it
    would not try here."""
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    request.node.add_report_section("setup", "seed", f"FASTACT_TEST_SEED={SEED}")
    return torch.Generator(DEVICE).manual_seed(SEED)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back that a test changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


ROOT = Path(__file__).parent.parent


def compile_kernels(folder: Path, names: Iterable[str], *flags: str) -> dict[str, Path]:
    """Files of csrc/cpu by name, with the flags of setup.py and then these; two at a time, for some take a minute."""

    def compiled(name: str) -> Path:
        target = folder / f"{name}.o"
        command = [os.environ.get("CXX", "c++"), *build_flags, *flags, "-fPIC", "-c", KERNELS / f"{name}.cpp", "-o", target]
        subprocess.run(command, check=True, capture_output=True)
        return target

    build_flags = runpy.run_path(str(ROOT / "setup.py"))["CXX_FLAGS"]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(names, pool.map(compiled, names), strict=True))


@pytest.fixture(scope="session")
def kernel_objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What became of each file of csrc/cpu: the object the build left there, unless a source is newer."""
    built = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}" / "csrc" / "cpu"
    found = {source.stem: built / f"{source.stem}.o" for source in KERNELS.glob("*.cpp")}
    newest = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/*.h"), *KERNELS.iterdir(), ROOT / "setup.py"])
    stale = [name for name, path in found.items() if not path.exists() or path.stat().st_mtime < newest]
    return found | compile_kernels(tmp_path_factory.mktemp("kernels"), stale)
