"""What a monitor counts, held against NumPy on the tensors themselves; steps, names, and what is left behind."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import math
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from conftest import THREAD_COUNTS, module_class, parameter_sets
from test_sight_report import counters
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.checkpoint import checkpoint

import fastact
from fastact import _C, _registry, modules
from fastact._registry import Row
from fastact.sight.history import History, Layer, Side

RUN = 64  # neighbours that are looked at together
MOST_UNITS = 20_000  # of a layer, or there is no map of them
SPECIAL = [0.0, -0.0, 1.0, -1.0, 4.0, -8.0, math.inf, -math.inf, math.nan, 1e-30, 3e4, -3e4]


def numbers(t: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return t.detach().cpu().double().numpy()


def in_memory_order(t: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    order = sorted(range(t.dim()), key=lambda d: (-t.stride(d), -t.size(d)))
    return numbers(t.permute(order)).reshape(-1)


def levels(name: str, parameters: tuple[float, ...]) -> tuple[float, float] | None:
    """Where a squashing function is saturated, from its formula: a derivative of 1 - 0.97^2 of its largest."""
    share = (1 - 0.97) / 2  # of the logistic curve: 4 s (1 - s) = 1 - 0.97^2
    if name == "sigmoid":
        return share, 1 - share
    if name == "tanh":
        return -0.97, 0.97
    if name == "hardsigmoid":
        return 0.0, 1.0
    if name == "scaled_sigmoid" and parameters[0] != 0 and parameters[1] != 0:
        low, high = sorted((parameters[0] * share, parameters[0] * (1 - share)))
        return low, high
    return None


def check_side(what: str, found: Side, step: int, values: Any, ends: tuple[float, float] | None = None) -> None:
    finite = values[np.isfinite(values)]
    exact = {
        "count": values.size,
        "zeros": (values == 0).sum(),
        "nan": np.isnan(values).sum(),
        "infinite": np.isinf(values).sum(),
        "minimum": finite.min(initial=np.inf),
        "maximum": finite.max(initial=-np.inf),
        "low": (values <= ends[0]).sum() if ends else 0,
        "high": (values >= ends[1]).sum() if ends else 0,
    }
    for name, expected in exact.items():
        assert getattr(found, name)[step] == expected, f"{what}: {name}"
    # Sums of doubles, each rounded once.
    for name, terms in (("total", finite), ("squares", finite * finite)):
        assert abs(getattr(found, name)[step] - terms.sum()) <= 1e-12 * np.abs(terms).sum(), f"{what}: {name}"


def watched(model: nn.Module, *calls: Callable[[], Any], **options: Any) -> History:
    with fastact.monitor(model, **options) as watch:
        for call in calls:
            call()
            watch.step()
    return watch.history()


def only(history: History) -> Layer:
    (layer,) = history.layers
    return layer


def passed(model: nn.Module, x: Tensor, dy: Tensor) -> tuple[Layer, Tensor]:
    """Of one forward and backward: what was counted, and the output."""
    with fastact.monitor(model, sample=None) as watch:
        y = model(x)
        y.backward(dy)
    return only(watch.history()), y


def function_of(row: Row, *values: float) -> nn.Module:
    class Calls(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return row.function(x, *values)

    return Calls()


def sample_of(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers with special ones among them."""
    values = torch.randn(x.shape, generator=generator, dtype=torch.float64) * 3
    where = torch.rand(x.shape, generator=generator, dtype=torch.float64) < 0.1
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    picked = special[torch.randint(len(SPECIAL), x.shape, generator=generator)]
    return torch.where(where, picked, values).to(x.dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "gaps": lambda t: t[:, :, ::2],
}


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    torch.set_num_threads(1)


# ---- Counts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts(row: Row, dtype: torch.dtype, layout: str, isa: str, generator: torch.Generator) -> None:
    shape = torch.empty(3, 5, 6, 7, dtype=dtype)
    for values in parameter_sets(row):
        x = LAYOUTS[layout](sample_of(shape, generator)).detach().requires_grad_()
        dy = sample_of(x, generator)
        model = function_of(row, *values)
        layer, y = passed(model, x, dy)
        what = f"{row.name}{values} {dtype} {layout}"
        assert layer.parameters == dict(zip(row.parameters, values, strict=True))
        check_side(what, layer.output, 0, numbers(y), levels(_registry.function_of(row.name), values))
        check_side(what + " gradient in", layer.gradient_in, 0, numbers(dy))
        assert x.grad is not None
        check_side(what + " gradient out", layer.gradient_out, 0, numbers(x.grad))
        for side, tensor in ((layer.output, y), (layer.gradient_in, dy), (layer.gradient_out, x.grad)):
            assert (side.histogram == counters(numbers(tensor))).all(), what
        assert layer.units is not None
        assert layer.units.seen.all()
        assert (layer.units.active[0] == (numbers(y) != 0).any(axis=(0, 2, 3))).all(), what
        assert layer.squashing == (levels(_registry.function_of(row.name), values) is not None), what


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_rows_of_a_softmax(along: Row, dtype: torch.dtype, dim: int, isa: str, generator: torch.Generator) -> None:
    x = (torch.randn(6, 70, 9, generator=generator, dtype=torch.float64) * 6).to(dtype)
    x[2, :, 3] = math.nan
    x[4, 7, :] = math.inf
    model = function_of(along, dim)
    layer = only(watched(model, lambda: model(x), sample=None))
    p = numbers(along.function(x, dim))
    p = np.moveaxis(np.exp(p) if along.name == "log_softmax" else p, dim, -1).reshape(-1, x.shape[dim])
    whole = p[~np.isnan(p).any(axis=1)]
    assert layer.rows is not None
    assert layer.length == x.shape[dim]
    assert layer.rows.count[0] == len(p)
    assert layer.rows.nan[0] == len(p) - len(whole) > 0
    assert layer.rows.sure[0] == (whole.max(axis=1, initial=0) > 0.99).sum()
    terms = -whole * np.log(np.maximum(whole, 1e-300))
    # The terms are computed in float32, with some units in the last place, but for those below 2^-40.
    assert layer.rows.entropy[0] == pytest.approx(terms.sum() / math.log(x.shape[dim]), rel=1e-5, abs=1e-9)


