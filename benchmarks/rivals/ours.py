"""This library's strategies."""

from __future__ import annotations

from benchmarks.rivals import Call
from benchmarks.workloads import Problem
from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective


def _inner(problem: Problem) -> GradientDescent:
    return GradientDescent(lr=problem.lr, steps=problem.steps)


def _call(engine: MetaGradient, problem: Problem) -> Call:
    objective = Objective(problem.model, problem.criterion)
    return lambda: list(engine.value_and_grad(objective, problem.tasks)[1].values())


def maml(problem: Problem) -> Call:
    return _call(MAML(inner=_inner(problem)), problem)


def maml_compiled(problem: Problem) -> Call:
    return _call(MAML(inner=_inner(problem), compile=True), problem)


def maml_task_by_task(problem: Problem) -> Call:
    return _call(MAML(inner=_inner(problem), chunk_size=1), problem)


def maml_with_graphs(problem: Problem) -> Call:
    return _call(MAML(inner=_inner(problem), linearize=True), problem)


def maml_checkpointed(problem: Problem) -> Call:
    return _call(MAML(inner=_inner(problem), checkpoints=4), problem)


def fomaml(problem: Problem) -> Call:
    return _call(FOMAML(inner=_inner(problem)), problem)


def implicit(problem: Problem, **options: bool) -> Call:
    """The steps are the budget, so that every implicit method does the same work, and no error bound is computed."""
    solver = CG(max_steps=problem.solver_steps, rtol=0.0)
    engine = ImplicitMAML(
        inner=_inner(problem),
        regularization=problem.regularization,
        solver=solver,
        on_failure="ignore",
        error_bound=False,
        **options,
    )
    return _call(engine, problem)


def implicit_rebuilt(problem: Problem) -> Call:
    return implicit(problem, linearize=False)


def implicit_compiled(problem: Problem) -> Call:
    return implicit(problem, compile=True)
