"""Products by differences of gradients: where they look, how far off they are, and what they say of it."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._curvature.casts import Casts
from imaml._curvature.finite_difference import FiniteDifference
from imaml._losses.gradient import Gradient
from imaml._torch import CAST
from imaml_solvers import Status
from tests.losses import curvature, loss_of

F64, F32 = torch.float64, torch.float32
INNER = GradientDescent(lr=0.1, steps=5)


class Cubes:
    """The loss |phi|_3^3 / 3 of every task and its derivatives, the points these were asked for, what disturbs them."""

    def __init__(self, move=None, *, noise=0.0, kink=torch.inf):
        self.seen, self.noise, self.kink = [], noise, kink
        self.record = SimpleNamespace(difference_move=move, difference_error=None)

    def gradient(self, loss, phi, step, want=None):
        weights = want and want.weights
        self.seen += [phi] if weights is not None else []
        gradient = phi.square() * (1 + self.noise * torch.randn(phi.shape, dtype=phi.dtype)) + (phi > self.kink)
        each = gradient if weights is None else gradient * weights.unsqueeze(-1)
        return Gradient(each.sum(-1), each, None)


def perceptron(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(4, 40), activation(), nn.Linear(40, 40), activation(), nn.Linear(40, 5))


def classification(tasks=4):
    x, y = torch.rand(2, tasks, 20, 4), torch.randint(0, 5, (2, tasks, 20))
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


class Autocast(nn.Module):
    """A model that computes in bfloat16 by itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def meta_gradient(engine, model, tasks, dtype, adapt=None):
    """As one vector in float64, and the report."""
    model = copy.deepcopy(model).to(dtype)
    objective = Objective(model, lambda output, target: F.cross_entropy(output.to(dtype), target), adapt=adapt)
    result = engine(objective, tasks.to(dtype=dtype))
    result.loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]).double(), result.report


def test_every_task_moves_by_a_fraction_of_its_own_norm():
    phi = torch.tensor([[3.0, 4.0], [30.0, 40.0], [0.3, 0.4], [3.0, 4.0]], dtype=F64)
    w = torch.tensor([[1.0, 0.0], [0.0, 100.0], [0.0, 0.0], [1e-9, 0.0]], dtype=F64)
    loss = Cubes(move=1e-3)
    product, _ = FiniteDifference(loss, loss, phi, 0)(w)
    ahead, behind = (point - phi for point in loss.seen)
    moved = 1e-3 * torch.tensor([[6.0, 0.0], [0.0, 51.0], [0.0, 0.0], [6.0, 0.0]], dtype=F64)
    torch.testing.assert_close(ahead, moved, rtol=0, atol=1e-12)
    torch.testing.assert_close(behind, -moved, rtol=0, atol=1e-12)
    torch.testing.assert_close(product, 2 * phi * w, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [F64, F32, torch.bfloat16])
def test_the_move_is_the_shorter_of_the_first_two_that_agree_and_is_kept_for_the_call(dtype):
    loss, phi, w = Cubes(), torch.full((3, 64), 0.01, dtype=dtype), torch.ones(3, 64, dtype=dtype)
    product = FiniteDifference(loss, loss, phi, 0)
    product(w)
    assert loss.record.difference_move == torch.finfo(dtype).eps ** (1 / 3) / 8 and len(loss.seen) == 4
    product(w)
    assert len(loss.seen) == 6


@pytest.mark.parametrize("tasks", [[0], [0, 1, 2]])
def test_a_kink_near_any_task_shortens_the_move(tasks):
    loss, phi, w = Cubes(kink=0.01 + 3e-8), torch.full((3, 64), 0.005, dtype=F64), torch.ones(3, 64, dtype=F64)
    phi[tasks] = 0.01
    product, _ = FiniteDifference(loss, loss, phi, 0)(w)
    torch.testing.assert_close(product, 2 * phi * w, rtol=1e-5, atol=0)
    entry = loss.record.difference_move * (1 + phi.norm(dim=-1).max()) / 8
    assert entry < 3e-8 / 8 and loss.record.difference_error < 1e-5


