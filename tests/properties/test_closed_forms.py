"""The implicit meta-gradient where the stationary point is known: quadratics, ridge and logistic regression."""

import dataclasses
import math

import numpy as np
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from imaml import CG, Dense, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.testing import quadratic_tasks, small_models, task_batches
from tests.oracles import relative_error

F64 = torch.float64
SOLVERS = st.sampled_from([Dense(), CG(max_steps=200, rtol=1e-13)])
lambdas = st.floats(0.3, 4.0)
few = settings(max_examples=12)


def converged(regularization, *, curvature, solver):
    """A step of 1 / (L + lambda) contracts by L / (L + lambda) for curvatures from 0 to L: repeated to rounding."""
    steps = math.ceil(40 / math.log1p(regularization / curvature))
    inner = GradientDescent(lr=1 / (curvature + regularization), steps=steps)
    return ImplicitMAML(inner=inner, regularization=regularization, solver=solver, on_failure="ignore")


def flat(named):
    return torch.cat([tensor.detach().flatten() for tensor in named.values()])


@few
@given(quadratic_tasks(tasks=1), lambdas, SOLVERS)
def test_the_derivative_by_theta(problem, regularization, solver):
    """Row i of d phi* / d theta = lambda A^-1 is the meta-gradient of the query loss e_i' phi."""
    engine = converged(regularization, curvature=1.0, solver=solver)
    n = len(problem.theta)
    rows = []
    for i in range(n):
        e = torch.zeros(1, n, dtype=F64)
        e[0, i] = -1.0
        linear = TaskBatch(support=problem.tasks.support, query=(torch.zeros(1, n, n, dtype=F64), e))
        rows.append(flat(engine.value_and_grad(problem.objective(), linear)[1]))
    a = problem.tasks.support[0][0] + regularization * torch.eye(n, dtype=F64)
    torch.testing.assert_close(torch.stack(rows) @ a, regularization * torch.eye(n, dtype=F64), rtol=0, atol=1e-11)


def assert_derivative_by_lambda(objective, tasks, engine, tolerance):
    """d phi* / d lambda = A^-1 (theta - phi*), so d L_query / d lambda = g' (theta - phi*) / lambda with g ours."""
    (task,) = tasks
    lam, h = engine.regularization, 1e-5 * engine.regularization
    values = [
        dataclasses.replace(engine, regularization=lam + sign * h).value_and_grad(objective, tasks)[0]
        for sign in (1, -1)
    ]
    slope = (values[0] - values[1]) / (2 * h)
    moved = flat({n: objective.parameters()[n] for n in objective.adapted}) - flat(
        engine.adapt(objective, task.support)
    )
    gradient = engine.value_and_grad(objective, tasks)[1]
    g = flat({n: gradient[n] for n in objective.adapted})
    assert abs(slope - g @ moved / lam) <= tolerance * (abs(values[0]) + g.norm() * moved.norm()) / lam


@few
@given(quadratic_tasks(tasks=1), lambdas, SOLVERS)
def test_the_derivative_by_lambda_on_quadratics(problem, regularization, solver):
    engine = converged(regularization, curvature=1.01, solver=solver)
    assert_derivative_by_lambda(problem.objective(), problem.tasks, engine, tolerance=1e-7)


@few
@given(small_models(frozen=False), task_batches(tasks=1), lambdas)
def test_the_derivative_by_lambda_of_a_head_on_drawn_features(model, tasks, regularization):
    head = str(len(model) - 1)
    objective = Objective(model, F.cross_entropy, adapt=[head])
    features = torch.cat([model[:-1](tasks.support[0][0]), torch.ones(len(tasks.support[0][0]), 1, dtype=F64)], dim=1)
    curvature = 0.5 * features.square().sum(1).max().item() + 1e-3  # of cross-entropy with two classes
    engine = converged(regularization, curvature=curvature, solver=Dense())
    assert_derivative_by_lambda(objective, tasks, engine, tolerance=1e-6)


def curvature_of(tasks, factor):
    """The largest curvature of a mean of losses with second derivative at most `factor` in a linear output."""
    x = tasks.support[0]
    return factor * torch.linalg.matrix_norm(x, ord=2).max().item() ** 2 / x.shape[1]


def linear(theta, loss):
    def of_params(params, batch):
        return loss(batch[0] @ params["w"], batch[1].squeeze(-1))

    return Objective.from_function(of_params, {"w": theta})


@few
@given(task_batches(kind="regression", outputs=1, inputs=4), lambdas, SOLVERS)
def test_ridge_regression(tasks, regularization, solver):
    """phi* = (2 X'X / m + lambda)^-1 (2 X'y / m + lambda theta), by numpy."""
    theta = torch.linspace(-1, 1, 4, dtype=F64)
    expected = 0
    for task in tasks:
        x, y, xq, yq = (t.numpy() for t in (*task.support, *task.query))
        a = 2 * x.T @ x / len(x) + regularization * np.eye(4)
        phi = np.linalg.solve(a, 2 * x.T @ y[:, 0] / len(x) + regularization * theta.numpy())
        v = 2 * xq.T @ (xq @ phi - yq[:, 0]) / len(xq)
        expected = expected + regularization * np.linalg.solve(a, v) / len(tasks)
    engine = converged(regularization, curvature=curvature_of(tasks, 2.0), solver=solver)
    got = engine.value_and_grad(linear(theta, F.mse_loss), tasks)[1]
    assert relative_error(got, {"w": torch.from_numpy(expected)}) <= 1e-10


@few
@given(task_batches(kind="regression", outputs=1, inputs=4), lambdas, SOLVERS)
def test_logistic_regression(tasks, regularization, solver):
    """phi* by scipy's Newton method, and the Hessian X' diag(p (1 - p)) X / m."""
    tasks = TaskBatch(**{k: (x, (y > 0).double()) for k, (x, y) in vars(tasks).items()})
    theta = torch.linspace(-1, 1, 4, dtype=F64)
    expected = 0
    for task in tasks:
        x, y, xq, yq = (t.numpy() for t in (*task.support, *task.query))

        def gradient(phi, x=x, y=y):
            p = 1 / (1 + np.exp(-x @ phi))
            return x.T @ (p - y[:, 0]) / len(x) + regularization * (phi - theta.numpy())

        def hessian(phi, x=x):
            p = 1 / (1 + np.exp(-x @ phi))
            return (x.T * (p * (1 - p))) @ x / len(x) + regularization * np.eye(4)

        phi = scipy.optimize.root(gradient, theta.numpy(), jac=hessian, tol=1e-14).x
        v = xq.T @ (1 / (1 + np.exp(-xq @ phi)) - yq[:, 0]) / len(xq)
        expected = expected + regularization * np.linalg.solve(hessian(phi), v) / len(tasks)
    engine = converged(regularization, curvature=curvature_of(tasks, 0.25), solver=solver)
    got = engine.value_and_grad(linear(theta, F.binary_cross_entropy_with_logits), tasks)[1]
    assert relative_error(got, {"w": torch.from_numpy(expected)}) <= 1e-10
