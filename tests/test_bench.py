"""The benchmark refuses wrong results, and its files and exit codes can be relied on."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from fastact._registry import elementwise, softmax
from fastact.bench import __main__ as program
from fastact.bench import cases as cases_module
from fastact.bench.cases import DTYPES, TENSORS_MOVED, Case, make_cases, op_names
from fastact.bench.check import WrongResult
from fastact.bench.compiling import Compiler
from fastact.bench.environment import Neighbours, environment
from fastact.bench.measure import measure
from fastact.bench.report import Report
from fastact.bench.timing import Timer


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
def test_softmax_is_measured_along_any_dim(shape, dim):
    rows = list(measure([Case(softmax, "float32", "any", shape, dim)], "cpu", 0.0))

    assert [(tuple(row.shape), row.dim) for row in rows] == [(shape, dim)] * 3


def test_traffic_and_ratios_follow_from_the_times():
    case = Case(elementwise[an_op()], "float64", "300", (300,))
    for row in measure([case], "cpu", 0.0):
        moved = TENSORS_MOVED[row.direction] * 300 * 8
        assert row.gigabytes_per_second == pytest.approx(moved / row.ours.median / 1e9)
        assert row.ratio_eager == pytest.approx(row.eager.median / row.ours.median)


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


def test_wrong_backward_is_refused(any_row):
    wrong = spoiled(any_row, backward_op=lambda *args: any_row.backward_op(*args) * 1.01)
    shape, dim = ((300,), None) if any_row is not softmax else ((30, 10), -1)

    with pytest.raises(WrongResult, match=f"{any_row.name} backward, float32"):
        list(measure([Case(wrong, "float32", "wrong", shape, dim)], "cpu", 0.0))


def test_report_survives_the_file(tmp_path):
    rows = list(measure(make_cases([an_op(), softmax.name], ["float32"], quick=True), "cpu", 0.0))
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
    for option in ("quick", "device", "dtypes", "json", "plot", "compare", "from", "threads"):
        assert f"--{option}" in text
    assert all(op in text for op in op_names())
