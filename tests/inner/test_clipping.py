"""Gradients clipped by their global norm: forward like torch, backward like an unrolled loop."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import FOMAML, MAML, Adam, AdamW, GradientDescent, Objective, RMSprop, Task, verify
from imaml.inner import _base
from imaml.inner._clipping import clipped, pull_back_clipping
from tests.inner import cases, unrolled
from tests.inner.cases import STEPS, close

OPTIMIZERS = {
    "gradient descent": (GradientDescent, torch.optim.SGD, {}, unrolled.sgd()),
    "nesterov": (
        GradientDescent,
        torch.optim.SGD,
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
        unrolled.sgd(0.8, True, 0.1),
    ),
    "adam": (Adam, torch.optim.Adam, {"eps": 1e-3}, unrolled.adam(eps=1e-3)),
    "rmsprop": (RMSprop, torch.optim.RMSprop, {"eps": 1e-3}, unrolled.rmsprop(eps=1e-3)),
}
# name: the meta-parameters, the library's largest norm, and the same by hand
NORMS = {
    "always": ({}, 0.05, lambda meta, k: 0.05),
    "never": ({}, 100.0, lambda meta, k: 100.0),
    "at some steps": ({}, [0.05, 100.0, 0.05, 0.1], lambda meta, k: [0.05, 100.0, 0.05, 0.1][k]),
    "learned": (
        {"log_norm": cases.random()},
        lambda meta: meta["log_norm"].exp(),
        lambda meta, k: meta["log_norm"].exp(),
    ),
    "a learned schedule": (
        {"log_norm": cases.random()},
        lambda meta, step: meta["log_norm"].exp() * (1 + step),
        lambda meta, k: meta["log_norm"].exp() * (1 + k),
    ),
}


def by_hand(most):
    def prepare(grads, meta, k):
        norm = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
        coefficient = (most(meta, k) / (norm + 1e-6)).clamp(max=1.0)
        return {n: coefficient * g for n, g in grads.items()}

    return prepare


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_torch(name):
    ours, torchs, options, _ = OPTIMIZERS[name]
    model, task = cases.make_model(), cases.make_tasks()[0]
    inner = ours(lr=0.05, steps=7, max_grad_norm=0.6, **options)
    adapted = FOMAML(inner=inner).adapt(Objective(model, F.mse_loss), task.support)
    optimizer, norms = torchs(model.parameters(), lr=0.05, **options), []
    for _ in range(7):
        optimizer.zero_grad()
        F.mse_loss(model(task.support[0]), task.support[1]).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.6).item())
        optimizer.step()
    assert max(norms) > 0.6
    for key, parameter in model.named_parameters():
        assert (adapted[key] - parameter).abs().max() <= 1e-12


@pytest.mark.parametrize("block", [None, 4], ids=["whole", "in blocks"])
@pytest.mark.parametrize("settings", [{}, {"checkpoints": 1, "chunk_size": 1}, {"linearize": True}])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_are_those_of_an_unrolled_loop(name, norm, settings, block, monkeypatch):
    if block:
        monkeypatch.setattr(_base, "BLOCK", block)
    kind, _, options, update = OPTIMIZERS[name]
    norms, most, most_by_hand = NORMS[norm]
    model, tasks = cases.make_model(), cases.make_tasks()
    meta = norms | {"log_lr": cases.random()}
    inner = kind(lr=lambda meta: meta["log_lr"].exp(), steps=STEPS, max_grad_norm=most, **options)
    got = MAML(inner=inner, **settings).value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1]
    loss, rates = cases.plain_loss(model), lambda meta, name, k: meta["log_lr"].exp()
    expected = unrolled.meta_gradient(
        loss, loss, dict(model.named_parameters()), meta, tasks, update, STEPS, lr=rates, prepare=by_hand(most_by_hand)
    )
    close(got, expected)


@pytest.mark.parametrize("settings", [{"linearize": False}, {"linearize": True}])
def test_a_clipped_step_of_gradient_descent_is_no_linear_one(settings):
    model, tasks, most = cases.make_model(), cases.make_tasks(), NORMS["always"][2]
    loss, theta = cases.plain_loss(model), dict(model.named_parameters())
    expected = unrolled.meta_gradient(
        loss, loss, theta, {}, tasks, unrolled.sgd(), 3, lr=lambda meta, name, k: 0.1, prepare=by_hand(most)
    )
    engine = MAML(inner=GradientDescent(lr=0.1, steps=3, max_grad_norm=0.05), **settings)
    close(engine.value_and_grad(Objective(model, F.mse_loss), tasks)[1], expected)


def test_meta_gradients_are_finite_differences():
    meta = {"log_norm": cases.random()}
    inner = AdamW(lr=0.05, steps=STEPS, max_grad_norm=lambda meta: meta["log_norm"].exp())
    objective = Objective(cases.make_model(), F.mse_loss, meta=meta)
    found = verify.meta_gradient(MAML(inner=inner, regularization=0.1), objective, cases.make_tasks())
    assert found.status == "passed" and found.relative_error <= max(1e-8, 3 * found.resolution)


def test_the_derivative_is_that_of_autograd_row_by_row():
    torch.manual_seed(0)
    gradient, cotangent = torch.randn(2, 4, 6, dtype=torch.float64)
    gradient[0] *= 10
    gradient[1] = 0
    points = gradient.clone().requires_grad_(), torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(clipped(*points), points, cotangent)
    by_gradient, by_most = pull_back_clipping(gradient, points[1].detach(), cotangent)
    torch.testing.assert_close(by_gradient, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(by_most.sum_to_size(1), expected[1], rtol=1e-12, atol=1e-14)


def test_derivatives_are_finite_at_zero_gradients():
    start = {"w": torch.tensor([1.0, -2.0], requires_grad=True)}
    objective = Objective.from_function(
        lambda params, batch: ((params["w"] - batch) ** 2).sum() / 2,
        start,
        outer_loss=lambda params, batch: (params["w"] * batch).sum(),
    )
    target = start["w"].detach()
    for most in (1e-9, 1.0):
        inner = GradientDescent(lr=0.1, steps=2, max_grad_norm=most)
        found = MAML(inner=inner).value_and_grad(objective, [Task(support=target, query=target)])[1]["w"]
        c = min(1.0, most / 1e-6)
        torch.testing.assert_close(found, (1 - 0.1 * c) ** 2 * target)


@pytest.mark.parametrize(
    ("most", "error", "message"),
    [
        (0.0, ValueError, "`max_grad_norm` must be positive. Got 0.0"),
        ("a", TypeError, "`max_grad_norm` must be a number. Got 'a'"),
        ({"0.weight": 1.0}, TypeError, r"`max_grad_norm` is one for all parameters.*Got one by name, \['0.weight'\]"),
    ],
)
def test_configuration(most, error, message):
    with pytest.raises(error, match=message):
        GradientDescent(lr=0.1, steps=2, max_grad_norm=most)


def test_a_function_that_returns_one_norm_an_entry_is_refused():
    model = cases.make_model()
    inner = GradientDescent(lr=0.1, steps=2, max_grad_norm=lambda meta: {n: 1.0 for n, _ in model.named_parameters()})
    with pytest.raises(ValueError, match="`max_grad_norm` is one for all parameters.*Got 26 from its function"):
        FOMAML(inner=inner)(Objective(model, F.mse_loss), cases.make_tasks())
