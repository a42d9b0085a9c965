"""The benchmark itself: its references are right, its own methods agree with them, and its rows and tables hold up."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.utils import vector_to_parameters

from benchmarks import compare, tables
from benchmarks.goals import Goal
from benchmarks.plots import COLOR, TIME, against_steps
from benchmarks.reference import flat, reference
from benchmarks.rivals import METHODS, Method
from benchmarks.summary import Figure, read
from benchmarks.workloads import WORKLOADS
from imaml.cli._figures import LIGHT

TINY = WORKLOADS["tiny"]
NEEDS_NOTHING = [n for n, m in METHODS.items() if m.where.partition(":")[0] in ("ours", "create_graph", "torch_func")]


def relative_error(found, exact):
    return ((found - exact).norm() / exact.norm()).item()


def adapted(problem, task, damping):
    """The parameters after the inner loop, as one vector, by the loss's gradient alone."""
    start = flat(list(problem.parameters.values()))
    phi = start
    for _ in range(problem.steps):
        leaf = phi.detach().requires_grad_()
        gradient = torch.autograd.grad(loss(problem, leaf, task.support), leaf)[0]
        phi = phi - problem.lr * (gradient + damping * (phi - start))
    return phi


def loss(problem, vector, batch):
    shapes = problem.parameters
    parts = vector.split([p.numel() for p in shapes.values()])
    return problem.loss_at({n: part.view_as(p) for part, (n, p) in zip(parts, shapes.items(), strict=True)}, batch)


@pytest.mark.parametrize("name", NEEDS_NOTHING)
def test_methods_that_need_no_install_are_right(name):
    problem = TINY.problem(3, torch.float64)
    found = flat(METHODS[name].prepare(problem)())
    assert relative_error(found, reference(problem, METHODS[name].family)) < 1e-12


def test_the_exact_reference_agrees_with_central_differences():
    problem = TINY.problem(3, torch.float64)
    parameters = list(problem.model.parameters())
    theta = flat(parameters)
    exact = reference(problem, "exact")

    def query_loss(at):
        vector_to_parameters(at, parameters)
        return sum(loss(problem, adapted(problem, task, 0.0), task.query).item() for task in problem.tasks)

    directions = 1e-5 * torch.eye(len(theta), dtype=torch.float64)
    slopes = [(query_loss(theta + e) - query_loss(theta - e)) / 2e-5 for e in directions]
    assert relative_error(torch.tensor(slopes, dtype=torch.float64) / len(problem.tasks), exact) < 1e-8


