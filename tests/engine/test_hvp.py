"""Hessian-vector products alone: what they return."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import Objective
from imaml._curvature import exact_products
from imaml._curvature.derivatives import Derivatives
from imaml._curvature.exact_products import ForwardOverReverse, Graph, ReverseOverReverse
from imaml._curvature.finite_difference import FiniteDifference
from tests.losses import loss_of

F64 = torch.float64


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


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_a_gradient_of_other_draws_is_seen_whatever_the_units_of_the_loss(monkeypatch, scale):
    loss, phi = chunk(lambda output, target: scale * F.mse_loss(output, target))
    monkeypatch.setattr(type(loss.snapshot.replay), "draws", True)
    ForwardOverReverse(loss.whole, phi, 0)
    right = exact_products.differentiate
    wrong = lambda *args: [g * (1 + 1e-6) for g in right(*args)]  # noqa: E731
    monkeypatch.setattr(exact_products, "differentiate", wrong)
    with pytest.raises(RuntimeError, match="another order"):
        ForwardOverReverse(loss.whole, phi, 0)