def fraction(call: int, j: int) -> int:
    return (0xC13FA9A9 * call + 0x91E10DA5 * j) % 2**32


def looked_at(n: int, sample: int, call: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The elements, in memory order: docs/sight.md."""
    blocks, runs = -(-n // RUN), max(1, sample // RUN)
    if n <= sample or runs >= blocks:
        return np.arange(n)
    spacing = blocks * 2**32 // runs
    starts = [(j * 2**32 + fraction(call, j)) * spacing // 2**64 * RUN for j in range(runs)]
    at = np.concatenate([np.arange(start, start + RUN) for start in starts])
    return at[at < n]


def shown(tensors: list[Tensor], sample: int, before: int = 0) -> Any:
    """The histogram: of all that is looked at, or of the first eight samples and one of sixteen. It may have begun after so
    many calls."""
    n = tensors[0].numel()
    calls = [call for call in range(len(tensors)) if call < 8 or len(looked_at(n, sample, 0)) == n or fraction(call, 0) < 2**28]
    return sum(counters(numbers(tensors[call]).reshape(-1)[looked_at(n, sample, before + call)]) for call in calls)


@pytest.mark.parametrize("n", [1, 63, 200, 256, 257, 5000, 70_000])
@pytest.mark.parametrize("sample", [64, 200, 4096])
def test_a_sample(n: int, sample: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    model = fastact.ReLU()
    xs = [sample_of(torch.empty(n, dtype=dtype), generator).requires_grad_() for _ in range(3)]
    dys = [sample_of(x, generator) for x in xs]
    calls = [lambda x=x, dy=dy: model(x).backward(dy) for x, dy in zip(xs, dys, strict=True)]
    layer = only(watched(model, *calls, sample=sample))
    for call, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        at = looked_at(n, sample, call)
        assert len(at) <= max(sample, RUN) or n < 2 * RUN
        check_side("output", layer.output, call, numbers(torch.relu(x))[at])
        check_side("gradient in", layer.gradient_in, call, numbers(dy)[at])
        assert x.grad is not None
        check_side("gradient out", layer.gradient_out, call, numbers(x.grad)[at])
        seen = np.zeros(n, bool)
        seen[at] = True
        assert (layer.units is None) == (n > MOST_UNITS)
        assert layer.units is None or (layer.units.seen[call] == seen).all()
    for side, tensors in ((layer.output, [torch.relu(x) for x in xs]), (layer.gradient_in, dys)):
        assert (side.histogram == shown(tensors, sample)).all()


def test_histograms_are_those_of_training(generator: torch.Generator) -> None:
    """If there is any: evaluation before and after it is counted, but not shown among it."""
    model = fastact.Tanh()
    evaluated, trained = torch.randn(3, 50, generator=generator), torch.randn(3, 50, generator=generator)

    def evaluate() -> None:
        with torch.inference_mode():
            model.eval()(evaluated)

    def train() -> None:
        model.train()(trained.requires_grad_()).sum().backward()

    for calls, shown in (([evaluate] * 2, [evaluated] * 2), ([evaluate, train, evaluate, train], [trained] * 2)):
        layer = only(watched(model, *calls, sample=None))
        assert layer.output.count.tolist() == [150] * len(calls)
        assert (layer.output.histogram == sum(counters(numbers(torch.tanh(x))) for x in shown)).all()
    assert layer.gradient_in.histogram.sum() == 300


def test_histograms_of_samples(generator: torch.Generator) -> None:
    """Of training as many samples as if there had been no evaluation before it."""
    model = fastact.Tanh()
    xs = [torch.randn(80 * RUN, generator=generator).requires_grad_() for _ in range(40)]
    trains = [lambda x=x: model.train()(x).sum().backward() for x in xs]
    evaluates = [lambda x=x: model.eval()(x) for x in xs]
    assert 45 < sum(fraction(call, 0) < 2**28 for call in range(800)) < 55
    for calls, before in ((trains, 0), (evaluates, 0), (evaluates[:11] + trains, 11), (trains + evaluates[:11], 0)):
        layer = only(watched(model, *calls, sample=256))
        expected = shown([torch.tanh(x) for x in xs], 256, before)
        assert (layer.output.histogram == expected).all()
        assert layer.gradient_in.histogram.sum() == (0 if calls is evaluates else expected.sum())


@pytest.mark.parametrize("values", [[-0.0], [0.0], [-0.0, 0.0]])
def test_extremes_that_are_zeros_have_no_sign(values: list[float]) -> None:
    """Which of them comes first depends on the threads."""
    model = fastact.Tanh()
    output = only(watched(model, lambda: model(torch.tensor(values).repeat(100)))).output
    for extreme in (output.minimum, output.maximum):
        assert extreme[0] == 0
        assert not np.signbit(extreme[0])


@pytest.mark.parametrize(("n", "sample"), [(256, 256), (257, 256), (131_071, 256), (524_288, 1024), (3_000_000, 2048)])
def test_how_many_are_looked_at_unless_said(n: int, sample: int) -> None:
    model = fastact.ReLU()
    layer = only(watched(model, lambda: model(torch.ones(n, requires_grad=True)).sum().backward()))
    of_gradients = sample if n <= 256 else sample // 2
    for side, number in ((layer.output, sample), (layer.gradient_in, of_gradients), (layer.gradient_out, of_gradients)):
        assert side.count.tolist() == [len(looked_at(n, number, 0))]
        assert abs(side.count[0] - number) < RUN


def test_counters_made_in_inference_mode_are_no_inference_tensors() -> None:
    """On a GPU they are set to 0 outside it, where torch refuses to change such a tensor."""
    model = fastact.Tanh()
    with fastact.monitor(model) as watch:
        with torch.inference_mode():
            model(torch.ones(3))
        (layer,) = watch._core.layers()
        assert not layer["histograms"].is_inference()


def test_bins_do_not_overflow() -> None:
    """Those on the device have 32 bits."""
    x, calls = torch.zeros(1 << 24), 258
    model = fastact.ReLU()
    with fastact.monitor(model, sample=None) as watch, torch.no_grad():
        for _ in range(calls):
            model(x)
    histogram = watch.history().layers[0].output.histogram
    assert histogram[0, 0] == histogram.sum() == calls * x.numel()


def test_rows_of_a_sample(generator: torch.Generator) -> None:
    """As many rows as have so many elements, other ones in every call."""
    x = torch.randn(1000, 10, generator=generator)
    x[::100, 3] = 50  # sure
    model = fastact.Softmax(1)
    rows = only(watched(model, *[lambda: model(x)] * 100, sample=100)).rows
    assert rows is not None
    assert rows.count.tolist() == [10] * 100
    assert rows.sure.tolist() == [sum(fraction(call, j) * 100 >> 32 == 0 for j in range(10)) for call in range(100)]
    assert 8 <= rows.sure.sum() <= 12


@pytest.mark.parametrize("batch", [32, 31])
def test_a_sample_sees_all_channels(batch: int) -> None:
    """Though the runs lie as far apart as the images do."""
    x = torch.ones(batch, 64, 16, 16)
    x[:, 8:] = 0
    model = fastact.ReLU()
    layer = only(watched(model, *[lambda: model(x)] * 100))
    assert layer.output.zeros.sum() / layer.output.count.sum() == pytest.approx(7 / 8, abs=0.02)
    assert layer.units is not None
    assert layer.units.seen.any(axis=0).all()
    few = layer.output.zeros[:5].sum() / layer.output.count[:5].sum()
    assert few == pytest.approx(7 / 8, abs=0.1)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_units_of_a_sample(layout: str, generator: torch.Generator) -> None:
    x = LAYOUTS[layout](torch.randn(4, 37, 16, 16, generator=generator))
    x[:, 5] = -1
    model = fastact.ReLU()
    layer = only(watched(model, *[lambda: model(x)] * 4, sample=512))
    for call in range(4):
        at = looked_at(x.numel(), 512, call)
        values = in_memory_order(torch.relu(x))[at]
        unit = in_memory_order(torch.zeros_like(x) + torch.arange(37.0)[None, :, None, None])[at].astype(int)
        assert layer.units is not None
        assert set(np.flatnonzero(layer.units.seen[call])) == set(unit)
        assert set(np.flatnonzero(layer.units.active[call])) == set(unit[values != 0])


@pytest.mark.parametrize("sample", [None, 512])
@pytest.mark.parametrize("units", [1, 7, 63, 64, 65, 100, 127, 128, 1000])
def test_units_along_the_last_dim(units: int, sample: int | None, isa: str, generator: torch.Generator) -> None:
    """However a run of 64 lies among them."""
    x = torch.randn(2000 // units + 1, units, generator=generator) - 2
    model = fastact.ReLU()
    layer = only(watched(model, *[lambda: model(x)] * 3, sample=sample))
    assert layer.units is not None
    y = numbers(torch.relu(x)).reshape(-1)
    for call in range(3):
        at = looked_at(x.numel(), sample or x.numel(), call)
        assert set(np.flatnonzero(layer.units.seen[call])) == set(at % units)
        assert set(np.flatnonzero(layer.units.active[call])) == set(at[y[at] != 0] % units)


@pytest.mark.parametrize("n", [257, 5000])
def test_samples_come_everywhere(n: int) -> None:
    model = fastact.ReLU()
    x = torch.ones(n)
    units = only(watched(model, *[lambda: model(x)] * 200, sample=200)).units
    assert units is not None
    assert units.seen.any(axis=0).all()


def test_callers_at_once(one_thread: None) -> None:
    """Several threads call one module, in other orders of their inputs' widths: nothing is lost, and no layer made twice."""
    widths, rows, calls, model = (1000, 2000, 3000), 20, 300, fastact.Tanh()  # so many that the interpreter's lock is released

    def call_all(first: int) -> None:
        with torch.no_grad():
            for k in range(calls):
                model(xs[(first + k) % 3])

    xs = [torch.full((rows, width), 3.0) for width in widths]
    with fastact.monitor(model, sample=None) as watch:
        threads = [threading.Thread(target=call_all, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    layers = watch.history().layers
    assert sorted(layer.units.number for layer in layers) == list(widths)  # type: ignore[union-attr]
    for layer in layers:
        total = calls * rows * layer.units.number  # type: ignore[union-attr]
        assert layer.output.count.sum() == layer.output.high.sum() == layer.output.histogram.sum() == total


@pytest.mark.cpu_only("the number of threads is the CPU's")
@pytest.mark.parametrize("sample", [None, 2048, 100_000])
def test_counts_do_not_depend_on_threads(dtype: torch.dtype, sample: int | None, generator: torch.Generator) -> None:
    """Nor do the sums. A sample's runs lie on both sides of where the work is divided."""
    x = sample_of(torch.empty(30_001, 7, dtype=dtype), generator)
    dy = sample_of(torch.empty(30_001, 7, dtype=dtype), generator)
    model = fastact.Tanh()
    found = []
    for count in THREAD_COUNTS:
        torch.set_num_threads(count)
        calls = [lambda: model(x.clone().requires_grad_()).backward(dy)] * 5
        found.append(only(watched(model, *calls, sample=sample)))
    for other in found[1:]:
        for side in ("output", "gradient_in", "gradient_out"):
            for name, value in vars(getattr(found[0], side)).items():
                assert np.all(getattr(getattr(other, side), name) == value), (side, name)
        assert found[0].units is not None
        assert other.units is not None
        assert (other.units.active == found[0].units.active).all()


def test_torch_modules_get_the_same_figures(public_row: Row, generator: torch.Generator) -> None:
    torchs = getattr(nn, public_row.class_name, None)
    if torchs is None:
        assert public_row.name == "scaled_sigmoid"
        return
    arguments = [1] if public_row.along_dim else []
    x = (torch.randn(40, 300, generator=generator) * 4).requires_grad_()
    dy = torch.randn(40, 300, generator=generator)
    found = []
    for module in (torchs(*arguments), getattr(fastact, public_row.class_name)(*arguments)):
        found.append(only(watched(module, lambda module=module: module(x).backward(dy))))
    ours, other = found[1], found[0]
    assert (other.source, ours.source) == ("torch.nn", "fastact")
    assert (other.kind, other.squashing, other.bounds, other.length) == (ours.kind, ours.squashing, ours.bounds, ours.length)
    for side in ("output", "gradient_in", "gradient_out"):
        for name in ("count", "total", "squares"):
            a, b = (getattr(getattr(layer, side), name) for layer in found)
            assert a == pytest.approx(b, rel=1e-4, abs=1e-3), f"{side} {name}"


@pytest.mark.parametrize(
    ("activation", "saturated"),
    [
        (nn.Hardtanh(-0.3, 0.7), lambda x: (x <= -0.3) | (x >= 0.7)),
        (nn.ReLU6(), lambda x: (x <= 0) | (x >= 6)),
        (nn.Softsign(), lambda x: 1 / (1 + x.abs()).square() < 1 - 0.97**2),
    ],
)
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16], ids=str)
def test_saturation_of_modules_without_a_row(
    activation: nn.Module, saturated: Callable[[Tensor], Tensor], narrow: torch.dtype, generator: torch.Generator
) -> None:
    x = (torch.randn(1000, generator=generator) * 4).to(narrow)
    layer = only(watched(activation, lambda: activation(x), sample=None))
    assert layer.squashing
    expected = int(saturated(x.double()).sum())
    # An output in 16 bits may round to the limit, or from it: 2^-8 of the inputs' range about it, of 1,000.
    slack = 0 if narrow == torch.float32 or isinstance(activation, nn.ReLU6) else 15
    assert abs(layer.output.low[0] + layer.output.high[0] - expected) <= slack
    assert expected > 200


def test_subclasses_of_torchs_modules(generator: torch.Generator) -> None:
    """They may compute something else: they are looked at under their own name, without what is known of the class above."""

    class Doubled(nn.Tanh):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = torch.randn(100, generator=generator)
    model = Doubled()
    layer = only(watched(model, lambda: model(x), sample=None))
    assert (layer.name, layer.kind, layer.squashing) == ("doubled", "doubled", False)
    check_side("twice", layer.output, 0, numbers(2 * torch.tanh(x)))


def test_modules_without_a_row(generator: torch.Generator) -> None:
    x = torch.randn(6, 8, generator=generator)
    for module in (nn.GELU(), fastact.PReLU(8), fastact.Maxout(2), fastact.ScaledSigmoid(learnable=True, num_parameters=8)):
        y = []
        layer = only(watched(module, lambda m=module, y=y: y.append(m(x)), sample=None))
        check_side(type(module).__name__, layer.output, 0, numbers(y[0]))


# ---- Nothing is changed ----------------------------------------------------------------------------------------------------


def test_outputs_and_gradients_are_unchanged(public_row: Row, generator: torch.Generator) -> None:
    module = module_class(public_row)(*([1] if public_row.along_dim else []))
    x = torch.randn(50, 600, generator=generator).requires_grad_()
    dy = torch.randn(50, 600, generator=generator)
    y = module(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    with fastact.monitor(module):
        watched_y = module(x)
        (watched_dx,) = torch.autograd.grad(watched_y, x, dy)
    assert torch.equal(y, watched_y)
    assert torch.equal(dx, watched_dx)


class Net(nn.Module):
    """Modules and functions, one module twice."""

    def __init__(self, activation: type[nn.Module] = fastact.Tanh) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.act = activation()
        self.second = nn.Linear(16, 16)
        self.alias = self.act
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = fastact.relu(self.second(x)) + fastact.sigmoid(x)
        x = fastact.relu(self.alias(x))
        return fastact.softmax(self.last(x), 1)


def test_names_and_shared_modules() -> None:
    net = Net()
    history = watched(net, lambda: net(torch.ones(5, 8)), sample=None)
    assert [(layer.name, layer.kind) for layer in history.layers] == [
        ("act", "tanh"), ("relu", "relu"), ("sigmoid", "sigmoid"), ("relu#2", "relu"), ("softmax", "softmax"),
    ]  # fmt: skip
    act = history.layers[0]
    assert act.shared == ["alias"]
    assert act.output.count[0] == 2 * 5 * 16
    nested = nn.Sequential(Net(), nn.Sequential(fastact.ReLU()))
    names = [layer.name for layer in watched(nested, lambda: nested(torch.ones(5, 8))).layers]
    assert names == ["0.act", "0/relu", "0/sigmoid", "0/relu#2", "0/softmax", "1.0"]


def test_a_place_that_calls_now_one_and_now_another() -> None:
    class Either(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fastact.relu(x) if self.training else fastact.tanh(x)

    model = Either()
    x = torch.ones(3, 4)
    calls: list[Callable[[], Any]] = []
    for training in (True, False, True, False):
        calls += [lambda training=training: model.train(training)(x)]
    layers = watched(model, *calls, sample=None).layers
    assert [(layer.name, layer.steps.tolist()) for layer in layers] == [("relu", [0, 2]), ("tanh", [1, 3])]
    assert [layer.output.count.tolist() for layer in layers] == [[12, 12], [12, 12]]


def test_a_layer_whose_width_changes() -> None:
    """One module called at several widths in turn, as the ReLU of a bottleneck block is: a layer, with units, for each."""
    model = fastact.ReLU()
    narrow, wide = torch.ones(3, 8), torch.zeros(3, 16)

    def call() -> None:
        for x in (narrow, narrow, wide):
            model(x)

    history = watched(model, call, call, sample=None)
    assert [(layer.name, layer.output.count.tolist()) for layer in history.layers] == [("relu", [48, 48]), ("relu#2", [48, 48])]
    assert [layer.units.active.any(axis=0).tolist() for layer in history.layers if layer.units] == [[True] * 8, [False] * 16]


def test_a_layer_of_any_width() -> None:
    """As over sequences of any length: from the fifth width on, figures are the first layer's, which has no units for them."""
    model = fastact.ReLU()
    calls = [lambda n=n: model(torch.ones(3, n)) for n in range(1, 9)]
    history = watched(model, *calls, sample=None)
    assert [sum(layer.output.count) for layer in history.layers] == [3 + 3 * (5 + 6 + 7 + 8), 6, 9, 12]
    units = history.layers[0].units
    assert units is not None
    assert units.seen.tolist() == [[True]] + [[False]] * 4
    softmax = fastact.Softmax(dim=1)
    assert len(watched(softmax, *[lambda n=n: softmax(torch.ones(3, n)) for n in range(2, 5)]).layers) == 1


def test_in_place_and_checkpointed(generator: torch.Generator) -> None:
    x = torch.randn(30, 16, generator=generator)
    for module in (fastact.ReLU(inplace=True), nn.ReLU(inplace=True)):
        model = nn.Sequential(nn.Linear(16, 16), module)
        layer = only(watched(model, lambda model=model: model(x).sum().backward(), sample=None))
        y = numbers(model(x))
        check_side("in place", layer.output, 0, y)
        assert layer.gradient_in.count == y.size
        assert layer.gradient_out.zeros == (y == 0).sum()
    model = nn.Sequential(nn.Linear(16, 16), fastact.Tanh())
    layer = only(watched(model, lambda: checkpoint(model, x, use_reentrant=False).sum().backward(), sample=None))
    assert layer.output.count == 2 * x.numel()  # computed twice
    assert layer.gradient_in.count == x.numel()


def test_copies_and_files_while_watching() -> None:
    net = Net()
    with fastact.monitor(net) as watch:
        net(torch.ones(5, 8))
        other = copy.deepcopy(net)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for model in (other, loaded):
            assert torch.equal(model(torch.ones(5, 8)), net(torch.ones(5, 8)))
    counts = [layer.output.count.sum() for layer in watch.history().layers]
    assert counts[0] == 3 * 2 * 5 * 16


def test_shallow_copies_count_for_their_original() -> None:
    """As DataParallel makes them."""
    model = fastact.LeakyReLU(0.1)
    with fastact.monitor(model, sample=None) as watch:
        for module in (model, copy.copy(model), model._replicate_for_data_parallel()):  # type: ignore[operator]
            module.negative_slope = 0.5  # each its own
            assert module(-torch.ones(3)).tolist() == [-0.5] * 3
            module.negative_slope = 0.1
    assert only(watch.history()).output.count.sum() == 9


class Twice(fastact.Tanh):
    """Calls the function, where the class above would."""

    def forward(self, input: Tensor) -> Tensor:
        return fastact.tanh(fastact.tanh(input))


class Shifted(fastact.Tanh):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1)


def test_modules_with_a_forward_of_their_own() -> None:
    own = fastact.Tanh()
    own.forward = lambda input: fastact.tanh(input)  # type: ignore[method-assign, assignment]
    model = nn.Sequential(Twice(), Shifted(), own, fastact.Tanh())
    history = watched(model, lambda: model(torch.ones(3)))
    assert [layer.name for layer in history.layers] == ["0", "0#2", "1", "2", "3"]
    assert [layer.output.count.tolist() for layer in history.layers] == [[3]] * 5


def test_a_forward_called_by_itself() -> None:
    """Without the hooks of a call."""
    model = fastact.Tanh()
    with fastact.monitor(model) as watch:
        model.forward(torch.ones(3))
    assert only(watch.history()).output.count.tolist() == [3]


# ---- Steps -----------------------------------------------------------------------------------------------------------------


def train(net: nn.Module, steps: int, optimizer: torch.optim.Optimizer | None = None, forwards: int = 1) -> None:
    for _ in range(steps):
        for _ in range(forwards):
            net(torch.ones(5, 8)).square().sum().backward()
        if optimizer:
            optimizer.step()


@pytest.mark.parametrize(
    "wrap",
    [lambda y: y, lambda y: (torch.zeros(3), y), lambda y: {"probabilities": [y], "loss": None}, lambda y: y.clamp(0, 1)],
    ids=["tensor", "tuple", "mapping", "clamped"],
)
def test_the_layer_that_makes_the_output(wrap: Callable[[Tensor], Any], request: pytest.FixtureRequest) -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.last = fastact.Tanh(), fastact.Sigmoid()

        def forward(self, x: Tensor) -> Any:
            return wrap(self.last(self.hidden(x)))

    model = Returns()
    found = watched(model, lambda: model(torch.ones(5, 8))).output
    assert found == ("" if request.node.callspec.id == "clamped" else "last")


def test_an_optimizer_ends_a_step() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.01)
    with fastact.monitor(net, sample=None) as watch:
        for _ in range(3):
            train(net, 1, None, forwards=2)
            stranger.step()
            optimizer.step()
    act = watch.history().layers[0]
    assert act.steps.tolist() == [0, 1, 2]
    assert act.output.count.tolist() == [2 * 2 * 5 * 16] * 3
    assert act.training.all()


def test_steps_without_an_optimizer() -> None:
    net = Net()
    with fastact.monitor(net) as watch:
        train(net, 1, forwards=2)
        with torch.no_grad():
            net.first.bias += 1  # by hand
        train(net, 1)
        net.zero_grad()  # as where a scaler skips the optimizer
        train(net, 1)
        net(torch.ones(5, 8))
    act = watch.history().layers[0]
    assert act.output.count.tolist() == [320.0, 160.0, 320.0]


def test_every_call_in_evaluation_mode_is_a_step() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with fastact.monitor(net) as watch:
        train(net, 2, optimizer)
        net.eval()
        with torch.no_grad():
            net(torch.ones(5, 8))
            net(torch.ones(7, 8))
        net.train()
        train(net, 1, optimizer)
    act = watch.history().layers[0]
    assert act.steps.tolist() == [0, 1, 2, 3, 4]
    assert act.training.tolist() == [True, True, False, False, True]
    assert act.output.count[2:4].tolist() == [160.0, 224.0]


class Pair(nn.ModuleDict):
    """Whose parts are called, and never itself: a generator and its discriminator, or a step of training written by hand."""

    def __init__(self) -> None:
        super().__init__({"first": nn.Sequential(nn.Linear(8, 8), fastact.Tanh()), "second": nn.Sequential(nn.Tanh())})

    def step(self, x: Tensor) -> Tensor:
        return self["second"](self["first"](x)).sum()


@pytest.mark.parametrize("begin", ["training", "evaluation"])
def test_the_mode_of_parts_that_are_called_alone(begin: str) -> None:
    net = Pair()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    modes = {"training": [True, True, False, True], "evaluation": [False, True]}[begin]
    with fastact.monitor(net) as watch:
        for training in modes:
            net.train(training)
            if training:
                net.step(torch.ones(5, 8)).backward()
                optimizer.step()
            else:
                with torch.no_grad():
                    net.step(torch.ones(7, 8))
                    net.step(torch.ones(7, 8))
    for layer in watch.history().layers:
        assert layer.training.tolist() == modes
        assert layer.output.count.tolist() == [40 if training else 112 for training in modes]


def test_a_frozen_part_is_of_the_step_of_the_whole() -> None:
    """A model in training has parts in evaluation mode."""
    net = nn.Sequential(nn.Linear(8, 8), fastact.Tanh(), nn.Linear(8, 8), fastact.Tanh())
    net[1].eval()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with fastact.monitor(net) as watch:
        train(net, 3, optimizer)
    for layer in watch.history().layers:
        assert layer.training.tolist() == [True] * 3
        assert layer.output.count.tolist() == [40] * 3


def test_a_checkpoint_of_the_whole_model_is_one_step() -> None:
    """It calls the model again in the backward."""
    net = Net().eval()
    with fastact.monitor(net) as watch:
        for _ in range(3):
            checkpoint(net, torch.ones(5, 8), use_reentrant=False).square().sum().backward()
    act = watch.history().layers[0]
    assert act.output.count.tolist() == [2 * 160] * 3
    assert act.gradient_in.count.tolist() == [160] * 3


def test_a_gradient_penalty_is_of_the_same_step() -> None:
    """A gradient is taken, and the model called again, before the backward."""
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with fastact.monitor(net, sample=None) as watch:
        for step in range(4):
            x = torch.ones(5, 8, requires_grad=True)
            penalty = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].square().sum()
            if step > 0:  # from when on it is known that there is an optimizer
                penalty = penalty + net(x).square().sum()
            penalty.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert watch.history().layers[0].output.count.tolist() == [160, 320, 320, 320]


