"""One tanh network in 50 digits: mpmath evaluates and differentiates, and shares nothing with torch."""

import mpmath
import pytest
import torch
import torch.nn.functional as F
from mpmath import mp, mpf
from torch import nn

from imaml import MAML, Dense, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.testing._models import network

SUPPORT = ([0.7, -1.1, 0.4], [0.3, -0.8, 1.2])
QUERY = ([-0.5, 0.9], [0.6, -0.2])
LR, STEPS, REGULARIZATION = 0.15, 3, 1.25


@pytest.fixture(autouse=True)
def fifty_digits():
    with mp.workdps(50):
        yield


def mean_squared_error(phi, data):
    """Of w2' tanh(w1 x + b1) + b2 with two hidden units; phi = (w1, b1, w2, b2) in the order of torch."""
    w1, b1, w2, b2 = phi[0:2], phi[2:4], phi[4:6], phi[6]
    errors = [
        (sum(w2[i] * mp.tanh(w1[i] * mpf(x) + b1[i]) for i in range(2)) + b2 - mpf(y)) ** 2
        for x, y in zip(*data, strict=True)
    ]
    return sum(errors) / len(errors)


def gradient(function, point):
    return [mpmath.diff(lambda *p: function(p), tuple(point), tuple(int(i == k) for k in range(7))) for i in range(7)]


def inner_gradient(phi, theta):
    support = gradient(lambda p: mean_squared_error(p, SUPPORT), phi)
    return [g + REGULARIZATION * (p - t) for g, p, t in zip(support, phi, theta, strict=True)]


def after_descent(theta):
    phi = list(theta)
    for _ in range(STEPS):
        phi = [p - mpf(LR) * g for p, g in zip(phi, inner_gradient(phi, theta), strict=True)]
    return mean_squared_error(phi, QUERY)


def at_the_minimum(theta, start):
    phi = mpmath.findroot(lambda *p: inner_gradient(p, theta), start, solver="mdnewton", tol=mpf(10) ** -70)
    return mean_squared_error(list(phi), QUERY)


@pytest.fixture
def model():
    return network([1, 2, 1], nn.Tanh, seed=3)


def torch_problem(model):
    data = {
        name: tuple(torch.tensor(values, dtype=torch.float64).view(1, -1, 1) for values in data)
        for name, data in (("support", SUPPORT), ("query", QUERY))
    }
    return Objective(model, F.mse_loss), TaskBatch(**data)


def numbers(model):
    return [mpf(value) for p in model.parameters() for value in p.detach().flatten().tolist()]


def assert_equal_to_1e_12(engine, model, expected):
    got = torch.cat([g.flatten() for g in engine.value_and_grad(*torch_problem(model))[1].values()])
    expected = torch.tensor([float(e) for e in expected], dtype=torch.float64)
    assert (got - expected).norm() <= 1e-12 * expected.norm()


def test_maml_through_three_steps(model):
    expected = gradient(after_descent, numbers(model))
    engine = MAML(inner=GradientDescent(lr=LR, steps=STEPS), regularization=REGULARIZATION)
    assert_equal_to_1e_12(engine, model, expected)


def test_implicit_at_the_minimum(model):
    theta = numbers(model)
    engine = ImplicitMAML(inner=GradientDescent(lr=0.2, steps=400), regularization=REGULARIZATION, solver=Dense())
    objective, tasks = torch_problem(model)
    near = engine.adapt(objective, tasks[0].support)
    start = [mpf(value) for p in near.values() for value in p.flatten().tolist()]
    assert_equal_to_1e_12(engine, model, gradient(lambda t: at_the_minimum(t, start), theta))
