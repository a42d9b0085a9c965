"""Linear solves that fail are told: by status always, and by a warning or an error as asked."""

import dataclasses
import warnings

import pytest
import torch

from imaml import CG, GradientDescent, ImplicitMAML, Objective, SolverError, SolverWarning, Status, TaskBatch

INNER = GradientDescent(lr=0.01, steps=2)


def saddle(params, batch):
    """Curvature `batch` in the first direction, 1 in the second."""
    w = params["w"]
    return (batch * w[0] ** 2 + w[1] ** 2) / 2 + w.sum()


def saddles(*curvatures):
    values = torch.tensor(curvatures, dtype=torch.float64)
    w = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    return Objective.from_function(saddle, {"w": w}), TaskBatch(support=values, query=values)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_negative_curvature_is_a_breakdown_of_that_task_alone(chunk_size):
    objective, tasks = saddles(1.0, -5.0, 2.0)
    engine = ImplicitMAML(inner=INNER, regularization=0.5, on_failure="ignore", chunk_size=chunk_size)
    report = engine(objective, tasks).report
    assert report.solver_status.tolist() == [Status.CONVERGED, Status.BREAKDOWN, Status.CONVERGED]
    assert "2 CONVERGED, 1 BREAKDOWN" in str(report)
    _, gradient = engine.value_and_grad(objective, tasks)
    assert gradient["w"].isfinite().all()


def test_enough_regularization_cures_it():
    objective, tasks = saddles(-5.0, 1.0)
    for regularization, status in ((4.9, Status.BREAKDOWN), (5.1, Status.CONVERGED)):
        engine = ImplicitMAML(inner=INNER, regularization=regularization, on_failure="ignore")
        assert engine(objective, tasks).report.solver_status[0] == status


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_raise_names_the_task_and_the_remedy(chunk_size):
    objective, tasks = saddles(1.0, 1.0, 1.0, -5.0)
    engine = ImplicitMAML(inner=INNER, regularization=0.5, on_failure="raise", chunk_size=chunk_size)
    with pytest.raises(SolverError, match="task 3.*BREAKDOWN.*larger `regularization`"):
        engine(objective, tasks)


def test_warn_says_it_once_per_engine():
    objective, tasks = saddles(-5.0, 1.0, -5.0)
    engine = ImplicitMAML(inner=INNER, regularization=0.5)
    with pytest.warns(SolverWarning, match="2 of 3.*task 0.*BREAKDOWN.*larger `regularization`") as caught:
        engine(objective, tasks)
    assert caught[0].filename == __file__
    engine(objective, tasks)  # warnings are errors here
    engine.value_and_grad(objective, tasks)
    with pytest.warns(SolverWarning):
        dataclasses.replace(engine, regularization=0.6)(objective, tasks)


def test_the_warning_counts_the_tasks_of_the_call_not_of_a_chunk():
    objective, tasks = saddles(1.0, -5.0, -5.0)
    with pytest.warns(SolverWarning, match="2 of 3.*task 1"):
        ImplicitMAML(inner=INNER, regularization=0.5, chunk_size=1)(objective, tasks)


def test_the_warning_points_at_the_call_of_value_and_grad_too():
    objective, tasks = saddles(-5.0)
    with pytest.warns(SolverWarning) as caught:
        ImplicitMAML(inner=INNER, regularization=0.5).value_and_grad(objective, tasks)
    assert caught[0].filename == __file__


def test_ignore_is_silent():
    objective, tasks = saddles(-5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImplicitMAML(inner=INNER, regularization=0.5, on_failure="ignore")(objective, tasks)


def test_a_spent_budget_is_no_failure_but_a_missed_tolerance_is():
    objective, tasks = saddles(3.0)
    ImplicitMAML(inner=INNER, solver=CG(max_steps=1, rtol=0.0), on_failure="raise")(objective, tasks)
    with pytest.raises(SolverError, match="MAX_STEPS"):
        ImplicitMAML(inner=INNER, solver=CG(max_steps=1, rtol=1e-12), on_failure="raise")(objective, tasks)