def test_parameters_that_are_replaced() -> None:
    net = Net()
    with fastact.monitor(net) as watch:
        net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()}, assign=True)
        train(net, 3, torch.optim.SGD(net.parameters(), 0.01))
    assert watch.history().layers[0].steps.tolist() == [0, 1, 2]


def test_one_of_every_steps() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with fastact.monitor(net, every=3) as watch:
        train(net, 8, optimizer)
    act = watch.history().layers[0]
    assert act.steps.tolist() == [0, 3, 6]
    assert act.output.count.tolist() == [160.0] * 3
    assert act.gradient_in.count.tolist() == [160.0] * 3


def test_a_step_without_a_call_is_none() -> None:
    net = Net()
    with fastact.monitor(net) as watch:
        for _ in range(2):
            train(net, 1, torch.optim.SGD(net.parameters(), 0.01))
            watch.step()
            watch.step()
    assert watch.history().layers[0].steps.tolist() == [0, 1]


def test_unit_dims() -> None:
    net = nn.Sequential(nn.Conv1d(3, 5, 1), fastact.ReLU(), nn.Tanh(), nn.Flatten(), fastact.Sigmoid())
    x = torch.randn(4, 3, 7)

    def found(**options: Any) -> list[int | None]:
        return [layer.unit_dim for layer in watched(net, lambda: net(x), **options).layers]

    assert found() == [1, 2, 1]  # behind a convolution its channels, else the last
    assert found(unit_dim=0) == [0, 0, 0]
    assert found(unit_dim={"2": -2}) == [1, 1, 1]


