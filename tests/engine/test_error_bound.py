"""The error bound of implicit meta-gradients against the true error, where that is known."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev

from imaml import (
    CG,
    FOMAML,
    MAML,
    Dense,
    GradientDescent,
    ImplicitMAML,
    Neumann,
    Objective,
    ScipySolver,
    Solution,
    Status,
    TaskBatch,
)
from imaml._engine.report import Pullback
from tests.engine.cases import mlp, problem

F64 = torch.float64


def each_task(engine, objective, tasks, monkeypatch):
    """The report, and the meta-gradient of every task."""
    seen = []

    def look(pullback: Pullback, *_):
        seen.append(pullback.theta.clone())

    with monkeypatch.context() as patch:
        patch.setattr("imaml._engine.run.check_chunk", look)
        report = engine(objective, tasks).report
    return report, torch.cat(seen)


def spectrum(kind, count, n, rng):
    """Eigenvalues in (0, 1], `(count, n)`."""
    uniform = torch.rand(count, n, dtype=F64)
    if kind == "wide":
        return 10 ** (-4 * uniform)
    if kind == "clustered":
        centres = 10 ** (-3 * torch.rand(count, 3, dtype=F64))
        return centres.gather(1, torch.randint(3, (count, n))) * (1 + 1e-3 * uniform)
    if kind == "low rank":
        return uniform * (torch.rand(count, n) < 0.2)
    return 0.1 + 0.9 * uniform


def symmetric(eigenvalues):
    q = torch.linalg.qr(torch.randn(*eigenvalues.shape, eigenvalues.shape[-1], dtype=F64)).Q
    return (q * eigenvalues.unsqueeze(-2)) @ q.mT


def paraboloid(params, batch):
    matrix, centre = batch
    d = torch.cat([p for p in params.values()]) - centre
    return d @ matrix @ d / 2


def quadratics(seed, *, count=60, well_conditioned=False, dtype=F64, **options):
    """An engine, an objective and tasks drawn at random, with lambda per entry: L = 1/2 (phi - c)' H (phi - c)."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n = rng.choice([1, 2, 3, 5, 8, 15, 30, 60])
    damping, per_parameter = 10 ** rng.uniform(-1, 2), n > 1 and not well_conditioned and rng.random() < 0.3
    kinds = ["even"] if well_conditioned else ["wide", "even", "clustered", "low rank"]
    size = damping * rng.uniform(0, 9) if well_conditioned else 10 ** rng.uniform(-2, 2)
    eigenvalues = size * spectrum(rng.choice(kinds), count, n, rng)
    if not well_conditioned and rng.random() < 0.3:  # negative curvature, short of indefinite
        negative = -damping * (1 - 10 ** (-2 * torch.rand(count, n, dtype=F64)))
        eigenvalues = torch.where(torch.rand(count, n) < 0.3, negative, eigenvalues)
    support, query = symmetric(eigenvalues), symmetric(spectrum(rng.choice(kinds), count, n, rng))
    query = query * 10 ** rng.uniform(-2, 2)
    theta = torch.randn(n, dtype=F64)
    damping = torch.full((n,), damping, dtype=F64)
    damping[1:] *= 10 ** rng.uniform(0, 1) if per_parameter else 1
    inner = GradientDescent(
        lr=rng.uniform(0.3, 1.8) / (eigenvalues.max() + damping.max()).item(),
        steps=rng.choice([0, 1, 2, 5, 10, 20, 50, 100, 200]),
    )
    budget = (
        rng.randint(min(3, n), n) if well_conditioned else rng.choice([rng.randint(1, n), rng.randint(1, min(n, 8))])
    )
    solver = CG(max_steps=budget) if rng.random() < 0.7 else CG(max_steps=500, rtol=10 ** rng.uniform(-10, -2))
    centres = torch.randn(2, count, n, dtype=F64)
    batches = [(matrix.to(dtype), centre.to(dtype)) for matrix, centre in zip((support, query), centres, strict=True)]
    parts = {"a": theta[:1], "b": theta[1:]} if per_parameter else {"a": theta}
    regularization = {name: damping[-(name == "b")].item() for name in parts}
    engine = ImplicitMAML(
        **{"inner": inner, "regularization": regularization, "solver": solver, "on_failure": "ignore"} | options
    )
    params = {name: part.to(dtype).requires_grad_() for name, part in parts.items()}
    objective = Objective.from_function(paraboloid, params)
    return engine, objective, TaskBatch(support=batches[0], query=batches[1]), damping, theta.to(dtype).to(F64)


