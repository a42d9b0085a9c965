"""Losses and models that differentiate by themselves, such as physics-informed networks and forces from an energy."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import (
    FOMAML,
    MAML,
    Dense,
    GradientDescent,
    ImplicitMAML,
    NewtonCG,
    Objective,
    TaskBatch,
    TorchOptimizer,
    verify,
)
from tests.oracles import relative_error, setting, unrolled

INNER = GradientDescent(lr=0.05, steps=2)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def tasks(number=3):
    def made(examples):
        return (torch.rand(number, examples, 2).double(), torch.rand(number, examples, 1).double())

    return TaskBatch(support=made(6), query=made(4))


def residual(params, batch):
    """u_x + u = f, with the derivative by the input inside the loss."""
    x, f = batch[0].detach().requires_grad_(), batch[1]
    u = functional_call(MODEL, params, (x,))
    slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
    return (slope[:, :1] + u - f).square().mean()


MODEL = network()


class Forces(nn.Module):
    """A model whose output is the negative gradient of an energy."""

    def __init__(self):
        super().__init__()
        self.energy = network()

    def forward(self, x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            energy = self.energy(x).sum()
            return -torch.autograd.grad(energy, x, create_graph=True)[0][:, :1]


class PlainForces(Forces):
    """The same for those who forget that gradients may be disabled around them."""

    def forward(self, x):
        x = x.detach().requires_grad_()
        return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0][:, :1]


def physics():
    return Objective.from_function(residual, dict(MODEL.named_parameters()))


PROBLEMS = {
    "loss": physics,
    "model": lambda: Objective(PlainForces(), F.mse_loss),
    "careful model": lambda: Objective(Forces(), F.mse_loss),
}
each_problem = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS)


def expected(objective, batch):
    def loss(values, one):
        return objective.evaluate(values, one)[0]

    made = setting(MAML(inner=INNER), batch, loss, objective.parameters(), objective.adapted)
    return unrolled(made)


WAYS = {
    "vectorised": {},
    "one by one": {"chunk_size": 1},
    "slices": {"microbatch_size": 2},
    "checkpoints": {"checkpoints": 0},
    "skip": {"on_nonfinite": "skip"},
}


@each_problem
@pytest.mark.parametrize("way", WAYS)
def test_the_exact_meta_gradient(make, way):
    objective, batch = make(), tasks()
    loss, gradients = MAML(inner=INNER, **WAYS[way]).value_and_grad(objective, batch)
    value, right = expected(objective, batch)
    torch.testing.assert_close(loss, value)
    assert relative_error(gradients, right) <= 1e-10


@pytest.mark.parametrize("make", [physics, PROBLEMS["model"]], ids=["loss", "model"])
def test_compiled_or_not(make, recwarn):
    objective, batch = make(), tasks()
    _, gradients = MAML(inner=INNER, compile=True, chunk_size=1).value_and_grad(objective, batch)
    assert relative_error(gradients, expected(objective, batch)[1]) <= 1e-8
    recwarn.clear()  # whether it can be compiled is torch's to say


@each_problem
@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_an_evaluation_without_gradients(make, microbatch_size):
    objective, batch = make(), tasks()
    engine = MAML(inner=INNER, microbatch_size=microbatch_size)
    with torch.no_grad():
        result = engine(objective, batch)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, engine(objective, batch).loss.detach())
    adapted = engine.adapt(objective, tuple(t[0] for t in batch.support))
    assert all(not t.requires_grad for t in adapted.values())


@each_problem
@pytest.mark.parametrize(
    "inner", [NewtonCG(steps=4), TorchOptimizer(torch.optim.LBFGS, steps=3)], ids=["newton", "lbfgs"]
)
def test_inner_solvers_that_evaluate_the_loss(make, inner):
    objective, batch = make(), tasks()
    engine = ImplicitMAML(inner=inner, regularization=5.0)
    assert engine(objective, batch).report.stationarity.max() < 1e-3
    assert FOMAML(inner=inner)(objective, batch).loss.isfinite()


@each_problem
def test_verification_and_forecast(make):
    objective, batch = make(), tasks(2)
    assert verify.meta_gradient(MAML(inner=INNER), objective, batch).status == "passed"
    implicit = ImplicitMAML(inner=NewtonCG(steps=20), regularization=5.0, solver=Dense())
    assert verify.meta_gradient(implicit, objective, batch).status == "passed"
    assert verify.hvp(objective, None, tuple(t[0] for t in batch.support)).status == "passed"
    assert MAML(inner=INNER).plan(objective, batch).settings


def test_running_statistics_of_a_model_that_differentiates():
    class Normalised(PlainForces):
        def __init__(self):
            super().__init__()
            self.energy.insert(1, nn.BatchNorm1d(5).double())

    objective = Objective(Normalised(), F.mse_loss, buffers="update")
    report = MAML(inner=INNER)(objective, tasks()).report
    assert report.buffers["energy.1.running_mean"].abs().max() > 0


def test_a_loss_that_fails_raises_its_own_error_without_gradients_too():
    def broken(output, target):
        raise RuntimeError("of the user's own")

    with torch.no_grad(), pytest.raises(RuntimeError, match="of the user's own"):
        MAML(inner=GradientDescent(lr=0.1, steps=0))(Objective(network(), broken), tasks())


class Cam(nn.Module):
    """Weighs the features of a body by the slope of its head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(2, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x):
        features = torch.tanh(self.body(x))
        slope = torch.autograd.grad(self.head(features).square().sum(), features, create_graph=True)[0]
        return self.head(features * slope)