def test_many_steps_are_taken_in() -> None:
    net = Net()
    with fastact.monitor(net) as watch:
        train(net, 300, torch.optim.SGD(net.parameters(), 0.0))
        assert len(watch._pending) < 300
    act = watch.history().layers[0]
    assert len(act.steps) == 300
    assert (act.output.count == 160).all()
    assert act.output.histogram.sum() == 300 * 160


# ---- What is left behind -----------------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    """On the model and on optimizers, and the classes of ours whose forward is another while a monitor is open."""
    ours = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    classes = sum(hasattr(cls.forward, "__wrapped__") for cls in modules.classes)
    return ours + len(_global_optimizer_post_hooks) + classes


def test_a_model_that_holds_its_monitor() -> None:
    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = fastact.Tanh()
            self.watch = fastact.monitor(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.act(x)

    model = Watched()
    other = copy.deepcopy(model)
    model(torch.ones(3))
    other(torch.ones(5))
    model.watch.close()
    assert only(model.watch.history()).output.count.tolist() == [3]


def test_nothing_is_left_behind() -> None:
    net = Net()
    before = hooks(net)
    watch = fastact.monitor(net)
    assert hooks(net) > before
    loss = net(torch.ones(5, 8)).sum()
    watch.close()
    watch.close()
    assert hooks(net) == before
    counts = watch.history().layers[0].output.count.tolist()
    loss.backward()
    net(torch.ones(5, 8))
    assert watch.history().layers[0].output.count.tolist() == counts
    assert not _C.monitors()
    assert not [cls for cls in modules.classes if hasattr(cls.forward, "__wrapped__")]


@pytest.mark.parametrize("activation", [fastact.Tanh, nn.Tanh])
def test_closed_by_a_hook(activation: Callable[[], nn.Module]) -> None:
    net = activation()
    net.register_forward_hook(lambda *_: watch.close())
    before = hooks(net)
    watch = fastact.monitor(net)
    net(torch.ones(5, 8, requires_grad=True)).sum().backward()
    assert hooks(net) == before
    assert not _C.monitors()


def test_after_an_exception() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("planted")

    net = nn.Sequential(fastact.Tanh(), Fails(), fastact.Tanh())
    before = hooks(net)
    with pytest.raises(KeyError, match="planted"), fastact.monitor(net) as watch:
        net(torch.ones(5, 8))
    assert hooks(net) == before
    assert [layer.name for layer in watch.history().layers] == ["0"]
    assert watch.history().unseen == [("2", "was never called")]
    assert not _C.monitors()
    # Nor does a module count that was left by it.
    with fastact.monitor(net) as watch:
        for _ in range(2):
            with pytest.raises(KeyError):
                net(torch.ones(5, 8))
        fastact.sigmoid(torch.ones(3))
    assert [layer.name for layer in watch.history().layers] == ["0"]


def test_after_what_is_no_exception_for_hooks() -> None:
    """torch calls no hook where a forward pass ends by Ctrl-C. What was entered is left with the module around it."""

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Interrupted()

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(KeyboardInterrupt):
                self.inner(x)
            return x

    net = Outer()
    with fastact.monitor(net) as watch:
        net(torch.ones(5, 8))
        fastact.sigmoid(torch.ones(3))
    assert not watch.history().layers


def test_after_a_failed_backward() -> None:
    """What comes next is not taken for it."""
    net = fastact.Tanh()
    x = torch.ones(5, 8, requires_grad=True)
    with fastact.monitor(net, sample=None) as watch:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: torch.ones(2)):
            y = net(x).sum()
        with pytest.raises(RuntimeError, match="dy has shape"):
            y.backward()
        torch.ops.fastact.tanh_backward(torch.ones(3), torch.ones(3))
    assert only(watch.history()).gradient_in.count.tolist() == [0]


