"""Hessian-vector products of drawn models, in every mode, against dense Hessians and finite differences."""

import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from imaml import GradientDescent, Objective, Task
from imaml._curvature.product import Graph
from imaml.testing import small_models, task_batches
from imaml.testing._tasks import batch_of_tasks
from tests import losses
from tests.oracles import Setting, hessian, mixed_derivatives, model_loss

EXACT = ("forward-over-reverse", "reverse-over-reverse")
LOSSES = (F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits, F.cross_entropy)
ALL_MODES = st.sampled_from([*EXACT, "finite-difference"])

values = task_batches(kind="regression")
few = settings(max_examples=8)


def curvature(model, tasks, *, hvp, linearize, loss, adapt=None):
    """The support curvature of every task at the model's own parameters, and these, `(tasks, n)`."""
    support, phi = losses.loss_of(Objective(model, loss, adapt=adapt), tasks.support, len(tasks))
    return losses.curvature(support, phi, hvp, Graph.KEPT if linearize else Graph.REBUILT), phi


def dense(model, task: Task, loss, adapted=None):
    theta = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return Setting(model_loss(model, loss), theta, adapted or list(theta), [], 0.1, 1), theta, task.support


def matrices_of(model, tasks, loss):
    return torch.stack([hessian(*dense(model, task, loss)) for task in tasks])


def random_like(x, seed=5):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


@settings(max_examples=16)
@given(small_models(), values, st.sampled_from(EXACT), st.booleans(), st.sampled_from(LOSSES))
def test_exact_modes_multiply_by_the_hessian(model, tasks, hvp, linearize, loss):
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=loss)
    matrices, w = matrices_of(model, tasks, loss), random_like(phi)
    expected = (matrices @ w.unsqueeze(-1)).squeeze(-1)
    for _ in range(2):  # the second from what was kept
        got = h.product(w)[0]
        assert (got - expected).norm() <= 1e-11 * (1 + matrices.norm()) * w.norm()


@few
@given(small_models(), task_batches(tasks=1))
def test_lanczos_finds_the_eigenvalues_of_the_dense_hessian(model, tasks):
    h, phi = curvature(model, tasks, hvp="auto", linearize=True, loss=F.cross_entropy)
    operator = scipy.sparse.linalg.LinearOperator(
        (phi.numel(),) * 2,
        matvec=lambda w: h.product(torch.from_numpy(w).view_as(phi))[0].flatten().numpy(),
        dtype=float,
    )
    found = scipy.sparse.linalg.eigsh(
        operator, k=2, which="BE", return_eigenvectors=False, v0=random_like(phi)[0].numpy()
    )
    expected = torch.linalg.eigvalsh(matrices_of(model, tasks, F.cross_entropy)[0])
    assert abs(found.min() - expected[0]) <= 1e-9 * expected.abs().max()
    assert abs(found.max() - expected[-1]) <= 1e-9 * expected.abs().max()


@few
@given(small_models(), task_batches())
def test_permuted_parameters_permute_the_product(model, tasks):
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    w = {n: random_like(p, seed) for seed, (n, p) in enumerate(params.items())}

    def product(names):
        def loss(values, batch):
            return F.cross_entropy(functional_call(model, values, (batch[0],)), batch[1])

        objective = Objective.from_function(loss, {n: params[n] for n in names})
        support, phi = losses.loss_of(objective, tasks.support, len(tasks))
        layout = support.snapshot.layout
        along = layout.flatten([w[n] for n in names]).expand_as(phi)
        return layout.named(losses.curvature(support, phi).product(along)[0])

    forward, backward = product(list(params)), product(list(params)[::-1])
    for name in params:
        torch.testing.assert_close(forward[name], backward[name], rtol=1e-9, atol=1e-12)


class SupportGradient(torch.autograd.Function):
    """The gradient of the support loss as a function of phi, with our product as its backward."""

    @staticmethod
    def forward(ctx, phi, loss):
        ctx.loss = loss
        ctx.save_for_backward(phi)
        return losses.gradient(loss, phi).adapted

    @staticmethod
    def backward(ctx, w):
        (phi,) = ctx.saved_tensors
        with torch.no_grad():
            return losses.curvature(ctx.loss, phi).product(w)[0], None


