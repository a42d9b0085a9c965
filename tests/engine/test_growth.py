"""The growth of the cotangent in the report of MAML, and the warning that nothing is left of a meta-gradient."""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from imaml import FOMAML, MAML, Adam, GradientDescent, Objective, PrecisionWarning, Task, TaskBatch
from tests.engine.cases import mlp, problem


def by_autograd(model, task, steps, lr, regularization):
    """The norms of the query loss's derivatives by every state of an unrolled loop, the largest over the last."""
    theta = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    states = [theta]
    for _ in range(steps):
        phi = states[-1]
        loss = F.cross_entropy(torch.func.functional_call(model, phi, task.support[0]), task.support[1])
        loss = loss + regularization / 2 * sum((phi[n] - theta[n].detach()).square().sum() for n in phi)
        grads = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        states.append({n: p - lr * g for (n, p), g in zip(phi.items(), grads, strict=True)})
    query = F.cross_entropy(torch.func.functional_call(model, states[-1], task.query[0]), task.query[1])
    norms = [
        torch.cat([g.flatten() for g in torch.autograd.grad(query, list(phi.values()), retain_graph=True)]).norm()
        for phi in states
    ]
    return torch.stack(norms).max() / norms[-1]


@pytest.mark.parametrize("regularization", [0.0, 0.7])
@pytest.mark.parametrize("options", [{}, {"checkpoints": 1}, {"linearize": True}, {"chunk_size": 1}], ids=str)
def test_growth_is_that_of_the_derivatives_by_every_state(options, regularization):
    model, objective, tasks = problem(mlp)
    engine = MAML(inner=GradientDescent(lr=3.0, steps=6), regularization=regularization, **options)
    growth = engine(objective, tasks).report.growth
    expected = torch.stack([by_autograd(model, task, 6, 3.0, regularization) for task in tasks])
    assert growth.max() > 1.5
    torch.testing.assert_close(growth, expected, rtol=1e-12, atol=0)


def logistic(dtype=torch.float32):
    """With lr = 1 gradient descent is phi <- 4 phi (1 - phi), whose cotangents double with every step."""

    def loss(params, batch):
        x = params["x"] + batch.sum()
        return (4 / 3 * x**3 - 1.5 * x**2).sum()

    def outer(params, batch):
        return (params["x"] * (1 + batch)).square().sum()

    x = torch.tensor([0.3], dtype=dtype, requires_grad=True)
    zero, nan = torch.zeros(1, dtype=dtype), torch.full((1,), torch.nan, dtype=dtype)
    return (
        Objective.from_function(loss, {"x": x}, outer_loss=outer),
        Task(support=zero, query=zero),
        Task(support=zero, query=nan),
    )


def engine(steps, **options):
    return MAML(inner=GradientDescent(lr=1.0, steps=steps), **options)


def test_a_chaotic_training_is_warned_of_once_where_rounding_leaves_nothing():
    objective, task, _ = logistic()
    long = engine(24)
    with pytest.warns(PrecisionWarning, match="float32.*1 of 1 tasks.*task 0.*imaml.verify.smoothness") as caught:
        report = long(objective, [task]).report
    assert caught[0].filename == __file__ and report.growth.item() > 2**20
    assert "cotangent grown" in str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long(objective, [task])  # said once
        engine(12)(objective, [task])  # 2^12 times 6e-8
        double, task, _ = logistic(torch.float64)
        engine(24)(double, [task])  # 2^24 times 1e-16
        with torch.no_grad():
            assert engine(24)(double, [task]).report.growth is None
    with pytest.warns(PrecisionWarning):
        pickle.loads(pickle.dumps(long))(logistic()[0], [logistic()[1]])


def test_a_skipped_task_has_no_growth_and_is_not_warned_of():
    objective, task, broken = logistic(torch.float64)
    report = engine(3, on_nonfinite="skip")(objective, [broken, task]).report
    assert report.skipped == (0,) and report.growth[0].isnan() and report.growth[1] >= 1


@pytest.mark.parametrize("inner", [GradientDescent(lr=0.1, steps=0), Adam(lr=0.01, steps=2)], ids=["none", "Adam"])
def test_growth_is_at_least_1(inner):
    _, objective, tasks = problem(mlp)
    assert (MAML(inner=inner)(objective, tasks).report.growth >= 1).all()
    assert FOMAML(inner=inner)(objective, tasks).report.growth is None


def test_a_query_gradient_of_zero_grows_once():
    zero = torch.zeros(1, 1)
    objective = Objective.from_function(
        lambda p, b: p["x"].sum() * b.sum(),
        {"x": torch.ones(2, requires_grad=True)},
        outer_loss=lambda p, b: p["x"].sum() * 0,
    )
    tasks = TaskBatch(support=zero, query=zero)
    assert MAML(inner=GradientDescent(lr=0.1, steps=2))(objective, tasks).report.growth.item() == 1
