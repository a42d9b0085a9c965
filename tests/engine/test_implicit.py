"""Implicit MAML is the gradient through the stationary point of the inner objective."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, MAML, Dense, GradientDescent, ImplicitMAML, Neumann, Objective, ScipySolver, Status, TaskBatch
from tests.engine.cases import conv, mlp, oracle_setting, problem
from tests.oracles import hessian, implicit, model_loss, relative_error, setting

EXACT = ("auto", "forward-over-reverse", "reverse-over-reverse")
LONG = GradientDescent(lr=0.3, steps=120)
SHORT = GradientDescent(lr=0.2, steps=3)
TIGHT = CG(max_steps=500, rtol=1e-12)


@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
def test_at_a_stationary_point_it_equals_the_dense_solution_and_maml(adapt):
    model, objective, tasks = problem(mlp, adapt=adapt)
    engine = ImplicitMAML(inner=LONG, regularization=2.0, solver=TIGHT)
    _, expected = implicit(oracle_setting(engine, model, objective, tasks))
    result = engine(objective, tasks)
    assert result.report.stationarity.max() <= 1e-12
    assert (result.report.solver_status == Status.CONVERGED).all()
    assert result.report.solver_residual.max() <= 1e-12
    result.loss.backward()
    got = {n: p.grad for n, p in model.named_parameters()}
    assert relative_error(got, expected) <= 1e-8
    exact = MAML(inner=LONG, regularization=2.0).value_and_grad(objective, tasks)[1]
    assert relative_error(got, exact) <= 1e-8


@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("hvp", [*EXACT, "finite-difference"])
def test_every_mode_equals_the_dense_solution(hvp, linearize, adapt):
    """The linear system is the same wherever the inner loop stopped."""
    model, objective, tasks = problem(mlp, adapt=adapt)
    for chunk_size in (None, 1):
        engine = ImplicitMAML(inner=SHORT, solver=TIGHT, hvp=hvp, linearize=linearize, chunk_size=chunk_size)
        if hvp == "finite-difference":
            engine = ImplicitMAML(inner=SHORT, solver=CG(max_steps=50, rtol=1e-7), hvp=hvp, chunk_size=chunk_size)
        _, expected = implicit(oracle_setting(engine, model, objective, tasks))
        got = engine.value_and_grad(objective, tasks)[1]
        assert relative_error(got, expected) <= (1e-6 if hvp == "finite-difference" else 1e-8)


@pytest.mark.parametrize("solver", [CG(max_steps=200, rtol=1e-12), Dense()], ids=lambda s: type(s).__name__)
def test_one_number_of_regularization_per_parameter(solver):
    model, objective, tasks = problem(mlp)
    weights = {n: 0.7 * (i + 1) for i, n in enumerate(objective.adapted)}
    engine = ImplicitMAML(inner=SHORT, regularization=weights, solver=solver)
    _, expected = implicit(oracle_setting(engine, model, objective, tasks))
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-10


def test_convolutions_with_batchnorm():
    model, objective, tasks = problem(conv, adapt=["10", "7"], tasks=1)
    engine = ImplicitMAML(inner=SHORT, solver=TIGHT)
    _, expected = implicit(oracle_setting(engine, model, objective, tasks))
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-8


def test_maml_with_the_same_proximal_term_converges_to_it_geometrically():
    model, objective, tasks = problem(mlp)
    _, limit = implicit(oracle_setting(ImplicitMAML(inner=LONG), model, objective, tasks))
    steps = (5, 10, 15, 20, 25)
    engines = [MAML(inner=GradientDescent(lr=0.3, steps=k), regularization=2.0) for k in steps]
    errors = torch.tensor([relative_error(e.value_and_grad(objective, tasks)[1], limit) for e in engines])
    ratios = errors[1:] / errors[:-1]
    assert (ratios < 0.1).all()  # at least the contraction |1 - lr (curvature + lambda)| per step
    assert errors[-1] < 1e-6


OTHER_SOLVERS = {
    "dense": Dense(),
    "neumann": Neumann(max_steps=400, rtol=1e-11),
    "minres": ScipySolver(method="minres", rtol=1e-12),
    "scipy's cg": ScipySolver(method="cg", rtol=1e-12),
}


@pytest.mark.parametrize("solver", OTHER_SOLVERS.values(), ids=OTHER_SOLVERS)
def test_any_solver_plugs_in(solver):
    model, objective, tasks = problem(mlp)
    engine = ImplicitMAML(inner=SHORT, solver=solver)
    _, expected = implicit(oracle_setting(engine, model, objective, tasks))
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-8


@pytest.mark.parametrize("hvp", [*EXACT, "finite-difference"])
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("steps", [0, 2])
def test_stationarity_is_the_norm_of_the_inner_gradient(hvp, linearize, steps):
    model, objective, tasks = problem(mlp)
    inner = GradientDescent(lr=0.2, steps=steps)
    engine = ImplicitMAML(
        inner=inner, regularization=0.9, solver=CG(max_steps=1, rtol=0.0), hvp=hvp, linearize=linearize
    )
    report = engine(objective, tasks).report
    theta = dict(model.named_parameters())
    for i, task in enumerate(tasks):
        phi = {n: p.requires_grad_() for n, p in engine.adapt(objective, task.support).items()}
        loss = model_loss(model, F.cross_entropy)(phi, task.support)
        loss = loss + 0.45 * sum(((phi[n] - theta[n].detach()) ** 2).sum() for n in phi)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(phi.values()))])
        torch.testing.assert_close(report.stationarity[i], gradient.norm(), rtol=1e-10, atol=0)


def test_the_solver_stops_at_its_budget_and_the_residual_is_true():
    model, objective, tasks = problem(mlp)
    engine = ImplicitMAML(inner=SHORT, regularization=0.5, solver=CG(max_steps=2, rtol=0.0), on_failure="raise")
    report = engine(objective, tasks).report
    assert (report.solver_steps == 2).all() and (report.solver_status == Status.BUDGET_SPENT).all()
    setup = oracle_setting(engine, model, objective, tasks)
    for i, task in enumerate(tasks):
        x = torch.cat([g.flatten() for g in engine.value_and_grad(objective, [task])[1].values()])
        phi = engine.adapt(objective, task.support)
        leaves = {n: p.requires_grad_() for n, p in phi.items()}
        v = torch.autograd.grad(setup.loss(leaves, task.query), list(leaves.values()))
        b = torch.cat([g.flatten() for g in v])
        matrix = (
            torch.eye(len(b)).double() + hessian(setup, {n: p.detach() for n, p in phi.items()}, task.support) / 0.5
        )
        expected = (b - matrix @ x).norm() / b.norm()
        torch.testing.assert_close(report.solver_residual[i], expected, rtol=1e-6, atol=0)
        assert expected > 1e-4


def test_the_system_of_one_lambda_has_v_itself_on_the_right():
    """Else a solver's absolute tolerance would be in other units."""
    seen = []

    class Watched(Dense):
        def _solve(self, op, b, *rest):
            seen.append(b)
            return super()._solve(op, b, *rest)

    model, objective, tasks = problem(mlp)
    engine = ImplicitMAML(inner=SHORT, regularization=3.0, solver=Watched())
    engine(objective, tasks)
    for i, task in enumerate(tasks):
        phi = {n: p.requires_grad_() for n, p in engine.adapt(objective, task.support).items()}
        v = torch.autograd.grad(model_loss(model, F.cross_entropy)(phi, task.query), list(phi.values()))
        torch.testing.assert_close(seen[0][i], torch.cat([g.flatten() for g in v]), rtol=1e-12, atol=1e-14)