def by_parameters(params, batch):
    """A gradient penalty."""
    value = F.mse_loss(functional_call(MODEL, params, (batch[0],)), batch[1])
    slopes = torch.autograd.grad(value, list(params.values()), create_graph=True)
    return value + 0.1 * sum(slope.square().sum() for slope in slopes)


def in_place(params, batch):
    """Lets the batch itself require grad, as is often written."""
    x, f = batch
    u = functional_call(MODEL, params, (x.requires_grad_(True),))
    return (torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, :1] + u - f).square().mean()


def by_meta():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(output, target, meta):
        value = (meta["weight"] * (output - target).square()).mean()
        return value + torch.autograd.grad(value, meta["weight"], create_graph=True)[0].square()

    return Objective(network(), loss, meta={"weight": weight})


OTHERS = {
    "features of a body that does not adapt": lambda: Objective(Cam(), F.mse_loss, adapt=["head"]),
    "parameters": lambda: Objective.from_function(by_parameters, dict(MODEL.named_parameters())),
    "the batch itself": lambda: Objective.from_function(in_place, dict(MODEL.named_parameters())),
    "meta-parameters": by_meta,
}


@pytest.mark.parametrize("by", OTHERS)
def test_derivatives_by_whatever_requires_grad(by):
    """A loss is a function of its arguments: in one graph of all steps it would see how phi came from the data too."""
    objective, batch = OTHERS[by](), tasks()
    value, right = MAML(inner=INNER).value_and_grad(objective, batch)
    assert verify.meta_gradient(MAML(inner=INNER), objective, batch).status == "passed"
    for way in WAYS.values():
        if by in ("parameters", "meta-parameters") and "microbatch_size" in way:
            continue  # no mean over examples
        loss, gradients = MAML(inner=INNER, **way).value_and_grad(objective, batch)
        torch.testing.assert_close(loss, value)
        assert relative_error(gradients, right) <= 1e-10
    with torch.no_grad():
        torch.testing.assert_close(MAML(inner=INNER)(objective, batch).loss, value)
    for engine in (FOMAML(inner=INNER), ImplicitMAML(inner=NewtonCG(steps=2), regularization=5.0)):
        assert engine(objective, batch).loss.isfinite()
    assert MAML(inner=INNER).adapt(objective, tuple(t[0] for t in batch.support)).keys() == set(objective.adapted)
    assert not any(t.requires_grad for t in (*batch.support, *batch.query))
