"""The benchmark refuses wrong results, and its files and exit codes can be relied on."""

import dataclasses
import hashlib
import json
import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import REFERENCE_ERROR

from fastact._registry import along_dim, elementwise
from fastact.bench import __main__ as program
from fastact.bench import cases as cases_module
from fastact.bench import channels, memory, sight, timing
from fastact.bench.cases import DTYPES, TENSORS_MOVED, Case, Inputs, make_cases, op_names, sides
from fastact.bench.check import WrongResult, check
from fastact.bench.compiling import Compiler
from fastact.bench.environment import Neighbours, environment
from fastact.bench.measure import measure
from fastact.bench.peers import OPERATORS, Peers
from fastact.bench.processes import Worker, resident_bytes
from fastact.bench.report import Report
from fastact.bench.saved import Kept, kept, saved_bytes, saved_table
from fastact.bench.timing import CallTimer, CpuTimer, CudaTimer, Spread, Timer


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """No test asserts a time, so a few samples of tiny tensors will do."""
    monkeypatch.setattr(Timer, "MOST", Timer.LEAST)
    monkeypatch.setattr(program, "CASE_SECONDS", {True: 0.0, False: 0.0})
    monkeypatch.setattr(cases_module, "QUICK_SIZES", (1, 300))
    monkeypatch.setattr(cases_module, "QUICK_SOFTMAX_SHAPES", (("rows", (8, 5), -1),))


def run(*arguments):
    return program.main(["--quick", "--no-compile", *map(str, arguments)])


def an_op():
    return next(iter(elementwise))


@pytest.fixture
def report_file(tmp_path):
    path = tmp_path / "report.json"
    assert run("--ops", an_op(), "--dtypes", "float32", "--json", path) == 0
    return path


def spoiled(row, **changes):
    """A row with other functions, whatever kind of object rows are."""
    names = ("name", "parameters", "function", "reference", "backward_op", "saves_input")
    return SimpleNamespace(**{name: getattr(row, name, None) for name in names} | changes)


def rewritten(path, change):
    """A copy of a report with `change` applied to every row."""
    data = json.loads(path.read_text())
    for row in data["rows"]:
        change(row)
    other = path.with_name("changed.json")
    other.write_text(json.dumps(data))
    return other


@pytest.mark.parametrize("name", DTYPES)
def test_every_activation_passes_its_check_and_is_measured_in_every_direction(name):
    rows = list(measure(make_cases(op_names(), [name], quick=True), "cpu", 0.0))

    measured = {(row.op, row.direction) for row in rows}
    assert measured == {(op, direction) for op in op_names() for direction in TENSORS_MOVED}
    assert all(row.ours.q1 <= row.ours.median <= row.ours.q3 for row in rows)
    assert all(row.ratio_compiled is None for row in rows)


@pytest.mark.parametrize(("shape", "dim"), [((4, 7, 3), 1), ((6, 5), 0), ((2, 3, 4, 5), -1)])
def test_softmaxes_are_measured_along_any_dim(shape, dim):
    for softmax in along_dim.values():
        rows = list(measure([Case(softmax, "float32", "any", shape, dim)], "cpu", 0.0))

        assert [(tuple(row.shape), row.dim) for row in rows] == [(shape, dim)] * 3


def test_traffic_and_ratios_follow_from_the_times():
    case = Case(elementwise[an_op()], "float64", "300", (300,))
    for row in measure([case], "cpu", 0.0):
        moved = TENSORS_MOVED[row.direction] * 300 * 8
        assert row.gigabytes_per_second == pytest.approx(moved / row.ours.median / 1e9)
        assert row.ratio_eager == pytest.approx(row.eager.median / row.ours.median)


