"""ImplicitMAML with a damped linear system, against dense solutions."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from imaml import (
    CG,
    MINRES,
    Dense,
    GradientDescent,
    ImplicitMAML,
    Jacobi,
    Neumann,
    Nystrom,
    Objective,
    ScipySolver,
    Status,
    TaskBatch,
)
from imaml._engine.fingerprint import fingerprint
from imaml._engine.run import Run
from tests.engine.cases import mlp, oracle_setting, problem
from tests.engine.test_gauss_newton import gauss_newton
from tests.oracles import implicit, relative_error

F64 = torch.float64
SHORT = GradientDescent(lr=0.2, steps=3)
TIGHT = CG(max_steps=500, rtol=1e-12)
SOLVERS = {
    "CG": TIGHT,
    "Jacobi": CG(max_steps=500, rtol=1e-12, preconditioner=Jacobi(probes=20)),
    "Nystrom": CG(max_steps=500, rtol=1e-12, preconditioner=Nystrom(rank=10)),
    "MINRES": MINRES(max_steps=500, rtol=1e-12),
    "Neumann": Neumann(max_steps=300, rtol=1e-12),
    "Dense": Dense(),
    "GMRES": ScipySolver(method="gmres", rtol=1e-12),
}
OPTIONS = {
    "rebuilt": {"linearize": False},
    "one by one": {"chunk_size": 1},
    "forward over reverse": {"hvp": "forward-over-reverse"},
    "microbatches": {"microbatch_size": 2},
    "warm start": {"warm_start": True},
    "per parameter": {"regularization": {"0.weight": 0.7, "0.bias": 1.4, "2.weight": 2.1, "2.bias": 2.8}},
    "no bound": {"error_bound": False},
}


def engine(**settings):
    return ImplicitMAML(**{"inner": SHORT, "regularization": 0.5, "solver": TIGHT, "damping": 3.0} | settings)


def sharp(tasks=2):
    """An MLP with large weights, at which the Hessian is indefinite."""
    model, objective, batch = problem(mlp, tasks=tasks)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return model, objective, batch


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_solver_equals_the_dense_solution(solver):
    model, objective, tasks = problem(mlp)
    expected = implicit(oracle_setting(engine(), model, objective, tasks))[1]
    assert relative_error(engine(solver=solver).value_and_grad(objective, tasks)[1], expected) <= 1e-10
    plain = implicit(oracle_setting(engine(damping=0.0), model, objective, tasks))[1]
    assert relative_error(plain, expected) > 0.1


@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_equals_the_dense_solution(options, adapt):
    """Parameters that do not adapt get the derivative that the damped solution implies."""
    model, objective, tasks = problem(mlp, adapt=adapt)
    if adapt and "regularization" in options:
        options = {"regularization": {n: w for n, w in options["regularization"].items() if n.startswith("2")}}
    damped = engine(**options)
    expected = implicit(oracle_setting(damped, model, objective, tasks))[1]
    for _ in range(2):  # the second call of a warm start begins at the solution
        assert relative_error(damped.value_and_grad(objective, tasks)[1], expected) <= 1e-10


def test_the_gauss_newton_matrix_is_damped():
    model, objective, tasks = problem(mlp)
    expected = implicit(oracle_setting(engine(), model, objective, tasks), gauss_newton(model, F.cross_entropy))[1]
    assert relative_error(engine(curvature="ggn").value_and_grad(objective, tasks)[1], expected) <= 1e-9


def test_finite_differences_and_a_solver_in_another_dtype():
    model, objective, tasks = problem(mlp)
    expected = implicit(oracle_setting(engine(), model, objective, tasks))[1]
    inexact = engine(hvp="finite-difference", solver=CG(max_steps=50, rtol=1e-7))
    assert relative_error(inexact.value_and_grad(objective, tasks)[1], expected) <= 1e-6
    model.float()
    single = TaskBatch(**{n: (getattr(tasks, n)[0].float(), getattr(tasks, n)[1]) for n in ("support", "query")})
    for damping in (3.0, "auto"):
        wide = engine(damping=damping, solver_dtype=F64, solver=CG(max_steps=200, rtol=1e-6))
        got = wide.value_and_grad(Objective(model, F.cross_entropy), single)[1]
        assert all(g.dtype == torch.float32 for g in got.values())
        if damping == 3.0:
            assert relative_error({n: g.double() for n, g in got.items()}, expected) <= 1e-4


def test_it_is_as_a_larger_lambda_for_a_shorter_gradient_and_so_is_what_lambda_itself_gets():
    """(A + delta I)^-1 v is 1 / (1 + delta) of the solution for (1 + delta) lambda in the same phi."""
    torch.manual_seed(0)
    h = torch.diag(torch.tensor([1.0, 3.0, 0.2], dtype=F64))
    theta, delta, lam = torch.randn(3, dtype=F64), 1.5, 0.7
    centres = torch.randn(2, 1, 3, dtype=F64)
    eta = torch.tensor(lam, dtype=F64).log().requires_grad_()

    def loss(params, batch):
        d = params["w"] - batch
        return d @ h @ d / 2

    objective = Objective.from_function(loss, {"w": theta.clone().requires_grad_()}, meta={"eta": eta})
    inner = GradientDescent(lr=0.3, steps=400)
    damped = engine(inner=inner, regularization=lambda meta: meta["eta"].exp(), damping=delta)
    gradient = damped.value_and_grad(objective, TaskBatch(support=centres[0], query=centres[1]))[1]
    phi = torch.linalg.solve(h + lam * torch.eye(3, dtype=F64), h @ centres[0, 0] + lam * theta)
    pulled = torch.linalg.solve(h + (1 + delta) * lam * torch.eye(3, dtype=F64), h @ (phi - centres[1, 0]))
    assert torch.allclose(gradient["w"], lam * pulled, rtol=1e-10)
    assert torch.allclose(gradient["eta"], -lam * (phi - theta) @ pulled, rtol=1e-10)


def test_without_a_proximal_term_the_hessian_itself_is_damped():
    """L = 1/2 |phi - eta|^2 / 4 has H = 1/4, and the mixed derivative by eta is -1/4."""
    eta = torch.ones(2, dtype=F64, requires_grad=True)
    w = torch.zeros(2, dtype=F64, requires_grad=True)

    def inner(params, batch, meta):
        return ((params["w"] - meta["eta"] * batch) ** 2).sum() / 8

    def outer(params, batch, meta):
        return (params["w"] * batch).sum()

    objective = Objective.from_function(inner, {"w": w}, meta={"eta": eta}, outer_loss=outer)
    tasks = TaskBatch(support=torch.ones(1, 2, dtype=F64), query=torch.tensor([[1.0, 2.0]], dtype=F64))
    bilevel = engine(inner=GradientDescent(lr=1.0, steps=200), regularization=None, damping=0.5)
    gradient = bilevel.value_and_grad(objective, tasks)[1]
    assert torch.allclose(gradient["eta"], torch.tensor([1.0, 2.0], dtype=F64) / 3, rtol=1e-10)


def test_no_damping_is_what_it_was_bit_for_bit_and_reports_none():
    _, objective, tasks = problem(mlp)
    plain = ImplicitMAML(inner=SHORT, regularization=10.0, solver=TIGHT)
    report = engine(regularization=10.0, damping=0)(objective, tasks).report
    assert report.damping is None and report.undamped_residual is None and "damping" not in str(report)
    assert report.hvps == plain(objective, tasks).report.hvps
    got, expected = (e.value_and_grad(objective, tasks)[1] for e in (engine(regularization=10.0, damping=0.0), plain))
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_the_report_has_the_damping_and_the_residual_that_it_leaves():
    """|v - A u| is delta |u| for an exact solve."""
    model, objective, tasks = problem(mlp, tasks=1)
    result = engine(regularization=10.0)(objective, tasks)
    u = torch.cat([g.flatten() for g in engine(regularization=10.0).value_and_grad(objective, tasks)[1].values()])
    s = oracle_setting(engine(regularization=10.0), model, objective, tasks)
    adapted = engine(regularization=10.0).adapt(objective, tuple(t[0] for t in tasks.support))
    leaves = {n: adapted[n].clone().requires_grad_() for n in s.adapted}
    v = torch.autograd.grad(s.loss(leaves, s.tasks[0][1]), list(leaves.values()))
    size = torch.cat([g.flatten() for g in v]).norm()
    assert result.report.damping.tolist() == [3.0]
    assert result.report.undamped_residual.item() == pytest.approx((3 * u.norm() / size).item(), rel=1e-9)
    assert result.report.solver_residual.item() <= 1e-11
    assert "damping 3, without it relative residual" in str(result.report)
    plain = engine(regularization=10.0, damping=0.0)(objective, tasks).report
    assert result.report.hvps - result.report.solver_steps == plain.hvps - plain.solver_steps + 1


def test_without_the_error_bound_no_product_is_spent_on_the_bias():
    _, objective, tasks = problem(mlp, tasks=1)
    cheap = engine(regularization=10.0, error_bound=False)
    report, plain = (replace(cheap, damping=d)(objective, tasks).report for d in (3.0, 0.0))
    assert report.undamped_residual is None and str(report).count("damping 3\n") == 1
    assert report.hvps - report.solver_steps == plain.hvps - plain.solver_steps


def test_the_error_bound_has_the_bias_in_it():
    """Small damping at a stationary point: all of the error is bias."""
    model, objective, tasks = problem(mlp, tasks=1)
    long = GradientDescent(lr=0.3, steps=60)
    for delta in (1e-4, 1e-2):
        damped = engine(inner=long, regularization=2.0, damping=delta)
        bound = damped(objective, tasks).report.error_bound.item()
        exact = implicit(oracle_setting(replace(damped, damping=0.0), model, objective, tasks))[1]
        error = relative_error(damped.value_and_grad(objective, tasks)[1], exact)
        assert delta / 100 < error <= bound < 1


def test_cg_fails_on_an_indefinite_system_and_converges_with_damping():
    model, objective, tasks = sharp()
    settings = {"regularization": 0.02, "inner": GradientDescent(lr=0.01, steps=1), "on_failure": "ignore"}
    plain = engine(**settings, damping=0.0)(objective, tasks).report
    assert (plain.solver_status == Status.BREAKDOWN).all()
    damped = engine(**settings, damping=200.0)
    report = damped(objective, tasks).report
    assert (report.solver_status == Status.CONVERGED).all() and report.error_bound.isinf().all()
    expected = implicit(oracle_setting(damped, model, objective, tasks))[1]
    assert relative_error(damped.value_and_grad(objective, tasks)[1], expected) <= 1e-10


def quadratic(lowest):
    """A task per entry of `lowest`, the smallest eigenvalue of H, whose others are 1 and 2."""
    values = torch.tensor([[a, 1.0, 2.0] for a in lowest], dtype=F64)
    w = torch.ones(3, dtype=F64, requires_grad=True)

    def loss(params, batch):
        return (batch * params["w"] ** 2).sum() / 2

    objective = Objective.from_function(loss, {"w": w})
    return objective, TaskBatch(support=values, query=torch.ones_like(values))


@pytest.mark.parametrize("solver", [*SOLVERS.values(), CG(max_steps=3)], ids=[*SOLVERS, "budget"])
def test_auto_raises_until_the_system_is_definite_task_by_task(solver):
    """For lambda = 1 the smallest eigenvalue of A is 1.5, -2 and -9: delta 0, 6.4 (over 1.6) and 25.6 (over 6.4)."""
    objective, tasks = quadratic([0.5, -3.0, -10.0])
    for chunk_size in (None, 1, 2):
        auto = engine(
            inner=GradientDescent(lr=0.1, steps=0),
            regularization=1.0,
            damping="auto",
            solver=solver,
            chunk_size=chunk_size,
        )
        report = auto(objective, tasks).report
        assert report.damping.tolist() == pytest.approx([0.0, 6.4, 25.6])
        assert report.undamped_residual[0] <= 1e-9 and report.undamped_residual[1:].min() > 0.1
        assert report.solver_residual.max() <= 1e-9
        fresh = copy.copy(auto)
        gradient = fresh.value_and_grad(objective, tasks)[1]["w"]
        spectrum = 1 + tasks.support + report.damping.unsqueeze(-1)
        assert torch.allclose(gradient, (1 / spectrum).mean(0), rtol=1e-9)


def test_auto_remembers_what_it_needed_lowers_it_and_copies_begin_anew():
    objective, tasks = quadratic([-3.0])
    auto = engine(inner=GradientDescent(lr=0.1, steps=0), regularization=1.0, damping="auto")
    used = [auto(objective, tasks).report.damping.item() for _ in range(14)]
    lowered = [6.4 * 0.9**k for k in range(12)]  # 2.008, and then 1.8, which is not enough
    assert used == pytest.approx([6.4, *lowered, 4 * 0.9 * lowered[-1]])
    assert copy.deepcopy(auto)(objective, tasks).report.damping.item() == pytest.approx(6.4)
    convex, convex_tasks = quadratic([0.5])
    assert engine(damping="auto")(convex, convex_tasks).report.damping.tolist() == [0.0]


def test_auto_costs_nothing_where_nothing_is_indefinite():
    _, objective, tasks = problem(mlp)
    plain, auto = engine(regularization=10.0, damping=0.0), engine(regularization=10.0, damping="auto")
    assert auto(objective, tasks).report.hvps == plain(objective, tasks).report.hvps
    got, expected = (e.value_and_grad(objective, tasks)[1] for e in (auto, plain))
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_auto_with_a_warm_start_and_a_preconditioner():
    objective, tasks = quadratic([-3.0, 0.5])
    for options in ({"warm_start": True}, {"solver": SOLVERS["Jacobi"]}):
        auto = engine(inner=GradientDescent(lr=0.1, steps=0), regularization=1.0, damping="auto", **options)
        for _ in range(2):
            report = auto(objective, tasks).report
            assert (report.solver_status == Status.CONVERGED).all() and report.damping[0] > 2


def test_a_failed_solve_names_damping():
    objective, tasks = quadratic([-3.0])
    with pytest.warns(UserWarning, match="`damping`, raises the smallest eigenvalue"):
        engine(inner=GradientDescent(lr=0.1, steps=0), regularization=1.0, damping=0.0)(objective, tasks)


def test_another_damping_is_another_computation():
    _, objective, tasks = problem(mlp)

    def of(damping):
        run = Run.of(engine(damping=damping), objective, derivatives=True)
        return fingerprint(run.engine, run.snapshot, [([0, 1], tasks)], None)["engine"]

    assert of(1.0) == of(1.0) != of(2.0)
    assert of(0.0) != of(1.0)


def test_a_folder_keeps_a_damped_computation(tmp_path):
    _, objective, tasks = problem(mlp)
    kept = engine().value_and_grad(objective, tasks, folder=tmp_path / "kept")[1]
    assert relative_error(kept, engine().value_and_grad(objective, tasks)[1]) <= 1e-14
