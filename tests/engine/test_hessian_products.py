"""Hessian-vector products of drawn models, in every mode, against dense Hessians and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imaml import GradientDescent, Objective, Task, TaskBatch
from imaml._chunk import SUPPORT, ChunkLoss
from imaml._context import Context
from imaml._curvature import Curvature
from tests.oracles import Setting, hessian, mixed_derivatives, model_loss

EXACT = ("forward-over-reverse", "reverse-over-reverse")
NORMS = {
    "none": lambda width: nn.Identity(),
    "layer": nn.LayerNorm,
    "batch": lambda width: nn.BatchNorm1d(width, track_running_stats=False),
    "group": lambda width: nn.GroupNorm(1, width),
}
LOSSES = (F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits)
ACTIVATIONS = (nn.Tanh, nn.GELU, nn.Softplus, nn.SiLU)


@st.composite
def models(draw):
    width, layers = draw(st.integers(2, 4)), []
    fan_in = 3
    for _ in range(draw(st.integers(1, 2))):
        layers += [nn.Linear(fan_in, width), NORMS[draw(st.sampled_from(sorted(NORMS)))](width)]
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        fan_in = width
    torch.manual_seed(draw(st.integers(0, 2**20)))
    model = nn.Sequential(*layers, nn.Linear(fan_in, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))  # affine norms off their identity
    return model


def curvature(model, tasks, *, hvp, linearize, loss, adapt=None):
    """The support curvature of every task at the model's own parameters, and a vector to multiply."""
    objective = Objective(model, loss, adapt=adapt)
    context = Context.of(objective)
    phi = context.theta.repeat(len(tasks), 1)
    support = ChunkLoss(context, tasks.support, len(tasks), 0, SUPPORT)
    return Curvature(support, phi, 0, mode=hvp, linearize=linearize), phi


def draw_tasks(count):
    support = (torch.randn(count, 5, 3).double(), torch.randn(count, 5, 2).double())
    return TaskBatch(support=support, query=support)


def dense(model, task: Task, loss, adapted=None):
    theta = {n: p.detach() for n, p in model.named_parameters()}
    return Setting(model_loss(model, loss), theta, adapted or list(theta), [], 0.1, 1), theta, task.support


@settings(max_examples=8)
@given(models(), st.sampled_from(EXACT), st.booleans(), st.sampled_from([1, 2]), st.sampled_from(LOSSES))
def test_exact_modes_multiply_by_the_hessian(model, hvp, linearize, count, loss):
    tasks = draw_tasks(count)
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=loss)
    matrices = torch.stack([hessian(*dense(model, task, loss)) for task in tasks])
    w = torch.randn_like(phi)
    expected = (matrices @ w.unsqueeze(-1)).squeeze(-1)
    for _ in range(2):  # the second from what was kept
        got = h.product(w)[0]
        assert (got - expected).norm() <= 1e-11 * (1 + matrices.norm()) * w.norm()


@settings(max_examples=8)
@given(models(), st.sampled_from([*EXACT, "finite-difference"]), st.booleans(), st.sampled_from([1, 2]))
def test_symmetric_and_linear(model, hvp, linearize, count):
    h, phi = curvature(model, draw_tasks(count), hvp=hvp, linearize=linearize, loss=F.mse_loss)
    u, w = torch.randn_like(phi), torch.randn_like(phi)
    hu, hw, both = (h.product(x)[0] for x in (u, w, 2 * u - 3 * w))
    scale = (1 + hu.norm()) * (1 + hw.norm()) * w.norm()
    tolerance = 1e-5 if hvp == "finite-difference" else 1e-11
    torch.testing.assert_close((u * hw).sum(-1), (w * hu).sum(-1), rtol=0, atol=tolerance * scale.item())
    torch.testing.assert_close(both, 2 * hu - 3 * hw, rtol=0, atol=tolerance * scale.item())
    assert h.product(torch.zeros_like(w))[0].norm() <= 1e-12 * scale


@settings(max_examples=8)
@given(models(), st.sampled_from([*EXACT, "finite-difference"]), st.booleans(), st.sampled_from([1, 2]))
def test_agrees_with_central_differences_of_plain_gradients(model, hvp, linearize, count):
    tasks = draw_tasks(count)
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=F.mse_loss)
    w = torch.randn_like(phi)
    for task, vector, got in zip(tasks, w, h.product(w)[0], strict=True):
        x, y = task.support
        start = nn.utils.parameters_to_vector(model.parameters()).detach()

        def gradient(flat, x=x, y=y):
            nn.utils.vector_to_parameters(flat, model.parameters())
            grads = torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters()))
            return nn.utils.parameters_to_vector(grads)

        step = 1e-6
        expected = (gradient(start + step * vector) - gradient(start - step * vector)) / (2 * step)
        nn.utils.vector_to_parameters(start, model.parameters())
        assert (got - expected).norm() <= 1e-5 * (1 + expected.norm())


@settings(max_examples=8)
@given(models(), st.sampled_from([*EXACT, "finite-difference"]), st.booleans(), st.sampled_from([1, 2]))
def test_mixed_product_for_fixed_parameters(model, hvp, linearize, count):
    tasks, adapted = draw_tasks(count), [n for n, _ in model.named_parameters()][-2:]
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=F.mse_loss, adapt=adapted)
    w = torch.randn_like(phi)
    product, mixed = h.product(w, mixed=True)
    expected = 0
    for task, vector in zip(tasks, w, strict=True):
        blocks = mixed_derivatives(*dense(model, task, F.mse_loss, adapted))
        expected = expected + torch.cat([vector @ block for block in blocks.values()])
    tolerance = 1e-6 if hvp == "finite-difference" else 1e-11
    assert (mixed - expected).norm() <= tolerance * (1 + expected.norm()) * (1 + w.norm())
    torch.testing.assert_close(product, h.product(w)[0], rtol=1e-6, atol=1e-6)


def test_the_inner_step_size_is_no_part_of_a_product():
    assert GradientDescent(lr=0.5, steps=1).pullback(torch.tensor(2.0)) == (2.0, -1.0)


@pytest.mark.parametrize("hvp", EXACT)
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_losses_with_a_floating_target(hvp, linearize, loss):
    """Forward AD of some needs explicit zero tangents for the target."""
    model, tasks = nn.Sequential(nn.Linear(3, 2)).double(), draw_tasks(2)
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=loss)
    w = torch.randn_like(phi)
    for i, task in enumerate(tasks):
        torch.testing.assert_close(h.product(w)[0][i], hessian(*dense(model, task, loss)) @ w[i])


@pytest.mark.parametrize("hvp", [*EXACT, "finite-difference"])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_vectors_of_any_size(hvp, scale):
    """The step of a finite difference moves the parameters equally far, whatever the vector."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    h, phi = curvature(model, draw_tasks(2), hvp=hvp, linearize=False, loss=F.mse_loss)
    w = torch.randn_like(phi)
    torch.testing.assert_close(h.product(scale * w)[0] / scale, h.product(w)[0], rtol=1e-6, atol=1e-6)