@few
@given(small_models(frozen=False), values)
def test_gradcheck_of_the_gradient_and_gradgradcheck_of_the_loss(model, tasks):
    support, phi = losses.loss_of(Objective(model, F.mse_loss), tasks.support, len(tasks))
    phi.requires_grad_()
    tolerances = {"eps": 1e-6, "atol": 1e-6, "rtol": 1e-4, "fast_mode": True}
    assert torch.autograd.gradcheck(lambda p: SupportGradient.apply(p, support), phi, **tolerances)
    assert torch.autograd.gradgradcheck(
        lambda p: support.whole.losses(support.whole.views(p), [], tasks.support, 0)[0].sum(),
        phi,
        **tolerances,
    )


@few
@given(small_models(), values, ALL_MODES, st.booleans())
def test_symmetric_and_linear(model, tasks, hvp, linearize):
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=F.mse_loss)
    u, w = random_like(phi), random_like(phi, 6)
    hu, hw, both = (h.product(x)[0] for x in (u, w, 2 * u - 3 * w))
    scale = (1 + hu.norm()) * (1 + hw.norm()) * w.norm()
    tolerance = 1e-5 if hvp == "finite-difference" else 1e-11
    torch.testing.assert_close((u * hw).sum(-1), (w * hu).sum(-1), rtol=0, atol=tolerance * scale.item())
    torch.testing.assert_close(both, 2 * hu - 3 * hw, rtol=0, atol=tolerance * scale.item())
    assert h.product(torch.zeros_like(w))[0].norm() <= 1e-12 * scale


@few
@given(small_models(), values, ALL_MODES, st.booleans())
def test_agrees_with_central_differences_of_plain_gradients(model, tasks, hvp, linearize):
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=F.mse_loss)
    w, step = random_like(phi), 1e-6
    for task, vector, got in zip(tasks, w, h.product(w)[0], strict=True):
        setting, start, support = dense(model, task, F.mse_loss)
        directions = dict(zip(start, vector.split([p.numel() for p in start.values()]), strict=True))

        def gradient(move, setting=setting, start=start, support=support, directions=directions):
            leaves = {n: (p + move * directions[n].view(p.shape)).requires_grad_() for n, p in start.items()}
            grads = torch.autograd.grad(setting.loss(leaves, support), list(leaves.values()))
            return nn.utils.parameters_to_vector(grads)

        expected = (gradient(step) - gradient(-step)) / (2 * step)
        assert (got - expected).norm() <= 1e-5 * (1 + expected.norm())


@few
@given(small_models(frozen=False), values, ALL_MODES, st.booleans())
def test_mixed_product_for_fixed_parameters(model, tasks, hvp, linearize):
    adapted = [n for n, _ in model.named_parameters()][-2:]
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=F.mse_loss, adapt=adapted)
    w = random_like(phi)
    product, mixed = h.product(w, mixed=True)
    expected = 0
    for task, vector in zip(tasks, w, strict=True):
        blocks = mixed_derivatives(*dense(model, task, F.mse_loss, adapted))
        expected = expected + torch.cat([vector @ block for block in blocks.values()])
    tolerance = 1e-6 if hvp == "finite-difference" else 1e-11
    assert (mixed - expected).norm() <= tolerance * (1 + expected.norm()) * (1 + w.norm())
    torch.testing.assert_close(product, h.product(w)[0], rtol=1e-6, atol=1e-6)


def test_the_inner_step_size_is_no_part_of_a_product():
    two = torch.tensor(2.0)
    pulled = GradientDescent(lr=0.5, steps=1).pullback((two,), two, (two,), 0, {"lr": 0.5}, frozenset())
    assert pulled == ((2.0,), -1.0, {})


@pytest.mark.parametrize("hvp", EXACT)
@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_losses_with_a_floating_target(hvp, linearize, loss):
    """Forward AD of some needs explicit zero tangents for the target."""
    model, tasks = nn.Sequential(nn.Linear(3, 2)).double(), batch_of_tasks(2, 5, 1, kind="regression")
    h, phi = curvature(model, tasks, hvp=hvp, linearize=linearize, loss=loss)
    w = random_like(phi)
    for i, task in enumerate(tasks):
        torch.testing.assert_close(h.product(w)[0][i], hessian(*dense(model, task, loss)) @ w[i])


@pytest.mark.parametrize("hvp", [*EXACT, "finite-difference"])
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_vectors_of_any_size(hvp, scale):
    """The step of a finite difference moves the parameters equally far, whatever the vector."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    h, phi = curvature(model, batch_of_tasks(2, 5, 1, kind="regression"), hvp=hvp, linearize=False, loss=F.mse_loss)
    w = random_like(phi)
    torch.testing.assert_close(h.product(scale * w)[0] / scale, h.product(w)[0], rtol=1e-6, atol=1e-6)