def true_error(u, tasks, damping, theta):
    """|u - u*| and |u*| of every task, and the condition number of A."""
    (support, a), (query, b) = ([t.to(F64) for t in batch] for batch in (tasks.support, tasks.query))
    inner = support + damping.diag()
    star = torch.linalg.solve(inner, (support @ a.unsqueeze(-1)).squeeze(-1) + damping * theta)
    v = (query @ (star - b).unsqueeze(-1)).squeeze(-1)
    exact = damping * torch.linalg.solve(inner, v)
    eigenvalues = torch.linalg.eigvalsh(inner / damping.sqrt() / damping.sqrt().unsqueeze(-1))
    return (u.to(F64) - exact).norm(dim=-1), exact.norm(dim=-1), eigenvalues[:, -1] / eigenvalues[:, 0]


@pytest.mark.parametrize(("dtype", "draws"), [(torch.float64, 40), (torch.float32, 20)], ids=str)
def test_it_is_never_violated_on_random_quadratics(dtype, draws, monkeypatch):
    """60 tasks a draw; rounding is part of the error."""
    finite = []
    for seed in range(draws):
        engine, objective, tasks, *rest = quadratics(seed, dtype=dtype)
        report, u = each_task(engine, objective, tasks, monkeypatch)
        error, size, _ = true_error(u, tasks, *rest)
        assert ((error <= report.error_bound * size) | (error == 0)).all()
        finite.append(report.error_bound.isfinite())
    assert torch.cat(finite).double().mean() > 0.5


def test_it_is_within_a_factor_of_100_where_well_conditioned(monkeypatch):
    """Nearly always: what a point's direction hides, it may hide by any factor."""
    ratios = []
    for seed in range(30):
        engine, objective, tasks, *rest = quadratics(seed, well_conditioned=True)
        report, u = each_task(engine, objective, tasks, monkeypatch)
        error, size, condition = true_error(u, tasks, *rest)
        error = error / size
        assert condition.max() <= 10
        small = (error < 5e-3) & (error > 1e-12)  # of larger errors a hundredfold is 1/2 or more
        ratios.append((report.error_bound / error)[small])
    ratio = torch.cat(ratios)
    assert len(ratio) > 500 and ratio.min() >= 1
    assert ratio.quantile(0.999) <= 100 and ratio.median() <= 15


OTHERS = [Dense(), Neumann(max_steps=60), ScipySolver(method="minres", rtol=1e-8)]


@pytest.mark.parametrize("solver", OTHERS, ids=lambda s: type(s).__name__)
def test_other_solvers_have_one_too(solver, monkeypatch):
    for seed in range(12):
        engine, objective, tasks, *rest = quadratics(seed, count=5, solver=solver)
        report, u = each_task(engine, objective, tasks, monkeypatch)
        error, size, _ = true_error(u, tasks, *rest)
        assert ((error <= report.error_bound * size) | (error == 0)).all()


class Net(torch.nn.Module):
    """Linear, or one hidden layer of tanh, in float64."""

    def __init__(self, inputs, hidden, outputs):
        super().__init__()
        self.first = torch.nn.Linear(inputs, hidden or outputs, dtype=F64)
        self.last = torch.nn.Linear(hidden, outputs, dtype=F64) if hidden else torch.nn.Identity()

    def forward(self, x):
        hidden = self.first(x)
        return hidden if isinstance(self.last, torch.nn.Identity) else self.last(torch.tanh(hidden))