def test_baselines_compute_what_is_measured(public_row):
    """Else a ratio would compare two different things: torch's own op, and what is compiled of it, give our gradient."""
    case = Case(public_row, "float64", "small", (30, 10), -1 if public_row.name in along_dim else None)
    for direction, side in sides(case, Inputs(case, "cpu")).items():
        torch._dynamo.reset()  # the functions share their code object, of which it keeps a few versions only
        expected = side.ours()
        compiled = side.compiled(lambda f: torch.compile(f, backend="eager", fullgraph=True))
        for baseline in (side.eager, compiled):
            # Some roundings of float64, of both.
            close = max(1e-13, REFERENCE_ERROR.get(public_row.name, 0))
            torch.testing.assert_close(baseline(), expected, rtol=close, atol=1e-15, msg=f"{public_row.name} {direction}")
    through_autograd = "autograd through that" in sides(case, Inputs(case, "cpu"))["backward"].baseline
    assert not (through_autograd and hasattr(torch.ops.aten, f"{public_row.name}_backward")), "torch has a backward op"


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda y: y * 1.001, id="slightly off"),
        pytest.param(lambda y: y * float("nan"), id="NaN"),
        pytest.param(lambda y: torch.cat([y[:-1], y[-1:] + 1]), id="last element"),
        pytest.param(lambda y: y.double(), id="dtype"),
        pytest.param(lambda y: y[None], id="shape"),
    ],
)
def test_wrong_forward_is_refused(monkeypatch, capsys, spoil):
    row = elementwise[an_op()]
    wrong = spoiled(row, function=lambda x, *args: spoil(row.function(x, *args)))
    monkeypatch.setitem(elementwise, row.name, wrong)

    assert run("--ops", row.name, "--dtypes", "float32") == 1

    captured = capsys.readouterr()
    assert f"wrong result, so no more is timed: {row.name} forward, float32" in captured.err
    assert not captured.out


@pytest.mark.parametrize("name", elementwise)
def test_the_reference_has_torchs_derivative_where_a_function_has_a_kink(name):
    """Random inputs hit such a place now and then."""
    case = Case(elementwise[name], "float32", "3", (3,))
    inputs = Inputs(case, "cpu")
    with torch.no_grad():
        inputs.x.copy_(torch.tensor([-3.0, 0.0, 3.0]))
    check(case, inputs, sides(case, inputs))


def test_wrong_backward_is_refused(public_row):
    wrong = spoiled(public_row, backward_op=lambda *args: public_row.backward_op(*args) * 1.01)
    shape, dim = ((300,), None) if public_row.name in elementwise else ((30, 10), -1)

    with pytest.raises(WrongResult, match=f"{public_row.name} backward, float32"):
        list(measure([Case(wrong, "float32", "wrong", shape, dim)], "cpu", 0.0))


def test_report_survives_the_file(tmp_path):
    rows = list(measure(make_cases([an_op(), *along_dim], ["float32"], quick=True), "cpu", 0.0))
    rows[0] = dataclasses.replace(rows[0], compiled=rows[0].eager, ratio_compiled=1.5)
    report = Report(environment("cpu", ["--quick"]), rows, ["a note"])

    report.save(tmp_path / "report.json")
    loaded = Report.load(tmp_path / "report.json")

    assert [dataclasses.asdict(row) for row in loaded.rows] == [dataclasses.asdict(r) for r in rows]
    assert loaded.table() == report.table()
    assert loaded.environment["command"] == "python -m fastact.bench --quick"


def test_table_fits_a_terminal_and_names_what_it_compares_with(report_file):
    table = Report.load(report_file).table()

    assert max(len(line) for line in table.splitlines()[2:]) <= 110
    assert "backward against" in table
    assert "geometric means" in table


def slower_by(factor, seconds=0.0):
    def change(row):
        for name, value in row["ours"].items():
            row["ours"][name] = value * factor + seconds

    return change


@pytest.mark.parametrize(
    ("make_new", "code", "said"),
    [
        pytest.param(slower_by(1.0), 0, "0 slower and 0 faster", id="the same"),
        pytest.param(slower_by(2.0, 1.0), 1, "6 slower and 0 faster", id="slower"),
        pytest.param(slower_by(1.0, 15e-6), 0, "0 slower", id="slower by a few us only"),
        pytest.param(lambda row: row.update(shape=[77]), 1, "0 of 6 rows", id="nothing in common"),
    ],
)
def test_compare(report_file, capsys, make_new, code, said):
    new = rewritten(report_file, make_new)

    assert program.main(["--from", str(new), "--compare", str(report_file)]) == code
    assert said in capsys.readouterr().out


def test_compare_ignores_a_few_percent_of_a_long_time(report_file):
    second = rewritten(report_file, lambda row: row["ours"].update(median=1.0))
    second = second.rename(second.with_name("second.json"))
    longer = rewritten(second, slower_by(1.09))

    assert program.main(["--from", str(longer), "--compare", str(second)]) == 0


