"""Hessian-vector products alone: what they return, and where finite differences look."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import Objective
from imaml._chunk import SUPPORT, ChunkLoss, Gradient
from imaml._context import Context
from imaml._hvp import FiniteDifference, ForwardOverReverse, ReverseOverReverse

F64 = torch.float64


class Cubes:
    """The loss |phi|_3^3 / 3 of every task, and the points at which its gradient was asked for."""

    def __init__(self):
        self.seen = []

    def gradient(self, phi, step, *, fixed=False, weights=None):
        self.seen.append(phi)
        each = phi.square() * weights.unsqueeze(-1)
        return Gradient(each.sum(-1), each, None)


def chunk(criterion=F.mse_loss):
    """Two tasks for a network of which the last layer adapts."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    context = Context.of(Objective(model, criterion, adapt=["2"]))
    batch = torch.randn(2, 5, 3, dtype=F64), torch.randn(2, 5, 2, dtype=F64)
    return ChunkLoss(context, batch, 2, 0, SUPPORT), context.theta.repeat(2, 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda loss, phi: ReverseOverReverse(loss, phi, 0, "keep"),
        lambda loss, phi: ReverseOverReverse(loss, phi, 0, "rebuild"),
        lambda loss, phi: ForwardOverReverse(loss, phi, 0),
        lambda loss, phi: FiniteDifference(loss, phi, 0),
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


@pytest.mark.parametrize(("dtype", "power"), [(F64, 1 / 2), (torch.float32, 1 / 3)])
def test_finite_differences_move_every_task_by_a_fraction_of_its_own_norm(dtype, power):
    loss, phi = Cubes(), torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4], [3.0, 4.0]], dtype=dtype)
    w = torch.tensor([[1.0, 0.0], [0.0, 100.0], [0.0, 0.0], [1e-9, 0.0]], dtype=dtype)
    product, _ = FiniteDifference(loss, phi, 0)(w)
    ahead, behind = ((point - phi).double() for point in loss.seen)
    moved = torch.finfo(dtype).eps ** power * torch.tensor([[6.0, 0.0], [0.0, 51.0], [0.0, 0.0], [6.0, 0.0]], dtype=F64)
    rounding = 4 * torch.finfo(dtype).eps * phi.abs().max().item()
    torch.testing.assert_close(ahead, moved, rtol=0, atol=rounding)
    torch.testing.assert_close(behind, -moved, rtol=0, atol=rounding)
    torch.testing.assert_close(product, 2 * phi * w, rtol=1e-2, atol=0)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_a_gradient_of_other_draws_is_seen_whatever_the_units_of_the_loss(monkeypatch, scale):
    loss, phi = chunk(lambda output, target: scale * F.mse_loss(output, target))
    monkeypatch.setattr(type(loss.context.replay), "draws", True)
    ForwardOverReverse(loss, phi, 0)
    right = loss.gradient(phi, 0)
    wrong = Gradient(right.losses, right.adapted * (1 + 1e-6), None)
    monkeypatch.setattr(ChunkLoss, "gradient", lambda self, phi, step: wrong)
    with pytest.raises(RuntimeError, match="another order"):
        ForwardOverReverse(loss, phi, 0)