def exact(net, loss, task, damping, start):
    """The implicit meta-gradient at the exact stationary point, by Newton's method from `start`; None where the inner
    Hessian is not positive definite on the way.
    """
    shapes = {n: p.shape for n, p in net.named_parameters()}
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])

    def of(batch):
        def at(flat):
            parts = flat.split([s.numel() for s in shapes.values()])
            values = {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
            return loss(functional_call(net, values, (batch[0],)), batch[1])

        return at

    def inner(flat):
        return of(task.support)(flat) + damping / 2 * ((flat - theta) ** 2).sum()

    phi, step = start, start
    while step.norm() > 1e-11 * phi.norm():
        hessian = jacrev(grad(inner))(phi)
        if torch.linalg.eigvalsh(hessian)[0] <= 0:
            return None
        step = torch.linalg.solve(hessian, grad(inner)(phi))
        phi = phi - step
    return damping * torch.linalg.solve(jacrev(grad(inner))(phi), grad(of(task.query))(phi))


@pytest.mark.parametrize("kind", ["ridge", "logistic", "tanh, regression", "tanh, classification"])
def test_it_is_never_violated_on_small_models(kind, monkeypatch):
    compared = 0
    for seed in range(5):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        classifies, deep = kind.endswith(("logistic", "classification")), kind.startswith("tanh")
        inputs, outputs = rng.randint(1, 4), 3 if classifies else 1
        net = Net(inputs, rng.randint(1, 4) if deep else 0, outputs)
        loss = F.cross_entropy if classifies else F.mse_loss

        def batch(examples, inputs=inputs, outputs=outputs, classifies=classifies):
            x = torch.randn(4, examples, inputs, dtype=F64)
            return x, torch.randint(3, (4, examples)) if classifies else torch.randn(4, examples, outputs, dtype=F64)

        tasks = TaskBatch(support=batch(rng.randint(1, 6)), query=batch(rng.randint(1, 6)))
        damping = 10 ** rng.uniform(-1, 2)
        engine = ImplicitMAML(
            inner=GradientDescent(lr=0.5 / (damping + 10), steps=rng.choice([0, 2, 10, 50, 200])),
            regularization=damping,
            solver=rng.choice([CG(max_steps=rng.randint(1, 6)), CG(rtol=1e-8)]),
            on_failure="ignore",
        )
        objective = Objective(net, loss)
        report, u = each_task(engine, objective, tasks, monkeypatch)
        for i, task in enumerate(tasks):
            start = torch.cat([p.flatten() for p in engine.adapt(objective, task.support).values()])
            expected = exact(net, loss, task, damping, start)
            if expected is not None:
                compared += 1
                assert (u[i] - expected).norm() <= report.error_bound[i] * expected.norm()
    assert compared >= 10


def test_a_solved_problem_is_exact_but_for_rounding():
    _, objective, tasks = problem(mlp)
    engine = ImplicitMAML(inner=GradientDescent(lr=0.3, steps=200), solver=CG(rtol=1e-13))
    report = engine(objective, tasks).report
    assert (report.error_bound > 1e-16).all() and (report.error_bound < 1e-11).all()
    assert f"at most {report.error_bound.max().item():.3g}" in str(report)


def test_the_stationarity_alone_shows():
    """The system is solved exactly, at another point."""
    _, objective, tasks = problem(mlp)
    bounds = [
        ImplicitMAML(inner=GradientDescent(lr=0.3, steps=k), solver=Dense())(objective, tasks).report.error_bound
        for k in (10, 20, 30)
    ]
    assert (bounds[0] > 10 * bounds[1]).all() and (bounds[1] > 10 * bounds[2]).all()


@pytest.mark.parametrize("solver", [CG(), Dense(), Neumann(max_steps=3)], ids=lambda s: type(s).__name__)
def test_a_query_gradient_of_zero_is_exact_at_a_stationary_point_alone(solver):
    w = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    objective = Objective.from_function(lambda params, b: ((params["w"] - b) ** 2).sum(), {"w": w})
    here, there = w.detach(), w.detach() + 1
    tasks = TaskBatch(support=torch.stack([here, here, there]), query=torch.stack([here, there, here]))
    engine = ImplicitMAML(inner=GradientDescent(lr=0.1, steps=0), solver=solver)
    bound = engine(objective, tasks).report.error_bound
    assert bound[0] == 0 and 0 < bound[1] < 1e-12 and bound[2] == torch.inf


@pytest.mark.parametrize("solver", [CG(), Dense(), ScipySolver(method="minres")], ids=lambda s: type(s).__name__)
def test_nothing_is_said_of_a_saddle_point(solver):
    matrices = torch.diag_embed(torch.tensor([[1.0, 2.0, 3.0], [-5.0, 2.0, 1.0]], dtype=F64))
    centres = torch.ones(2, 3, dtype=F64)
    objective = Objective.from_function(paraboloid, {"a": torch.zeros(3, dtype=F64, requires_grad=True)})
    tasks = TaskBatch(support=(matrices, centres), query=(matrices.abs(), centres))
    engine = ImplicitMAML(
        inner=GradientDescent(lr=0.1, steps=10), regularization=2.0, solver=solver, on_failure="ignore"
    )
    bound = engine(objective, tasks).report.error_bound
    assert bound[0] < 1 and bound[1] == torch.inf


def test_negative_curvature_that_the_solver_cannot_see():
    """Every v is in the first direction, where all is well; the gradient of the inner objective is not."""
    matrix = torch.diag(torch.tensor([1.0, -2.5], dtype=F64)).unsqueeze(0)
    objective = Objective.from_function(paraboloid, {"a": torch.zeros(2, dtype=F64, requires_grad=True)})
    tasks = TaskBatch(
        support=(matrix, torch.tensor([[1.0, 1e-3]], dtype=F64)),
        query=(torch.diag(torch.tensor([1.0, 0.0], dtype=F64)).unsqueeze(0), torch.tensor([[3.0, 0.0]], dtype=F64)),
    )
    engine = ImplicitMAML(inner=GradientDescent(lr=0.3, steps=20), regularization=2.0, solver=CG(max_steps=2))
    report = engine(objective, tasks).report
    assert report.solver_status[0] == Status.CONVERGED and report.error_bound[0] == torch.inf


def test_a_flat_direction_that_the_solver_hardly_saw():
    """One CG step at a stationary point: v is nearly the eigenvector of 50, and what it leaves is of eigenvalue 1."""
    zero = torch.zeros(2, dtype=F64, requires_grad=True)
    support = torch.diag(torch.tensor([49.0, 0.0], dtype=F64)).unsqueeze(0), torch.zeros(1, 2, dtype=F64)
    v = torch.tensor([[1.0, 1e-3]], dtype=F64)
    tasks = TaskBatch(support=support, query=(torch.eye(2, dtype=F64).unsqueeze(0), -v))
    engine = ImplicitMAML(inner=GradientDescent(lr=0.01, steps=2), regularization=1.0, solver=CG(max_steps=1))
    result = engine(Objective.from_function(paraboloid, {"a": zero}), tasks)
    result.loss.backward()
    exact = v[0] / torch.tensor([50.0, 1.0], dtype=F64)
    error = (zero.grad - exact).norm() / exact.norm()
    assert 0.01 < error <= result.report.error_bound[0] < 1


def test_what_is_not_finite_over_there_is_said():
    """The query loss ends between here and the stationary point."""
    w = torch.zeros(1, dtype=F64, requires_grad=True)

    def loss(params, batch):
        scale, support = batch
        distance = (params["w"] - 1).square().sum()
        return torch.where(support, distance / 2, (0.2 - params["w"]).log().sum() * scale)

    ones, yes = torch.ones(1, dtype=F64), torch.ones(1).bool()
    objective = Objective.from_function(loss, {"w": w})
    tasks = TaskBatch(support=(ones, yes), query=(ones, ~yes))
    engine = ImplicitMAML(inner=GradientDescent(lr=0.1, steps=1), regularization=0.1, solver=CG(max_steps=1))
    assert engine(objective, tasks).report.error_bound[0] > 1


def test_it_can_be_left_out_and_others_have_none():
    _, objective, tasks = problem(mlp)
    inner = GradientDescent(lr=0.2, steps=3)
    engine = ImplicitMAML(inner=inner, error_bound=False)
    without, full = engine(objective, tasks), replace(engine, error_bound=True)(objective, tasks)
    assert without.report.error_bound is None and "at most" not in str(without.report)
    assert full.report.error_bound.shape == (3,) and full.report.error_bound.dtype == F64
    assert torch.equal(without.report.solver_residual, full.report.solver_residual)
    for strategy in (MAML, FOMAML):
        assert strategy(inner=inner)(objective, tasks).report.error_bound is None


def test_a_third_party_estimate_is_taken():
    class Cautious(Dense):
        def _solve(self, *arguments):
            solved = super()._solve(*arguments)
            return replace(solved, smallest_eigenvalue=solved.smallest_eigenvalue / 10)

    _, objective, tasks = problem(mlp)
    inner = GradientDescent(lr=0.3, steps=15)
    bounds = [
        ImplicitMAML(inner=inner, solver=solver)(objective, tasks).report.error_bound
        for solver in (Dense(), Cautious())
    ]
    assert (bounds[1] > 9 * bounds[0]).all()
    assert Solution.__dataclass_fields__["smallest_eigenvalue"].default is None


def test_with_several_lambdas_it_is_of_the_meta_gradient_and_not_of_the_scaled_solution(monkeypatch):
    seen = {}

    def remember(error, size, status):
        seen.update(error=error, size=size)
        return error

    monkeypatch.setattr("imaml._strategies.implicit.solution_error", lambda mu, *_: torch.ones_like(mu))
    monkeypatch.setattr("imaml._strategies.implicit.relative_bound", remember)
    _, objective, tasks = problem(mlp)
    roots = {n: float(i + 1) for i, n in enumerate(objective.adapted)}
    engine = ImplicitMAML(
        inner=GradientDescent(lr=0.02, steps=3), regularization={n: root**2 for n, root in roots.items()}
    )
    _, u = each_task(engine, objective, tasks, monkeypatch)
    torch.testing.assert_close(seen["size"], u.norm(dim=-1), rtol=1e-12, atol=0)
    every = torch.cat([torch.full((p.numel(),), roots[n]) for n, p in objective.parameters().items()]).double()
    torch.testing.assert_close(seen["error"], torch.full((3,), 4.0, dtype=F64) / every.mean(), rtol=1e-12, atol=0)