def test_a_deleted_model_and_a_forgotten_monitor() -> None:
    net = Net()
    model = weakref.ref(net)
    watch = fastact.monitor(net)
    net(torch.ones(5, 8))
    del net
    gc.collect()
    assert model() is None
    assert watch.history().layers[0].output.count.sum() == 160
    watch.close()
    net = Net()
    before = hooks(net)
    watch = fastact.monitor(net)
    net(torch.ones(5, 8))
    del watch
    gc.collect()
    assert hooks(net) == before
    assert not _C.monitors()


def test_two_monitors() -> None:
    net = nn.Sequential(Net(), fastact.ReLU())
    with fastact.monitor(net, sample=None) as outer, fastact.monitor(net[0], sample=None) as inner:
        train(net, 2, torch.optim.SGD(net.parameters(), 0.01))
    assert [layer.name for layer in inner.history().layers] == ["act", "relu", "sigmoid", "relu#2", "softmax"]
    assert outer.history().layers[0].name == "0.act"
    for a, b in zip(inner.history().layers, outer.history().layers, strict=False):
        assert a.output.count.tolist() == b.output.count.tolist()
        assert a.gradient_out.squares.tolist() == b.gradient_out.squares.tolist()


@pytest.mark.cpu_only("torch.compile is the CPU's here")
def test_compiled_models() -> None:
    net = nn.Sequential(nn.Linear(8, 8), fastact.Tanh(), nn.Linear(8, 8), nn.ReLU())
    x = torch.ones(3, 8)
    with fastact.monitor(net) as watch:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        compiled(x)
    assert not watch.history().layers
    why = "runs in code that torch.compile made, or was never called"
    with fastact.monitor(compiled) as watch:
        compiled(x)
    assert watch.history().unseen == [("1", why), ("3", why)]
    part = nn.Sequential(nn.ReLU(), torch.compile(nn.Sequential(fastact.Tanh()), backend="eager"), nn.Sigmoid())
    with fastact.monitor(part) as watch:
        part[1](part[0](x))
    assert watch.history().unseen == [("1._orig_mod.0", why), ("2", "was never called")]


