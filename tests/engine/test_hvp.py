"""Hessian-vector products alone: what they return, and where finite differences look."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import CG, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._chunk import SUPPORT, ChunkLoss, Gradient
from imaml._context import Context
from imaml._curvature import Curvature
from imaml._hvp import FiniteDifference, ForwardOverReverse, ReverseOverReverse

F64 = torch.float64


class Cubes:
    """The loss |phi|_3^3 / 3 of every task, and the points at which its gradient was asked for."""

    def __init__(self):
        self.seen = []
        self.context = SimpleNamespace(hvp_error=0.0)  # known: there is no need for the estimate

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


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_the_error_of_finite_differences_is_estimated(activation, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), activation(), nn.Linear(20, 20), activation(), nn.Linear(20, 3)).to(dtype)
    x, y = torch.randn(2, 15, 6, dtype=dtype), torch.randn(2, 15, 3, dtype=dtype)
    tasks = TaskBatch(support=(x, y), query=(x, y))
    found = {}
    for mode in ("finite-difference", "reverse-over-reverse"):
        engine = ImplicitMAML(inner=GradientDescent(lr=0.05, steps=3), hvp=mode, solver=CG(max_steps=1, rtol=0.0))
        report = engine(Objective(model, F.mse_loss), tasks).report
        context = Context.of(Objective(model, F.mse_loss))
        loss = ChunkLoss(context, tasks.support, tasks=2, start=0, kind=SUPPORT)
        phi = context.theta.expand(2, -1)
        w = torch.randn(2, phi.shape[1], dtype=dtype, generator=torch.Generator().manual_seed(1))
        found[mode] = Curvature(loss, phi, 0, mode=mode, graph="rebuild").product(w)[0]
        if mode == "finite-difference":
            estimate = context.hvp_error
            assert report.hvp_error < 1 and f"relative error about {report.hvp_error:.1g}" in str(report)
        else:
            assert context.hvp_error is None and report.hvp_error is None
    error, size = found["finite-difference"] - found["reverse-over-reverse"], found["reverse-over-reverse"]
    error = (error.norm(dim=-1) / size.norm(dim=-1)).max().item()
    if error < 0.1:
        assert error / 10 < estimate < 10 * error
    else:  # kinks: the products have nothing in common with the right ones, and little with each other
        assert activation is nn.ReLU and dtype is torch.float32 and estimate > 0.1


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