def test_compare_finds_what_is_slower_by_both_limits_and_shows_it(report_file, capsys):
    """Just more than 10 % and 20 us: exit code 1, and a line that says how much, from what to what, and where."""
    old = rewritten(report_file, lambda row: row["ours"].update(median=200e-6))
    old = old.rename(old.with_name("old.json"))
    new = rewritten(old, slower_by(1.11))

    assert program.main(["--from", str(new), "--compare", str(old)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"  slower  +11%     200 us ->    222 us  {an_op()} forward, float32, 300" in lines
    assert lines[-1] == "6 of 6 rows compared, 6 slower and 0 faster by 10% and 20 us at least"
    # More than 10 % and less than 20 us, and the other way round.
    for was, factor in ((100e-6, 1.19), (1e-3, 1.09)):
        old = rewritten(report_file, lambda row, was=was: row["ours"].update(median=was))
        old = old.rename(old.with_name("old.json"))
        assert program.main(["--from", str(rewritten(old, slower_by(factor))), "--compare", str(old)]) == 0


def test_compare_measures_against_an_old_file(report_file, capsys):
    old = rewritten(report_file, slower_by(1.0, 100.0))

    assert run("--ops", an_op(), "--dtypes", "float32", "--compare", old) == 0
    assert "0 slower and 6 faster" in capsys.readouterr().out


def test_plot_from_a_file(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'fastact[bench]'")
    rows = list(measure(make_cases(op_names(), ["float32"], quick=True), "cpu", 0.0))
    Report(environment("cpu", []), rows).save(tmp_path / "report.json")

    picture = tmp_path / "report.png"
    assert program.main(["--from", str(tmp_path / "report.json"), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_every_row_has_its_place_in_the_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install 'fastact[bench]'")
    from fastact.bench.plot import draw

    ops = [an_op(), *along_dim]
    assert run("--ops", *ops, "--json", tmp_path / "report.json") == 0
    report = Report.load(tmp_path / "report.json")
    shown = 0
    for axes in (axes for part in draw(report).subfigs for axes in part.axes if axes.get_visible()):
        bars = [bar.get_y() for bar in axes.patches]
        assert len(set(bars)) == len(bars), axes.get_title()
        assert axes.get_title().partition(",")[0] in ops
        shown += len(bars) + sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() != "None")
    assert shown == sum(row.direction != "both" for row in report.rows)


def test_a_missing_matplotlib_is_said_before_measuring(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(program, "find_spec", lambda name: None)
    monkeypatch.setattr(program, "measure", lambda *_: pytest.fail("measured"))

    with pytest.raises(SystemExit) as exit:
        run("--plot", tmp_path / "x.png")
    assert exit.value.code == 2
    assert "pip install 'fastact[bench]'" in capsys.readouterr().err


def test_a_failing_compiler_costs_a_column_and_is_explained():
    def broken(function):
        raise RuntimeError("no C++ compiler\nand much more")

    compiler = Compiler("cpu", seconds=10)
    compiler._compile = broken
    compiler.probe()
    cases = [Case(elementwise[an_op()], "float32", "64", (64,))]

    assert [row.compiled for row in measure(cases, "cpu", 0.0, compiler)] == [None] * 3
    assert compiler.notes() == ["3 rows without torch.compile: RuntimeError: no C++ compiler"]


class FakeJax:
    """As much of JAX as is used, made of torch."""

    __version__ = "of torch"

    def __init__(self):
        self.config = SimpleNamespace(update=lambda *_: None)
        self.dlpack = SimpleNamespace(from_dlpack=lambda tensor: tensor)
        self.numpy = SimpleNamespace(where=torch.where, tanh=torch.tanh, exp=torch.exp, expm1=torch.expm1)
        functional = torch.nn.functional
        self.nn = SimpleNamespace(
            sigmoid=torch.sigmoid,
            relu=torch.relu,
            leaky_relu=functional.leaky_relu,
            elu=functional.elu,
            silu=functional.silu,
            softplus=functional.softplus,
            log_sigmoid=functional.logsigmoid,
            hard_sigmoid=functional.hardsigmoid,
            softmax=torch.softmax,
            log_softmax=torch.log_softmax,
        )

    def devices(self):
        return ["cpu"]

    def jit(self, function):
        return lambda *arrays: SimpleNamespace(block_until_ready=lambda: function(*arrays))


class FakeOnnx:
    """As much of onnx and onnxruntime as is used, made of torch; a model is what it was made of."""

    __version__ = "of torch"
    TensorProto = SimpleNamespace(FLOAT=torch.float32, BFLOAT16=torch.bfloat16, FLOAT16=torch.float16, DOUBLE=torch.float64)
    OrtValue = SimpleNamespace(from_dlpack=lambda tensor: tensor)
    FUNCTIONS = {  # noqa: RUF012
        "Sigmoid": torch.sigmoid,
        "Relu": torch.relu,
        "LeakyRelu": lambda x, alpha: torch.nn.functional.leaky_relu(x, alpha),
        "Tanh": torch.tanh,
        "Elu": torch.nn.functional.elu,
        "Softplus": torch.nn.functional.softplus,
        "HardSigmoid": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
        "Softmax": lambda x, axis: torch.softmax(x, axis),
        "LogSoftmax": lambda x, axis: torch.log_softmax(x, axis),
    }

    def __init__(self):
        self.helper = SimpleNamespace(
            make_tensor_value_info=lambda name, kind, shape: (kind, shape),
            make_node=lambda operator, inputs, outputs, **attributes: (operator, attributes),
            make_graph=lambda nodes, name, inputs, outputs: (*nodes[0], *inputs[0]),
            make_opsetid=lambda domain, version: version,
            make_model=lambda graph, **_: SimpleNamespace(SerializeToString=lambda: graph),
        )

    class SessionOptions:
        pass

    class InferenceSession:
        def __init__(self, model, options, providers):
            assert options.intra_op_num_threads == torch.get_num_threads()
            assert providers == ["CPUExecutionProvider"]
            self.operator, self.attributes, self.kind, self.shape = model
            if self.kind == torch.bfloat16:
                raise type("NotImplemented", (Exception,), {})("Could not find an implementation for the node")

        def io_binding(self):
            return FakeOnnx.Binding()

        def run_with_iobinding(self, binding):
            assert binding.y is None, "the output is a new one"
            assert (binding.x.dtype, tuple(binding.x.shape)) == (self.kind, self.shape)
            binding.y = FakeOnnx.FUNCTIONS[self.operator](binding.x, **self.attributes)

    class Binding:
        def bind_ortvalue_input(self, name, value):
            self.x = value

        def bind_output(self, name, device):
            self.y = None

        def get_outputs(self):
            return [self.y]


@pytest.fixture
def fake_peers(monkeypatch):
    jax, onnx = FakeJax(), FakeOnnx()
    for name, module in {"jax": jax, "jax.numpy": jax.numpy, "onnx": onnx, "onnxruntime": onnx}.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(jax=jax, onnx=onnx)


def test_peers_are_measured_beside_torch(fake_peers, tmp_path, capsys):
    assert run("--peers", "--dtypes", "float32", "bfloat16", "--json", tmp_path / "peers.json") == 0

    report = Report.load(tmp_path / "peers.json")
    for row in report.rows:
        expected = {"forward": {"ort", "jax"}, "backward": {"jax"}, "both": set()}[row.direction]
        if row.dtype == "bfloat16" or row.op not in OPERATORS:  # which ONNX Runtime lacks
            expected.discard("ort")
        assert set(row.peers) == expected, row
        assert row.ratio_peers == {name: row.peers[name].median / row.ours.median for name in expected}
    out = capsys.readouterr().out
    assert "x ort  x jax" in out
    assert "rows without ort: no kernel for bfloat16" in out
    assert out.rstrip("\n") == report.table()
    assert max(len(line) for line in out.splitlines()[2:] if line.startswith(" ")) <= 120


def test_absent_peers_are_named_with_the_command_that_installs_them(monkeypatch, capsys):
    for name in ("jax", "onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)

    assert run("--ops", an_op(), "--dtypes", "float32", "--peers") == 0

    out = capsys.readouterr().out
    for name, module in (("ort", "onnxruntime"), ("jax", "jax")):
        assert f"{name}: left out, {module} is missing: pip install 'fastact[bench]'" in out
        assert f"x {name}" not in out


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda y: y * 1.001, id="slightly off"),
        pytest.param(lambda y: y * float("nan"), id="NaN"),
        pytest.param(lambda y: y.double(), id="dtype"),
        pytest.param(lambda y: y[None], id="shape"),
        pytest.param(lambda y: y.nothing_of_the_kind(), id="raises"),
    ],
)
def test_a_wrong_peer_costs_its_cells_only(fake_peers, spoil):
    fake_peers.jax.nn.sigmoid = lambda x: spoil(torch.sigmoid(x))
    peers = Peers()
    rows = list(measure([Case(elementwise["sigmoid"], "float32", "300", (300,))], "cpu", 0.0, peers=peers))

    assert [set(row.peers) for row in rows] == [{"ort"}, {"jax"}, set()]
    assert sum("1 rows without jax: " in note for note in peers.notes()) == 1


@pytest.mark.parametrize("name", DTYPES)
def test_installed_peers_compute_what_is_measured(name):
    for module in ("jax", "onnx", "onnxruntime"):
        pytest.importorskip(module, reason="pip install 'fastact[bench]'")
    peers = Peers()
    for case in make_cases(op_names(), [name], quick=True):
        inputs = Inputs(case, "cpu")
        for direction, side in sides(case, inputs).items():
            found = peers(case, inputs, direction, side.ours)
            assert ("jax" in found) == (direction != "both"), peers.notes()
            has_kernel = name in ("float32", "float16") and case.row.name in OPERATORS
            assert "ort" in found or direction != "forward" or not has_kernel, peers.notes()


def test_calls_take_turns(monkeypatch):
    events = []
    monkeypatch.setattr(CpuTimer, "prepare", lambda self, call: lambda: call() or 1.0)
    CpuTimer()({name: lambda name=name: events.append(name) for name in ("ours", "eager", "copy")}, 0.0)
    there, back = ["ours", "eager", "copy"], ["copy", "eager", "ours"]
    assert Timer.LEAST == 5
    assert events == 2 * (there + back) + there


def test_peers_have_the_cores_to_themselves(monkeypatch):
    """Theirs and torch's threads settle before the others are called; torch's calls are timed before there is a peer."""
    events = []
    monkeypatch.setattr(timing, "settle", lambda: events.append("settle"))

    def timed(self, calls, seconds):
        events.extend(calls if "ours" in calls else [call() for call in calls.values()])
        return {name: Spread(1.0, 1.0, 1.0) for name in calls}

    def peers(case, inputs, direction, ours):
        events.append("made")
        return {"ort": lambda: "ort", "jax": lambda: "jax"}

    monkeypatch.setattr(CpuTimer, "__call__", timed)
    case = make_cases(["relu"], ["float32"], quick=True)[0]
    rows = list(measure([case], "cpu", 0.0, peers=peers))
    assert events == 3 * ["ours", "eager", "copy", "made", "settle", "ort", "settle", "settle", "jax", "settle"]
    assert [list(row.peers) for row in rows] == 3 * [["ort", "jax"]]


def test_settling_waits_for_the_threads_that_run(monkeypatch):
    states = [True, True, False]
    monkeypatch.setattr(timing, "others_run", lambda: states.pop(0))
    timing.settle()
    assert not states

    monkeypatch.setattr(timing, "others_run", lambda: True)
    timing.settle()  # and not forever


def test_running_threads_are_seen():
    stop = threading.Event()
    data = bytes(1 << 22)

    def work():
        while not stop.is_set():
            hashlib.sha256(data)  # runs without the interpreter's lock

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert any(timing.others_run() for _ in range(1000))
    finally:
        stop.set()
        thread.join()
    assert not all(timing.others_run() for _ in range(1000))


def test_peers_are_for_the_cpu(capsys):
    with pytest.raises(SystemExit) as exit:
        run("--device", "cuda", "--peers")
    assert exit.value.code == 2
    assert "--peers" in capsys.readouterr().err


class Mask(torch.autograd.Function):
    """Saves one bit per element, eight of them in a byte."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.zeros(x.numel() // 8, dtype=torch.uint8))
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(torch.relu, Kept(4, 0, 0), id="output"),
        pytest.param(torch.nn.functional.leaky_relu, Kept(0, 4, 0), id="input"),
        pytest.param(lambda x: x * x, Kept(0, 4, 0), id="one storage twice"),
        pytest.param(lambda x: torch.sigmoid(x).tanh(), Kept(4, 0, 4), id="output and another"),
        pytest.param(lambda x: x.exp().view(-1), Kept(4, 0, 0), id="a view of the output"),
        pytest.param(lambda x: x[0] * x[1], Kept(0, 4, 0), id="what views keep alive"),
        pytest.param(Mask.apply, Kept(0, 0, 1 / 8), id="mask"),
        pytest.param(lambda x: x + 1, Kept(0, 0, 0), id="nothing"),
    ],
)
def test_saved_bytes_are_those_of_distinct_storages(function, expected):
    assert kept(function, "float32", ()) == expected
    half = kept(function, "float16", ())
    assert (half.output, half.input) == (expected.output / 2, expected.input / 2)


def test_no_activation_saves_more_than_torch():
    for row in saved_bytes(make_cases(op_names(), DTYPES, quick=True), "cpu"):
        assert 0 < row.ours.total <= row.torch.total, row
        assert row.ours.total <= DTYPES[row.dtype].itemsize, row


def test_saved_bytes_stand_in_the_table_and_the_file(report_file):
    report = Report.load(report_file)
    assert [(row.op, row.dtype) for row in report.saved] == [(an_op(), "float32"), (f"precise_{an_op()}", "float32")]
    assert (report.saved[0].ours, report.saved[1].ours) == (Kept(4, 0, 0), Kept(0, 4, 0))
    report.saved = [dataclasses.replace(report.saved[0], ours=Kept(0, 0, 1 / 8), torch=Kept(4, 0, 4 + 8 / 65536))]
    line = [*saved_table(report.saved)][2]
    assert " ".join(line.split()) == f"float32 {an_op()} 0.125 other 8 output 4, other 4"
    report.save(report_file)
    assert Report.load(report_file).saved == report.saved


def test_files_of_before_peers_and_saved_bytes_can_be_read(report_file, capsys):
    data = json.loads(report_file.read_text())
    del data["saved"]
    for row in data["rows"]:
        del row["peers"]
    old = report_file.with_name("old.json")
    old.write_text(json.dumps(data))

    assert "saved for" not in Report.load(old).table()
    assert program.main(["--from", str(old), "--compare", str(report_file)]) == 0
    assert program.main(["--from", str(report_file), "--compare", str(old)]) == 0
    assert "6 of 6 rows" in capsys.readouterr().out


def test_a_worker_has_its_own_variables_and_memory(monkeypatch):
    monkeypatch.setenv("FASTACT_TEST_A", "ours")
    monkeypatch.delenv("FASTACT_TEST_B", raising=False)
    with Worker({"FASTACT_TEST_A": None, "FASTACT_TEST_B": "its"}) as worker:
        assert worker(os.getpid) != os.getpid()
        assert worker(os.getenv, "FASTACT_TEST_A") is None
        assert worker(os.getenv, "FASTACT_TEST_B") == "its"
        assert (os.environ["FASTACT_TEST_A"], os.environ.get("FASTACT_TEST_B")) == ("ours", None)

        now, peak = worker(resident_bytes)
        assert 0 < now <= peak < resident_bytes()[1] + (64 << 20)
        size = peak + (64 << 20)
        worker(len, b"x" * size)
        now, peak = worker(resident_bytes)
        assert now < size < peak, "the peak stays after the memory is given back"
        with Worker() as other:
            assert other(resident_bytes)[1] < size, "and is inherited from no other process"
        with pytest.raises(ZeroDivisionError):
            worker(divmod, 1, 0)


def test_memory_is_measured_under_every_setting(tmp_path, capsys):
    """In processes of their own, at a size whose pages cost nothing."""
    path = tmp_path / "memory.json"
    assert memory.main(["--sizes", "300", "--rounds", "2", "--threads", "1", "--json", str(path)]) == 0

    data = json.loads(path.read_text())
    assert [(row["op"], row["direction"], row["elements"]) for row in data["rows"]] == [(*call, 300) for call in memory.CALLS]
    assert all(list(row["times"]) == [*memory.SETTINGS, memory.COPY] for row in data["rows"])
    assert all(spread["median"] > 0 for row in data["rows"] for spread in row["times"].values())
    assert data["environment"]["command"].startswith("python -m fastact.bench.memory --sizes 300")
    out = capsys.readouterr().out
    assert "relu backward" in out
    assert all(name in out for name in data["rows"][0]["times"])


def test_memory_settings_reach_the_calls_they_are_for(monkeypatch):
    class FakeWorker:
        def __init__(self, changes):
            self.changes = changes

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __call__(self, function, *args):
            if function is memory.sample:
                asked.append((self.changes, args))
                return 1.0
            assert (function, args) == (torch.set_num_threads, (3,))

    asked = []
    monkeypatch.setattr(memory, "Worker", FakeWorker)
    rows = list(memory.measure([64], 2, 3))

    assert all(spread == Spread(1.0, 1.0, 1.0) for row in rows for spread in row.times.values())
    nothing = dict.fromkeys(("THP_MEM_ALLOC_ENABLE", "FASTACT_POOL_LIMIT", "FASTACT_HUGE_PAGES"))
    settings = [
        (nothing, "eager"),
        (nothing | {"THP_MEM_ALLOC_ENABLE": "1"}, "eager"),
        (nothing | {"FASTACT_POOL_LIMIT": "0", "FASTACT_HUGE_PAGES": "0"}, "ours"),
        (nothing | {"FASTACT_POOL_LIMIT": "0"}, "ours"),
        (nothing, "ours"),
        (nothing, "copy_"),
    ]
    assert asked == [(changes, (*call, 64, whose)) for call in memory.CALLS for _ in range(2) for changes, whose in settings]


def test_memory_refuses_wrong_results_and_misuse(monkeypatch, capsys, tmp_path):
    def wrong(*_):
        raise WrongResult("relu forward")

    monkeypatch.setattr(memory, "measure", wrong)
    assert memory.main([]) == 1
    assert "wrong result, so no more is timed: relu forward" in capsys.readouterr().err
    for arguments in (["--sizes", "0"], ["--rounds", "1"], ["--threads", "0"], ["--json", str(tmp_path / "none" / "x.json")]):
        with pytest.raises(SystemExit) as exit:
            memory.main(arguments)
        assert exit.value.code == 2


class FakeGpu:
    """Two clocks: of the host, and of a stream in which work begins when it is launched or when what is before it is done."""

    FLUSH, LAUNCH = 300e-6, 2e-6

    def __init__(self, monkeypatch):
        self.host = self.stream = 0.0
        self.flushes = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.launch(0.0)
                self.at = gpu.stream

            def query(self):
                return self.at <= gpu.host

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        class Buffer:
            def zero_(self):
                gpu.flushes += 1
                gpu.launch(gpu.FLUSH)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch, "empty", lambda *_, device, **__: Buffer())

    def synchronize(self):
        self.host = max(self.host, self.stream)

    def launch(self, seconds):
        self.host += self.LAUNCH
        self.stream = max(self.stream, self.host) + seconds

    def call(self, host, device):
        """A call that keeps the host busy before it launches one kernel."""

        def work():
            self.host += host
            self.launch(device)

        return work


@pytest.mark.parametrize("host", [5e-6, 250e-6, 1.5e-3], ids=lambda seconds: f"{seconds * 1e6:.0f} us")
def test_device_time_is_free_of_the_hosts(monkeypatch, host):
    """However long the host takes to launch a kernel, and after whichever call: only the kernel is timed."""
    gpu = FakeGpu(monkeypatch)
    timer = CudaTimer()
    quick, slow = timer.prepare(gpu.call(1e-6, 3e-6)), timer.prepare(gpu.call(host, 7e-6))
    for _ in range(3):
        assert quick() == pytest.approx(3e-6)
        assert slow() == pytest.approx(7e-6)
    # And no more is written than that takes.
    gpu.flushes = 0
    quick()
    assert gpu.flushes == 1


def test_a_call_that_waits_for_the_device_is_timed_as_it_is(monkeypatch):
    gpu = FakeGpu(monkeypatch)

    def waits():
        gpu.synchronize()
        gpu.call(1e-6, 3e-6)()

    assert CudaTimer().prepare(waits)() >= 4e-6


def test_wall_time_of_a_call_has_one_wait_for_many(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr("fastact.bench.timing.time.perf_counter", lambda: gpu.host)
    take = CallTimer().prepare(gpu.call(8e-6, 1e-6))
    # The launch included; the kernel of the last call alone is waited for.
    assert take() == pytest.approx(10e-6, rel=0.01)


def test_cases_for_a_gpu():
    cases = make_cases(op_names(), ["float32"], device="cuda")
    sizes = {case.elements for case in cases if case.dim is None}
    assert min(sizes) == 1
    assert max(sizes) * 4 == 1 << 30
    softmax_cases = [case for case in cases if case.dim is not None]
    assert len({(case.row.name, case.shape, case.dim) for case in softmax_cases}) == len(softmax_cases)
    rows = [case for case in softmax_cases if case.label.startswith("rows of")]
    assert {case.shape[1] for case in rows} >= {1024, 262144}
    assert {case.elements * 4 for case in rows} == {1 << 28}
    for device in ("cpu", "cuda"):
        quick = make_cases(op_names(), ["float32"], quick=True, device=device)
        assert {case.row.name for case in quick} == set(op_names())


def test_wall_times_stand_in_the_table_and_the_file(report_file):
    """Of a report from a GPU; older files, which have none, can still be read."""
    report = Report.load(report_file)
    assert all(row.call is None for row in report.rows)
    assert "wall time" not in report.table()
    report.environment["device"] = "cuda"
    report.rows = [
        dataclasses.replace(row, call=Spread(4e-6, 3e-6, 5e-6), call_eager=Spread(6e-6, 6e-6, 6e-6)) for row in report.rows
    ]
    report.save(report_file)

    table = Report.load(report_file).table()
    assert "wall time per call" in table
    assert "1.50" in table
    assert max(len(line) for line in table.splitlines()[2:]) <= 110

    data = json.loads(report_file.read_text())
    for row in data["rows"]:
        del row["call"], row["call_eager"], row["call_compiled"]
    report_file.write_text(json.dumps(data))
    assert all(row.call is None for row in Report.load(report_file).rows)


def test_a_gpu_that_is_not_there_is_said_before_measuring(monkeypatch, capsys):
    monkeypatch.setattr(program, "build_info", lambda: {"cuda_missing": "there was no nvcc"})
    for available, said in [(False, "finds no CUDA device"), (True, "built without CUDA: there was no nvcc")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        with pytest.raises(SystemExit) as exit:
            run("--device", "cuda")
        assert exit.value.code == 2
        assert said in capsys.readouterr().err


def test_busy_neighbours_are_reported(monkeypatch, capsys):
    seconds = iter([(0.0, 5.0), (2.0, 8.0)])
    monkeypatch.setattr(Neighbours, "_seconds", lambda self: next(seconds))

    assert run("--ops", an_op(), "--dtypes", "float32") == 0
    assert "other programs kept 1.5 cores busy" in capsys.readouterr().out


def test_spent_compile_time_is_explained():
    compiler = Compiler("cpu", seconds=0)
    assert compiler(None) is None
    assert "used up" in compiler.notes()[0]


@pytest.mark.parametrize(
    "arguments",
    [["--ops", "no_such_op"], ["--json", "/no/such/folder/x.json"], ["--compare", "/no/such.json"]],
)
def test_misuse_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        program.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for option in ("quick", "device", "dtypes", "json", "plot", "compare", "from", "threads", "peers"):
        assert f"--{option}" in text
    assert all(op in text for op in op_names())


def test_what_a_monitor_costs(capsys, tmp_path):
    before = torch.get_num_threads()
    try:
        small = ["--small", "--rounds", "2", "--processes", "2", "--threads", "1"]
        assert sight.main([*small, "--json", str(tmp_path / "sight.json")]) == 0
    finally:
        torch.set_num_threads(before)
    rows = json.loads((tmp_path / "sight.json").read_text())["rows"]
    assert len(rows) == len(capsys.readouterr().out.split("\n\n")[0].splitlines()) - 2
    for row in rows:
        assert {len(times) for times in row["seconds"].values()} == {2 if row["what"].startswith("training") else 4}


def test_parameters_and_maxout_beside_torch(capsys, tmp_path):
    path = tmp_path / "channels.json"
    assert channels.main(["--small", "--seconds", "0", "--dtypes", "float32", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()[2:]
    rows = json.loads(path.read_text())["rows"]
    assert [row["op"] for row in rows] == [line.split(" | ")[0].strip("| ") for line in lines]
    assert {(row["op"], row["direction"]) for row in rows} == {
        (op, direction) for op in ("prelu", "channel_scaled_sigmoid", "maxout of 2") for direction in ("forward", "both")
    }
    assert all(0 < row[side]["median"] < 1 for row in rows for side in ("ours", "torch"))