@pytest.mark.cpu_only("torch.compile is the CPU's here")
def test_compiled_code_of_others_stays() -> None:
    counter = torch._dynamo.testing.CompileCounter()
    net = torch.compile(nn.Sequential(nn.Linear(8, 8), fastact.Tanh()), backend=counter, fullgraph=True)
    x = torch.ones(3, 8)
    expected = net(x)
    for _ in range(2):
        with fastact.monitor(fastact.Tanh()) as watch:
            assert torch.equal(net(x), expected)
        assert not watch.history().layers
        assert torch.equal(net(x), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("optimizer", [False, True])
def test_an_evaluation_between_forward_and_backward(optimizer: bool) -> None:
    """The gradients are those of the training step before it; a gradient that an evaluation has itself stays where it is."""
    model = nn.Sequential(nn.Linear(4, 6), fastact.Tanh())
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    x, other = torch.ones(3, 4), torch.ones(2, 4)
    with fastact.monitor(model, sample=None) as watch:
        for _ in range(3):
            y = model.train()(x)
            with torch.no_grad():
                for _ in range(2):
                    model.eval()(other)
            y.sum().backward()
            if optimizer:
                sgd.step()
            sgd.zero_grad()
        model.eval()(other.requires_grad_()).sum().backward()
    (layer,) = watch.history().layers
    assert layer.training.tolist() == [True, False, False] * 3 + [False]
    assert layer.output.count.tolist() == [18, 12, 12] * 3 + [12]
    for side, total in ((layer.gradient_in, 18.0), (layer.gradient_out, None)):
        assert side.count.tolist() == [18, 0, 0] * 3 + [12]
        assert (side.maximum[[0, 3, 6, 9]] > 0).all()
        assert total is None or side.total.tolist() == [total, 0, 0] * 3 + [12]
        assert side.histogram.sum() == 3 * 18  # of training


def test_an_evaluation_between_them_that_is_not_recorded() -> None:
    model = nn.Sequential(nn.Linear(4, 6), fastact.Tanh())
    sgd, x = torch.optim.SGD(model.parameters(), 0.1), torch.ones(3, 4)
    with fastact.monitor(model, every=2, sample=None) as watch:
        for _ in range(3):
            y = model.train()(x)
            with torch.no_grad():
                model.eval()(x)
            y.sum().backward()
            sgd.step()
    (layer,) = watch.history().layers
    assert layer.steps.tolist() == [0, 2, 4]
    assert layer.output.count.tolist() == layer.gradient_in.count.tolist() == [18, 18, 18]


def test_an_evaluation_before_a_checkpoint_is_computed_again() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 6), fastact.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = nn.Sequential(Block(), fastact.Sigmoid())
    x = torch.ones(3, 4)
    with fastact.monitor(model, sample=None) as watch:
        for _ in range(2):
            y = model.train()(x)
            with torch.no_grad():
                model.eval()(x)
            model.train()
            y.sum().backward()
            model.zero_grad()
    for layer in watch.history().layers:
        assert layer.training.tolist() == [True, False] * 2
        assert layer.gradient_in.count.tolist() == layer.gradient_out.count.tolist() == [18, 0] * 2


