"""The new solvers inside an implicit meta-gradient, whose system is I + H / lambda."""

import pytest

from imaml import CG, MINRES, GradientDescent, ImplicitMAML, Jacobi, Nystrom, NystromInverse, SolverError, Status
from tests.engine.cases import mlp, oracle_setting, problem
from tests.oracles import implicit, relative_error

INNER = GradientDescent(lr=0.3, steps=60)
TIGHT = {"max_steps": 500, "rtol": 1e-12}


@pytest.mark.parametrize(
    "solver",
    [
        MINRES(**TIGHT),
        MINRES(**TIGHT, preconditioner=Nystrom(rank=5)),
        CG(**TIGHT, preconditioner=Nystrom(rank=5, shift=1.0)),
        CG(**TIGHT, preconditioner=Jacobi()),
        NystromInverse(rank=10**6, rtol=1e-8),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_it_equals_the_dense_solution_within_its_bound(solver):
    model, objective, tasks = problem(mlp)
    engine = ImplicitMAML(inner=INNER, regularization=2.0, solver=solver)
    _, expected = implicit(oracle_setting(engine, model, objective, tasks))
    result = engine(objective, tasks)
    assert (result.report.solver_status == Status.CONVERGED).all()
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-7
    assert (result.report.error_bound >= 0).all() and result.report.error_bound.isfinite().all()


def test_the_report_counts_the_products_that_build_a_preconditioner():
    _, objective, tasks = problem(mlp)
    make = {"inner": INNER, "error_bound": False}
    spent = [
        ImplicitMAML(solver=CG(max_steps=3, rtol=0.0, preconditioner=preconditioner), **make)(
            objective, tasks
        ).report.hvps
        for preconditioner in (None, Nystrom(rank=4), Jacobi(probes=6))
    ]
    assert spent[1] - spent[0] == 4 * len(tasks) and spent[2] - spent[0] == 6 * len(tasks)


def test_a_breakdown_names_the_remedies():
    _, objective, tasks = problem(mlp)
    engine = ImplicitMAML(
        inner=GradientDescent(lr=0.01, steps=1), regularization=1e-4, solver=CG(rtol=1e-8), on_failure="raise"
    )
    with pytest.raises(SolverError, match=r"(?s)larger lambda.*ggn.*MINRES"):
        engine(objective, tasks)