def test_among_moves_that_disagree_the_call_uses_that_of_the_least_difference():
    torch.manual_seed(0)
    phi, w = torch.full((3, 64), 0.01, dtype=F64), torch.ones(3, 64, dtype=F64)
    loss = Cubes(noise=1e-5)
    product, _ = FiniteDifference(loss, loss, phi, 0)(w)
    moves = [torch.finfo(F64).eps ** (1 / 3) / 8**n for n in range(4)]
    assert loss.record.difference_move == moves[1] and 1e-3 < loss.record.difference_error < 1
    assert (product - 2 * phi * w).norm() < 0.5 * (2 * phi * w).norm()


def test_products_of_zeros_have_no_error_and_tell_nothing_of_the_next():
    loss = Cubes()
    product = FiniteDifference(loss, loss, torch.full((2, 3), 0.01, dtype=F64), 0)
    assert not product(torch.zeros(2, 3, dtype=F64))[0].any()
    assert loss.record.difference_error == 0 and loss.record.difference_move is None and len(loss.seen) == 4
    product(torch.ones(2, 3, dtype=F64))
    assert loss.record.difference_move is not None


@pytest.mark.parametrize(("activation", "least"), [(nn.Tanh, 1000), (nn.GELU, 1000), (nn.ReLU, 10)])
@pytest.mark.parametrize("seed", range(3))
def test_they_are_of_use_in_float32(activation, least, seed):
    torch.manual_seed(seed)
    model, tasks = perceptron(activation), classification()
    exact, _ = meta_gradient(MAML(inner=INNER), model, tasks, F64)
    first_order, _ = meta_gradient(FOMAML(inner=INNER), model, tasks, F64)
    found, _ = meta_gradient(MAML(inner=INNER, hvp="finite-difference"), model, tasks, F32)
    assert (found - exact).norm() < (first_order - exact).norm() / least


class Hidden(torch.autograd.Function):
    """x in float32, of which autograd saves nothing."""

    @staticmethod
    def forward(ctx, x):
        return (x.float() + 20 - 20).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        return g


@pytest.mark.parametrize("seed", range(3))
def test_the_move_suits_a_dtype_that_autograd_does_not_see(seed):
    class Layer(nn.Module):
        def forward(self, x):
            return Hidden.apply(x)

    torch.manual_seed(seed)
    tasks, model = classification(), nn.Sequential(nn.Linear(4, 40), nn.Tanh(), Layer(), nn.Linear(40, 5))
    exact, _ = meta_gradient(MAML(inner=INNER), model, tasks, F64)
    first_order, _ = meta_gradient(FOMAML(inner=INNER), model, tasks, F64)
    found, report = meta_gradient(MAML(inner=INNER, hvp="finite-difference"), model, tasks, F64)
    assert (found - exact).norm() < (first_order - exact).norm() / 100
    assert report.hvp_error < 1e-2


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("adapt", [None, ["4"]])
@pytest.mark.parametrize("seed", range(3))
def test_the_move_suits_the_dtype_that_the_loss_computes_in(adapt, inside, seed):
    torch.manual_seed(seed)
    model, tasks = perceptron(nn.Tanh), classification()
    exact, _ = meta_gradient(MAML(inner=INNER), model, tasks, F64, adapt)
    first_order, _ = meta_gradient(FOMAML(inner=INNER), model, tasks, F64, adapt)
    engine = MAML(inner=INNER, hvp="finite-difference")
    if inside:
        found, report = meta_gradient(engine, Autocast(model), tasks, F32, adapt and ["inner.4"])
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found, report = meta_gradient(engine, model, tasks, F32, adapt)
    assert (found - exact).norm() < (first_order - exact).norm() / 2
    assert 1e-3 < report.hvp_error < 0.5