@pytest.mark.parametrize("ends", ["step", "report"])
def test_a_step_that_ends_between_them(ends: str) -> None:
    """What comes later is not taken for the gradients of that training step."""
    model = nn.Sequential(nn.Linear(4, 6), fastact.Tanh())
    x = torch.ones(3, 4)
    with fastact.monitor(model, sample=None) as watch:
        model.train()(x)
        with torch.no_grad():
            model.eval()(x)
        getattr(watch, ends)()
        for _ in range(2):
            model.train()(x).sum().backward()
            watch.step()
    (layer,) = watch.history().layers
    assert layer.training.tolist() == [True, False, True, True]
    assert layer.gradient_in.count.tolist() == [0, 0, 18, 18]


# ---- Arguments -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"every": 0}, ValueError, "every must be positive, but is 0"),
        ({"every": 1.5}, TypeError, "argument 'every' must be int, not float"),
        ({"every": None}, TypeError, "argument 'every' must be int, not NoneType"),
        ({"sample": -1}, ValueError, "sample must be positive, but is -1"),
        ({"unit_dim": {"no.such": 1}}, ValueError, r"unit_dim names no module of the model: \['no.such'\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    net = Net()
    before = hooks(net)
    with pytest.raises(error, match=says):
        fastact.monitor(net, **options)
    assert hooks(net) == before
    with pytest.raises(TypeError, match=r"argument 'model' must be a torch\.nn\.Module, not int"):
        fastact.monitor(3)  # type: ignore[arg-type]
    assert not _C.monitors()


def test_the_memory_of_a_layer() -> None:
    layers = 20  # so that their counters take more than one piece of memory
    net = nn.Sequential(*(fastact.ReLU() for _ in range(layers)))
    watch = fastact.monitor(net, sample=None)
    net(torch.ones(4, 8192))
    core = watch._core
    watch.step()
    (step,) = watch._pending
    taken = sum(len(counters) for counters in step.chunks.values())
    taken += sum(layer["histograms"].numel() * 4 for layer in core.layers())
    assert taken <= layers * 65536
    assert len(step.chunks) > 1
    watch.close()
    assert [layer.output.count.tolist() for layer in watch.history().layers] == [[4 * 8192]] * layers


def test_the_memory_of_many_steps() -> None:
    """A bit for each unit and step, twice, before close() and after."""
    steps, units = 400, 16_000
    model = fastact.ReLU()
    x = torch.ones(1, units)
    watch = fastact.monitor(model)
    tracemalloc.start()
    for _ in range(steps):
        model(x)
        watch.step()
    watch.close()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The histograms and the sums of a layer take some tens of KiB; a byte for each unit would be 12 MB more.
    assert held < 2 * steps * units / 8 * 1.5


# ---- Planted troubles --------------------------------------------------------------------------------------------------------


def kinds(watch: Any, **options: Any) -> list[tuple[str, str]]:
    return [(v.kind, v.layer) for v in watch.report(**options).verdicts]


def deep(activation: Callable[[], nn.Module], depth: int, gain: float, generator: torch.Generator) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(64, 64)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(64, 64, generator=generator) * gain / 8)
            linear.bias.zero_()
        layers += [linear, activation()]
    return nn.Sequential(*layers)


