"""Products by differences of gradients: where they look, how far off they are, and what they say of it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._chunk import SUPPORT, ChunkLoss, Gradient
from imaml._context import Context
from imaml._curvature import Curvature
from imaml._finite_difference import FiniteDifference

F64, F32 = torch.float64, torch.float32
INNER = GradientDescent(lr=0.1, steps=5)


class Cubes:
    """The loss |phi|_3^3 / 3 of every task, the points its gradient was asked for, and what disturbs it."""

    def __init__(self, move=None, *, noise=0.0, kink=torch.inf):
        self.seen, self.noise, self.kink = [], noise, kink
        self.context = SimpleNamespace(hvp_move=move, hvp_error=None)

    def gradient(self, phi, step, *, fixed=False, weights=None):
        self.seen.append(phi)
        gradient = phi.square() * (1 + self.noise * torch.randn(phi.shape, dtype=phi.dtype)) + (phi > self.kink)
        each = gradient * weights.unsqueeze(-1)
        return Gradient(each.sum(-1), each, None)


def perceptron(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(4, 40), activation(), nn.Linear(40, 40), activation(), nn.Linear(40, 5))


def classification(tasks=4):
    x, y = torch.rand(2, tasks, 20, 4), torch.randint(0, 5, (2, tasks, 20))
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def meta_gradient(engine, model, tasks, dtype):
    """As one vector in float64, and the report."""
    model = copy.deepcopy(model).to(dtype)
    objective = Objective(model, lambda output, target: F.cross_entropy(output.to(dtype), target))
    result = engine(objective, tasks.to(dtype=dtype))
    result.loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double(), result.report


def test_every_task_moves_by_a_fraction_of_its_own_norm():
    phi = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4], [3.0, 4.0]], dtype=F64)
    w = torch.tensor([[1.0, 0.0], [0.0, 100.0], [0.0, 0.0], [1e-9, 0.0]], dtype=F64)
    loss = Cubes(move=1e-3)
    product, _ = FiniteDifference(loss, phi, 0)(w)
    ahead, behind = (point - phi for point in loss.seen)
    moved = 1e-3 * torch.tensor([[6.0, 0.0], [0.0, 51.0], [0.0, 0.0], [6.0, 0.0]], dtype=F64)
    torch.testing.assert_close(ahead, moved, rtol=0, atol=1e-12)
    torch.testing.assert_close(behind, -moved, rtol=0, atol=1e-12)
    torch.testing.assert_close(product, 2 * phi * w, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("dtype", "move"), [(F64, 2**-26), (F32, 2**-22), (torch.bfloat16, 2**-6)])
def test_the_move_is_short_where_the_next_agrees_and_is_kept_for_the_call(dtype, move):
    loss, phi, w = Cubes(), torch.full((3, 64), 0.01, dtype=dtype), torch.ones(3, 64, dtype=dtype)
    product = FiniteDifference(loss, phi, 0)
    product(w)
    assert loss.context.hvp_move == move and len(loss.seen) == 4
    product(w)
    assert len(loss.seen) == 6


@pytest.mark.parametrize(("dtype", "noise"), [(F64, 1e-7), (F64, 1e-5), (F32, 1e-5), (F32, 1e-3)])
def test_the_move_grows_until_it_is_above_the_noise_of_the_gradient(dtype, noise):
    torch.manual_seed(0)
    loss, phi, w = Cubes(noise=noise), torch.randn(5, 200, dtype=dtype), torch.randn(5, 200, dtype=dtype)
    product, _ = FiniteDifference(loss, phi, 0)(w)
    error = ((product - 2 * phi * w).norm(dim=-1) / (2 * phi * w).norm(dim=-1)).max()
    assert error < 0.5 and error / 20 < loss.context.hvp_error < 20 * error
    shortest = FiniteDifference(Cubes(move=2 * torch.finfo(dtype).eps, noise=noise), phi, 0)(w)[0]
    assert (shortest - 2 * phi * w).norm() > 2 * (2 * phi * w).norm()


def test_a_kink_near_one_task_decides_for_none():
    loss, phi, w = Cubes(kink=0.01 + 5e-9), torch.full((3, 64), 0.005, dtype=F64), torch.ones(3, 64, dtype=F64)
    phi[0] = 0.01  # the shortest move is 2e-9 in each entry
    product, _ = FiniteDifference(loss, phi, 0)(w)
    torch.testing.assert_close(product, 2 * phi * w, rtol=1e-5, atol=0)
    assert loss.context.hvp_move == 2**-26 and loss.context.hvp_error > 0.9


def test_among_moves_that_disagree_the_call_uses_that_of_the_least_difference():
    torch.manual_seed(0)
    loss = Cubes(noise=2e-7, kink=0.01 + 5e-8)  # the shortest is noisy, and the third is beyond the kink
    FiniteDifference(loss, torch.full((3, 64), 0.01, dtype=F64), 0)(torch.ones(3, 64, dtype=F64))
    assert loss.context.hvp_move == 2**-26 and 0.05 < loss.context.hvp_error < 1


def test_a_hessian_of_zeros_has_no_error():
    loss = Cubes()
    product, _ = FiniteDifference(loss, torch.zeros(2, 3), 0)(torch.zeros(2, 3))
    assert not product.any() and loss.context.hvp_error == 0


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_of_use_in_float32(activation, seed):
    torch.manual_seed(seed)
    model, tasks = perceptron(activation), classification()
    exact, _ = meta_gradient(MAML(inner=INNER), model, tasks, F64)
    first_order, _ = meta_gradient(FOMAML(inner=INNER), model, tasks, F64)
    found, _ = meta_gradient(MAML(inner=INNER, hvp="finite-difference"), model, tasks, F32)
    assert (found - exact).norm() < (first_order - exact).norm() / 5


@pytest.mark.parametrize("seed", range(3))
def test_they_are_better_than_none_under_autocast(seed):
    torch.manual_seed(seed)
    model, tasks = perceptron(nn.Tanh), classification()
    exact, _ = meta_gradient(MAML(inner=INNER), model, tasks, F64)
    first_order, _ = meta_gradient(FOMAML(inner=INNER), model, tasks, F64)
    with torch.autocast("cpu", torch.bfloat16):
        found, report = meta_gradient(MAML(inner=INNER, hvp="finite-difference"), model, tasks, F32)
    assert (found - exact).norm() < (first_order - exact).norm() / 5
    assert 1e-3 < report.hvp_error < 0.5


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