def test_they_are_exact_enough_for_a_solve_in_float32():
    torch.manual_seed(0)
    inner, tasks = GradientDescent(lr=0.1, steps=100), classification()
    objective = Objective(nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 5)), F.cross_entropy)
    reports = [ImplicitMAML(inner=inner, hvp=mode)(objective, tasks).report for mode in ("finite-difference", "auto")]
    assert reports[0].solver_status.eq(Status.CONVERGED).all()
    assert reports[0].hvps <= reports[1].hvps + 4


@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_they_do_not_depend_on_the_units_of_the_query_loss(scale):
    torch.manual_seed(0)
    tasks = classification()
    model, engine = perceptron(nn.Tanh), MAML(inner=INNER, hvp="finite-difference")

    def of(factor):
        outer = lambda output, target: factor * F.cross_entropy(output, target)  # noqa: E731
        gradients = engine.value_and_grad(Objective(model, F.cross_entropy, outer_loss=outer), tasks)[1]
        return torch.cat([g.flatten() for g in gradients.values()]).double() / factor

    torch.testing.assert_close(of(scale), of(1.0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ReLU])
def test_the_error_is_bounded_by_the_estimate(activation, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), activation(), nn.Linear(20, 20), activation(), nn.Linear(20, 3)).to(dtype)
    x, y = torch.randn(2, 15, 6, dtype=dtype), torch.randn(2, 15, 3, dtype=dtype)
    found = {}
    for mode in ("finite-difference", "reverse-over-reverse"):
        loss, phi = loss_of(Objective(model, F.mse_loss), (x, y), tasks=2)
        w = torch.randn(2, phi.shape[1], dtype=dtype, generator=torch.Generator().manual_seed(1))
        found[mode] = curvature(loss, phi, mode).product(w)[0]
        found[f"{mode}, estimate"] = loss.record.difference_error
    estimate = found["finite-difference, estimate"]
    assert found["reverse-over-reverse, estimate"] is None
    error, size = found["finite-difference"] - found["reverse-over-reverse"], found["reverse-over-reverse"]
    error = (error.norm(dim=-1) / size.norm(dim=-1)).max().item()
    assert error / 2 < estimate < max(1000 * error, 1e-2)


class Force(nn.Module):
    """A model whose output is a gradient, by torch.func or by autograd."""

    def __init__(self, by_transform):
        super().__init__()
        self.energy, self.by_transform = nn.Linear(4, 5).double(), by_transform

    def forward(self, x):
        if self.by_transform:
            return torch.func.vmap(torch.func.grad(lambda x: torch.tanh(self.energy(x)).sum()))(x)
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.tanh(self.energy(x)).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("by_transform", [False, True])
def test_a_model_that_differentiates_in_its_forward_pass(by_transform, chunk_size):
    torch.manual_seed(0)
    objective = Objective(Force(by_transform), F.mse_loss)
    x, y = torch.randn(2, 3, 6, 4, dtype=F64), torch.randn(2, 3, 6, 4, dtype=F64)
    tasks = TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))
    found, exact = (
        MAML(inner=INNER, hvp=mode, chunk_size=chunk_size).value_and_grad(objective, tasks)[1]
        for mode in ("finite-difference", "reverse-over-reverse")
    )
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-7)


def test_the_report_says_what_the_estimate_is():
    torch.manual_seed(0)
    engine = MAML(inner=INNER, hvp="finite-difference")
    report = engine(Objective(perceptron(), F.cross_entropy), classification()).report
    assert f"relative error about {report.hvp_error:.1g}" in str(report)


def test_a_plain_number_that_is_cast_is_no_rounding_of_a_tensor():
    """Decompositions that torch loads for forward mode do that, in `kl_div` for one."""
    with Casts() as casts:
        assert CAST(3, dtype=F64) == 3
        assert not casts.dtypes
        torch.ones(1, requires_grad=True).to(F64)
    assert casts.dtypes == {F64}