def test_the_implicit_reference_agrees_with_a_dense_solve():
    size = len(flat(list(TINY.problem(3).model.parameters())))
    problem = replace(TINY, solver_steps=size).problem(3, torch.float64)
    total = torch.zeros(size, dtype=torch.float64)
    for task in problem.tasks:
        phi = adapted(problem, task, problem.regularization).detach().requires_grad_()
        v = torch.autograd.grad(loss(problem, phi, task.query), phi)[0]
        hessian = torch.autograd.functional.hessian(lambda x, task=task: loss(problem, x, task.support), phi)
        total += torch.linalg.solve(torch.eye(size).to(v) + hessian / problem.regularization, v)
    assert relative_error(reference(problem, "implicit"), total / len(problem.tasks)) < 1e-8


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the program on the tiny workload; returns the rows it wrote."""

    def run(*arguments):
        given = ["compare", "--no-install", "--out", str(tmp_path), "--workloads", "tiny", "--steps", "1", *arguments]
        monkeypatch.setattr(sys, "argv", given)
        compare.main()
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    return run


def test_every_measurement_becomes_a_line_of_json(run, tmp_path):
    rows = run("--methods", "imaml MAML", "--rounds", "1", "--repeats", "1", "--threads", "1")
    assert [row["pass"] for row in rows] == ["check", "memory", "count", "time", "first"]
    check, memory, count, time, first = rows
    assert check["error"] < 1e-12 and memory["bytes"] > 100 and time["seconds"] > 0
    assert first["first"] > 0
    assert count["flops"] > count["unit_flops"] > 0 and count["operations"] > 100
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    assert "| imaml MAML |" in (tmp_path / "README.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "imaml MAML" in page and page.count("data:image/png;base64,") == 4  # two figures, light and dark
    plots = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert plots.keys() == {f"tiny-k-1-{name}-against-time.png" for name in ("memory", "error-in-float64")}
    assert all(content.startswith(b"\x89PNG") for content in plots.values())
    assert read(tmp_path / "results.jsonl")[0].verdict == "right"


def test_a_method_that_is_not_there_is_skipped_with_the_reason(run, monkeypatch, tmp_path):
    monkeypatch.setattr(compare.environment, "search_path", lambda: [])
    rows = run("--methods", "learn2learn", "--passes", "check")
    assert rows[0]["reason"] == "ModuleNotFoundError: No module named 'learn2learn'"
    assert "No module named 'learn2learn'" in (tmp_path / "README.md").read_text()


def test_a_wrong_gradient_is_called_wrong_and_an_approximation_is_not(monkeypatch):
    monkeypatch.setitem(METHODS, "rough", Method(where="nowhere:nothing", approximate=True))
    figures = [Figure(workload="tiny", steps=1, method=m, error=e) for m, e in (("higher", 1e-3), ("rough", 1e-3))]
    assert [figure.verdict for figure in figures] == ["wrong", "approximate"]
    assert replace(figures[0], error=1e-12).verdict == "right"


def test_rows_are_pooled_over_the_processes(tmp_path):
    rows = [{"seconds": s, "spread": 0.1, "unit_seconds": 0.5, "pass": "time", "load": s} for s in (1.0, 3.0, 2.0)]
    rows.append({"pass": "count", "flops": 12, "unit_flops": 4, "operations": 9})
    key = {"workload": "tiny", "steps": 1, "method": "higher"}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(key | row) + "\n" for row in rows))
    (figure,) = read(file)
    assert (figure.seconds, figure.spread, figure.equivalents, figure.verdict) == (2.0, 2.0, 4.0, "unchecked")
    assert (figure.load, figure.arithmetic, figure.operations) == (3.0, 3.0, 9)


def test_goals_are_ratios_within_a_run_or_limits():
    figures = [
        Figure(workload="tiny", steps=1, method=m, seconds=s, bytes=8) for m, s in (("ours", 1.0), ("other", 4.0))
    ]
    goal = Goal(workload="tiny", steps=1, quantity="seconds", ours="ours", theirs="other", factor=1 / 5)
    assert goal.reached(figures) == 1 / 4
    assert replace(goal, theirs="absent").reached(figures) is None
    assert replace(goal, theirs=None, quantity="bytes").reached(figures) == 8


def test_a_goal_may_be_a_sum_of_products_and_parameters():
    sizes = {"product_bytes": 100, "gradient_bytes": 40, "theta_bytes": 10}
    figures = [Figure(workload="tiny", steps=3, method="ours", bytes=260, **sizes)]
    goal = Goal(workload="tiny", steps=3, quantity="bytes", ours="ours", theirs="one HVP's + K thetas", factor=1)
    assert goal.reached(figures) == 260 / 130
    assert replace(goal, theirs="1.1 x one HVP's + 6 thetas").reached(figures) == pytest.approx(260 / 170)
    assert replace(goal, theirs="one gradient's").reached(figures) == 260 / 40
    assert goal.reached([replace(figures[0], theta_bytes=None)]) is None


def test_every_run_is_remembered(tmp_path):
    for command in ("first", "second"):
        compare.remember(tmp_path / "environment.json", {"command": command})
    assert [run["command"] for run in json.loads((tmp_path / "environment.json").read_text())] == ["first", "second"]


def test_the_goals_table_says_what_was_not_reached(monkeypatch):
    goal = Goal(workload="tiny", steps=1, quantity="seconds", ours="ours", theirs="other", factor=1 / 5)
    monkeypatch.setattr(tables, "GOALS", (goal, replace(goal, factor=1 / 2), replace(goal, theirs="absent")))
    figures = [Figure(workload="tiny", steps=1, method=m, seconds=s) for m, s in (("ours", 1.0), ("other", 4.0))]
    assert [row[1:] for row in tables.goal_rows(figures)] == [
        ["1/5.00", "1/4.00", "**no**"],
        ["1/2.00", "1/4.00", "yes"],
    ]


def test_a_plot_has_a_line_for_every_method():
    names = ("imaml MAML", "imaml FOMAML", "higher")
    figures = [Figure(workload="tiny", steps=k, method=m, seconds=0.1 * k, bytes=k) for k in (1, 3) for m in names]
    (axes,) = against_steps(figures, *TIME, LIGHT).axes
    assert [list(line.get_ydata()) for line in axes.lines] == [pytest.approx([100, 300])] * 3
    assert len({line.get_color() for line in axes.lines}) == 3
    assert len(set(COLOR.values())) == len(METHODS)
