"""Hessian-vector products alone: what they return."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._curvature import product
from imaml._curvature.derivatives import Derivatives
from imaml._curvature.exact_products import ForwardOverReverse, ReverseOverReverse
from imaml._curvature.finite_difference import FiniteDifference
from imaml._curvature.product import Graph
from tests.losses import loss_of

F64 = torch.float64
INNER = GradientDescent(lr=0.1, steps=3)


def chunk(criterion=F.mse_loss):
    """Two tasks for a network of which the last layer adapts."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    batch = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 5, 2, dtype=F64)
    return loss_of(Objective(model, criterion, adapt=["2"]), batch, tasks=2)


@pytest.mark.parametrize(
    "build",
    [
        lambda loss, phi: ReverseOverReverse(loss.whole, phi, 0, Graph.KEPT),
        lambda loss, phi: ReverseOverReverse(loss.whole, phi, 0, Graph.REBUILT),
        lambda loss, phi: ForwardOverReverse(loss.whole, phi, 0),
        lambda loss, phi: FiniteDifference(Derivatives(), loss, phi, 0),
    ],
    ids=["linearized", "rebuilt", "forward-over-reverse", "finite-difference"],
)
def test_the_mixed_product_is_computed_on_request_alone_and_nothing_carries_a_graph(build):
    product = build(*chunk())
    w = torch.randn(2, 8, dtype=F64)
    alone, nothing = product(w)
    both, mixed = product(w, mixed=True)
    assert nothing is None and mixed.shape == (12,)
    assert not (alone.requires_grad or both.requires_grad or mixed.requires_grad)
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "engine",
    [
        MAML(inner=INNER, linearize=False),
        MAML(inner=INNER, linearize=True),
        MAML(inner=INNER, microbatch_size=2),
        MAML(inner=INNER, chunk_size=1, checkpoints=0),
        ImplicitMAML(inner=INNER, linearize=False, on_failure="ignore"),
        ImplicitMAML(inner=INNER, microbatch_size=2, on_failure="ignore"),
    ],
    ids=["rebuilt", "kept", "slices", "one by one", "implicit", "implicit, slices"],
)
@pytest.mark.parametrize("dtypes", [(F64, F64), (torch.float32, F64)], ids=["one dtype", "two dtypes"])
def test_products_of_long_parameters_are_those_of_short_ones(monkeypatch, engine, dtypes):
    """Long ones let the gradient's numbers go, and are added to a flat vector as they come."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[2].to(dtypes[0])

    def of_dtypes(params, batch):
        h = (batch[0] @ params["0.weight"].T + params["0.bias"]).tanh()
        h = (h.to(params["2.weight"].dtype) @ params["2.weight"].T + params["2.bias"]).tanh()
        return F.mse_loss(h.double() @ params["4.weight"].T + params["4.bias"], batch[1])

    params = dict(model.named_parameters())
    objective = Objective.from_function(of_dtypes, params, adapt=["2.weight", "2.bias", "4.weight"])
    x, y = torch.randn(2, 3, 4, 3, dtype=F64), torch.randn(2, 3, 4, 2, dtype=F64)
    tasks = TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))
    expected = engine.value_and_grad(objective, tasks)[1]
    monkeypatch.setattr(product, "LONG", 1)
    found = engine.value_and_grad(objective, tasks)[1]
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6 if torch.float32 in dtypes else 1e-11, atol=1e-12)