class Quadratic:
    """L_support = 1/2 phi' A phi - b' phi with a fixed A of the task, L_query = 1/2 |phi - c|^2: all in closed form."""

    def __init__(self, spectrum, *, tasks=2):
        n = len(spectrum)
        q = torch.linalg.qr(torch.randn(tasks, n, n, dtype=torch.float64)).Q
        self.a = q @ torch.diag_embed(torch.tensor(spectrum, dtype=torch.float64)) @ q.mT
        self.b, self.c = (torch.randn(tasks, n, dtype=torch.float64) for _ in range(2))
        self.theta = torch.randn(n, dtype=torch.float64)
        self.tasks = TaskBatch(support=(self.a, self.b), query=self.c)

    def objective(self):
        params = {"u": self.theta[:2].clone(), "w": self.theta[2:].clone()}
        return Objective.from_function(self.loss, {n: p.requires_grad_() for n, p in params.items()})

    @staticmethod
    def loss(params, batch):
        phi = torch.cat([params["u"], params["w"]])
        if isinstance(batch, torch.Tensor):
            return ((phi - batch) ** 2).sum() / 2
        a, b = batch
        return phi @ a @ phi / 2 - b @ phi

    def gradient(self, damping):
        """Mean over tasks of (d phi / d theta)' (phi - c), with d phi / d theta = (A + Lambda)^-1 Lambda."""
        total = 0
        for a, b, c in zip(self.a, self.b, self.c, strict=True):
            phi = torch.linalg.solve(a + damping.diag(), b + damping * self.theta)
            jacobian = torch.linalg.solve(a + damping.diag(), damping.diag())
            total = total + jacobian.T @ (phi - c)
        return total / len(self.a)


