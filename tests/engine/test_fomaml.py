"""First-order MAML is the gradient of the query loss where the inner loop ends."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from imaml import FOMAML, MAML, GradientDescent, Objective, TaskBatch
from tests.engine.cases import MODELS, problem
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.2, steps=4)


@pytest.mark.parametrize("regularization", [0.0, 0.5])
@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_equals_the_query_gradient_at_phi_to_rounding(build, chunk_size, regularization):
    model, objective, tasks = problem(build)
    engine = FOMAML(inner=INNER, regularization=regularization, chunk_size=chunk_size)
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for task in tasks:
        phi = {n: p.requires_grad_() for n, p in engine.adapt(objective, task.support).items()}
        loss = F.cross_entropy(functional_call(model, phi, (task.query[0],)), task.query[1])
        for n, g in zip(phi, torch.autograd.grad(loss, list(phi.values())), strict=True):
            total[n] += g / len(tasks)
    got = engine.value_and_grad(objective, tasks)[1]
    assert relative_error(got, total) <= 1e-13


@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse", "finite-difference"])
def test_equals_maml_where_the_support_loss_has_no_curvature(hvp):
    params = {"u": torch.randn(3).double(), "w": torch.randn(2).double()}

    def loss(params, batch):
        kind, data = batch
        flat = torch.cat([params["u"], params["w"]])
        return torch.where(kind, flat @ data, (flat - data).square().sum())

    data, linear = torch.randn(4, 5).double(), torch.ones(4, dtype=torch.bool)
    tasks = TaskBatch(support=(linear, data), query=(~linear, data))
    objective = Objective.from_function(loss, params)
    first = FOMAML(inner=INNER).value_and_grad(objective, tasks)[1]
    exact = MAML(inner=INNER, hvp=hvp).value_and_grad(objective, tasks)[1]
    assert relative_error(first, exact) <= (1e-8 if hvp == "finite-difference" else 1e-14)


def test_a_loss_that_is_linear_in_all_parameters():
    """No parameter appears in any gradient: there is nothing to differentiate a second time."""
    params = {n: torch.randn(3).double().requires_grad_() for n in ("u", "w")}

    def loss(params, batch):
        return ((params["u"] + 2 * params["w"]) * batch).sum()

    tasks = TaskBatch(support=torch.randn(2, 3).double(), query=torch.randn(2, 3).double())
    for hvp in ("auto", "forward-over-reverse", "reverse-over-reverse", "finite-difference"):
        for chunk_size in (None, 1):
            engine = MAML(inner=INNER, hvp=hvp, chunk_size=chunk_size)
            result = engine(Objective.from_function(loss, params), tasks)
            assert result.report.unused == ()
            got = engine.value_and_grad(Objective.from_function(loss, params), tasks)[1]
            expected = {"u": tasks.query.mean(0), "w": 2 * tasks.query.mean(0)}
            assert relative_error(got, expected) <= 1e-7


def test_differs_from_maml_elsewhere():
    _, objective, tasks = problem()
    a, b = (s(inner=INNER).value_and_grad(objective, tasks)[1] for s in (FOMAML, MAML))
    assert relative_error(a, b) > 1e-3
