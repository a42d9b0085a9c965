"""The report's counts are those of real evaluations; recomputation is the least possible."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from imaml import CG, FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Neumann, Objective, TaskBatch

TASKS = 3


class Counted:
    """A smooth loss that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, params, batch):
        self.calls += 1
        return ((params["w"] - batch) ** 2).sum() + (params["w"] ** 4).sum() / 4


def run(engine, chunk_size=1):
    """The report, and how often the loss was called."""
    loss = Counted()
    batch = torch.randn(TASKS, 3, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)
    report = engine(Objective.from_function(loss, {"w": w}), TaskBatch(support=batch, query=batch)).report
    return report, loss.calls


def inner(steps):
    return GradientDescent(lr=0.02, steps=steps)


@cache
def fewest_advances(steps, slots):
    """Griewank & Walther's optimum by its recurrence: steps run forward to reverse `steps` of them where `slots`
    states fit in memory, the start among them.
    """
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest_advances(steps - m, slots - 1) + fewest_advances(m, slots) for m in range(1, steps))


COMPARED = 3
"""Evaluations by which an engine's first call sees whether forward mode loses tangents: a gradient, two products."""


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_fomaml(steps):
    report, calls = run(FOMAML(inner=inner(steps), chunk_size=1))
    assert calls == report.gradients == TASKS * (steps + 1)
    assert report.hvps == 0 and report.hvp_mode is None


@pytest.mark.parametrize("hvp", ["auto", "reverse-over-reverse", "forward-over-reverse", "finite-difference"])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_maml(steps, hvp):
    report, calls = run(MAML(inner=inner(steps), hvp=hvp, chunk_size=1))
    assert report.gradients == TASKS * (steps + 1) and report.hvps == TASKS * steps
    inexact = hvp == "finite-difference"
    estimate = 3 if inexact and steps else 0  # the first product of a call, with another step; a look at the dtypes
    if hvp == "forward-over-reverse" and steps:
        estimate = COMPARED
    assert calls == report.gradients + (2 if inexact else 1) * report.hvps + estimate
    used = "reverse-over-reverse" if hvp == "auto" else hvp
    assert report.hvp_mode == (used if steps else None)


@pytest.mark.parametrize("checkpoints", [0, 1, 2, 3, 5, 11, 100])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
def test_recomputation_is_the_least_possible(steps, checkpoints):
    report, calls = run(MAML(inner=inner(steps), checkpoints=checkpoints, chunk_size=1))
    least = fewest_advances(steps, checkpoints + 1) + 1  # one more step leads to the query loss
    assert report.gradients == TASKS * (least + 1)
    assert report.hvps == TASKS * steps
    assert calls == report.gradients + report.hvps
    if checkpoints >= steps - 1:
        assert report.gradients == TASKS * (steps + 1)


@pytest.mark.parametrize("checkpoints", [None, 0, 1])
@pytest.mark.parametrize("graphs", [0, 1, 3, 5, 9])
def test_a_graph_that_is_kept_saves_an_evaluation(graphs, checkpoints):
    steps = 5
    engine = MAML(inner=inner(steps), linearize=graphs, checkpoints=checkpoints, chunk_size=1)
    report, calls = run(engine)
    kept, others = min(graphs, steps), max(steps - graphs, 0)
    slots = others if checkpoints is None else checkpoints + 1
    taken = fewest_advances(others, slots) + (others > 0) + kept
    assert report.gradients == TASKS * (taken + 1) and report.hvps == TASKS * steps
    assert calls == report.gradients + TASKS * others


@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("budget", [1, 3])
def test_implicit_reverse_over_reverse(budget, linearize):
    solver = CG(max_steps=budget, rtol=0.0)
    engine = ImplicitMAML(inner=inner(4), solver=solver, linearize=linearize, error_bound=False, chunk_size=1)
    report, calls = run(engine)
    assert report.hvps == TASKS * budget
    assert report.gradients == TASKS * (4 + 1 + 1)  # inner loop, query, stationarity
    assert calls == report.gradients + (0 if linearize else report.hvps)


@pytest.mark.parametrize("hvp", ["forward-over-reverse", "finite-difference"])
def test_implicit_in_other_modes(hvp):
    solver = CG(max_steps=3, rtol=0.0)
    engine = ImplicitMAML(inner=inner(4), solver=solver, hvp=hvp, linearize=False, error_bound=False, chunk_size=1)
    report, calls = run(engine)
    assert report.hvps == TASKS * 3 and report.gradients == TASKS * 6
    inexact = hvp == "finite-difference"
    assert calls == report.gradients + (2 * report.hvps + 3 if inexact else report.hvps + COMPARED)


@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse", "finite-difference"])
@pytest.mark.parametrize(
    ("solver", "lanczos"), [(CG(max_steps=2), 0), (Dense(), 0), (Neumann(max_steps=2, step_size=0.1), 3)]
)
def test_the_error_bound_of_an_implicit_gradient(solver, lanczos, hvp, linearize):
    """The query's gradient, the inner one and a product over there; and Lanczos steps where the solver has none."""
    engine = ImplicitMAML(inner=inner(4), solver=solver, hvp=hvp, linearize=linearize, chunk_size=1)
    (without, fewer), (report, calls) = run(replace(engine, error_bound=False)), run(engine)
    assert report.gradients == without.gradients + 2 * TASKS
    assert report.hvps == without.hvps + (1 + lanczos) * TASKS
    per_product = {"auto": 0 if linearize else 1, "forward-over-reverse": 1, "finite-difference": 2}[hvp]
    assert calls == fewer + (2 + per_product * (1 + lanczos)) * TASKS


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("engine", [MAML, FOMAML, partial(ImplicitMAML, solver=CG(max_steps=2, rtol=0.0))])
def test_a_vectorised_call_counts_its_tasks(engine, chunk_size):
    one, _ = run(engine(inner=inner(3), chunk_size=1))
    many, calls = run(engine(inner=inner(3), chunk_size=chunk_size))
    assert (one.gradients, one.hvps) == (many.gradients, many.hvps)
    looks = 0 if chunk_size else 2  # at one task's support and query loss, to see how many tasks fit
    assert calls <= (many.gradients + many.hvps) * (2 if chunk_size else 1) / TASKS + looks


def test_evaluating_alone():
    with torch.no_grad():
        report, calls = run(MAML(inner=inner(4), chunk_size=1))
    assert report.gradients == TASKS * 4 and report.hvps == 0
    assert calls == TASKS * 5