@pytest.mark.parametrize("solver", [CG(max_steps=100, rtol=1e-14), Dense()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("regularization", [1.5, {"u": 0.7, "w": 2.3}], ids=str)
def test_quadratics_in_closed_form(regularization, solver):
    quadratic = Quadratic([0.0, 0.5, 1.0, 3.0, 3.0])
    weights = regularization if isinstance(regularization, dict) else {"u": regularization, "w": regularization}
    damping = torch.tensor([weights["u"]] * 2 + [weights["w"]] * 3, dtype=torch.float64)
    expected = quadratic.gradient(damping)
    engine = ImplicitMAML(
        inner=GradientDescent(lr=0.3, steps=150), regularization=regularization, solver=solver, on_failure="ignore"
    )
    _, got = engine.value_and_grad(quadratic.objective(), quadratic.tasks)
    torch.testing.assert_close(torch.cat(list(got.values())), expected, rtol=1e-10, atol=1e-12)


def test_maml_on_quadratics_in_closed_form():
    """(I - lr (A + Lambda))^k, and the proximal term's part of d phi / d theta."""
    quadratic, lam, lr = Quadratic([0.0, 0.5, 1.0, 3.0, 3.0]), 1.5, 0.1
    _, got = MAML(inner=GradientDescent(lr=lr, steps=2), regularization=lam).value_and_grad(
        quadratic.objective(), quadratic.tasks
    )
    expected = 0
    for a, b, c in zip(quadratic.a, quadratic.b, quadratic.c, strict=True):
        eye, phi, jacobian = torch.eye(5, dtype=torch.float64), quadratic.theta, torch.eye(5, dtype=torch.float64)
        for _ in range(2):
            phi = phi - lr * (a @ phi - b + lam * (phi - quadratic.theta))
            jacobian = (eye - lr * (a + lam * eye)) @ jacobian + lr * lam * eye
        expected = expected + jacobian.T @ (phi - c) / 2
    torch.testing.assert_close(torch.cat(list(got.values())), expected, rtol=1e-12, atol=1e-13)


def test_a_fixed_parameter_in_closed_form():
    """L_support = 1/2 (phi - s eta)^2, L_query = 1/2 phi^2 + eta: phi = (s eta + lambda theta) / (1 + lambda)."""
    params = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in (("phi", 0.4), ("eta", -1.3))}

    def loss(p, batch):
        scale, support = batch
        return torch.where(support, (p["phi"] - scale * p["eta"]) ** 2 / 2, p["phi"] ** 2 / 2 + p["eta"])

    scales = torch.tensor([0.5, 2.0], dtype=torch.float64)
    yes = torch.ones(2, dtype=torch.bool)
    tasks = TaskBatch(support=(scales, yes), query=(scales, ~yes))
    engine = ImplicitMAML(inner=GradientDescent(lr=0.3, steps=150), regularization=1.5, solver=Dense())
    _, got = engine.value_and_grad(Objective.from_function(loss, params, adapt=["phi"]), tasks)
    phi = (scales * -1.3 + 1.5 * 0.4) / 2.5
    torch.testing.assert_close(got["phi"], (phi * 1.5 / 2.5).mean(), rtol=1e-10, atol=0)
    torch.testing.assert_close(got["eta"], (phi * scales / 2.5 + 1).mean(), rtol=1e-10, atol=0)


def test_parameters_that_the_support_loss_ignores():
    _, _, tasks = problem(mlp)
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "spare": nn.Linear(4, 3)}).double()
    params = dict(model.named_parameters())

    def loss(params, batch):
        x, y = batch
        output = F.linear(x, params["used.weight"], params["used.bias"])
        if len(x) == 6:  # the query set
            output = output + F.linear(x, params["spare.weight"], params["spare.bias"])
        return F.cross_entropy(output, y)

    engine = ImplicitMAML(inner=SHORT, solver=TIGHT)
    result = engine(Objective.from_function(loss, params), tasks)
    assert result.report.unused == ("spare.weight", "spare.bias")
    result.loss.backward()
    _, expected = implicit(setting(engine, tasks, loss, params))
    assert relative_error({n: p.grad for n, p in params.items()}, expected) <= 1e-10