def run(model: nn.Module, generator: torch.Generator, steps: int = 40) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with fastact.monitor(model) as watch:
        for _ in range(steps):
            x = torch.randn(128, 64, generator=generator)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watch


# Of ReLU stacks of depth 3 the worst of 1,400 had 6% of dead units in a layer; of depth 4 one of 1,000 had 12%, and is not
# healthy (verdicts.DEAD).
@pytest.mark.parametrize(
    ("activation", "depth", "gain"), [(fastact.Tanh, 6, 1.0), (fastact.ReLU, 3, 2**0.5), (nn.ReLU, 3, 2**0.5)]
)
def test_a_healthy_network_gets_no_verdict(activation: Any, depth: int, gain: float, generator: torch.Generator) -> None:
    assert kinds(run(deep(activation, depth, gain, generator), generator)) == []


def test_a_saturated_layer_is_named(generator: torch.Generator) -> None:
    model = deep(fastact.Tanh, 3, 1.0, generator)
    with torch.no_grad():
        model[2].weight *= 40
    assert ("saturated", "3") in kinds(run(model, generator))


def test_a_vanishing_stack_is_named(generator: torch.Generator) -> None:
    assert "vanishing" in {kind for kind, _ in kinds(run(deep(fastact.Sigmoid, 10, 1.0, generator), generator))}


def test_dead_units_are_named(generator: torch.Generator) -> None:
    model = deep(fastact.ReLU, 2, 2**0.5, generator)
    with torch.no_grad():
        model[2].bias[:20] = -100
    assert ("dead units", "3") in kinds(run(model, generator))


def test_nan_at_step_7_is_named(generator: torch.Generator) -> None:
    model = deep(fastact.Tanh, 2, 1.0, generator)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with fastact.monitor(model) as watch:
        for step in range(10):
            loss = model(torch.randn(128, 64, generator=generator)).square().mean()
            (loss * (math.nan if step == 7 else 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
    said = [str(v.text) for v in watch.report().verdicts]
    assert any("step 7" in text for text in said), said


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_under_a_monitor() -> None:
    """What a transform wraps has no memory to look at; the kernels inside look at theirs."""
    x = torch.randn(4, 3)
    for activation in (nn.Tanh(), fastact.Tanh(), nn.Softmax(-1), fastact.Softmax(-1), nn.GELU()):
        model = nn.Sequential(activation)
        expected = [torch.func.vmap(model)(x), torch.func.jacrev(model)(x[0]), torch.func.jacfwd(model)(x[0])]
        with fastact.monitor(model):
            got = [torch.func.vmap(model)(x), torch.func.jacrev(model)(x[0]), torch.func.jacfwd(model)(x[0])]
        assert all(map(torch.equal, got, expected))


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage:UserWarning")
def test_nested_tensors_under_a_monitor() -> None:
    """Torch makes them of padded batches, in the fast path of its encoder."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation=nn.GELU())
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad(), fastact.monitor(model):
        model(x, src_key_padding_mask=padding)


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(8), fastact.Tanh())
    layer = only(watched(model, *[lambda: model(torch.randn(2, 5)).sum().backward()] * 2))
    assert layer.output.count.tolist() == [16, 16]


@pytest.mark.parametrize("activation", [nn.Softsign, nn.Tanhshrink])
def test_the_gradient_of_what_torch_makes_of_several_operators(activation: type[nn.Module]) -> None:
    """Autograd's last node knows no gradient of the input: better none than another."""
    model = activation()
    x = torch.randn(64, 16, requires_grad=True)
    layer = only(watched(model, lambda: model(x).sum().backward(), sample=None))
    assert layer.gradient_in.count.sum() == 1024
    assert layer.gradient_out.count.sum() == 0
