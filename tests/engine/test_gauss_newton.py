"""ImplicitMAML with the Gauss-Newton matrix in place of the Hessian."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import CG, FOMAML, Dense, GradientDescent, ImplicitMAML, Objective, Status
from tests.engine.cases import CLASSES, classification, conv, mlp, oracle_setting, problem, transformer
from tests.oracles import hessian, implicit, relative_error, setting

SHORT = GradientDescent(lr=0.2, steps=3)
TIGHT = CG(max_steps=500, rtol=1e-12)


def engine(**settings):
    return ImplicitMAML(**{"inner": SHORT, "regularization": 0.5, "solver": TIGHT, "curvature": "ggn"} | settings)


def gauss_newton(model, loss):
    """J' (d2 L / dz2) J, by a dense Jacobian of the flat output and a dense Hessian of the loss by it."""

    def matrix(s, values, batch):
        sizes = [values[n].numel() for n in s.adapted]

        def outputs(flat):
            parts = zip(s.adapted, flat.split(sizes), strict=True)
            return functional_call(model, values | {n: p.view_as(values[n]) for n, p in parts}, batch[0])

        start = torch.cat([values[n].flatten() for n in s.adapted])
        z = outputs(start).detach()
        j = torch.autograd.functional.jacobian(outputs, start).reshape(z.numel(), -1)
        h = torch.autograd.functional.hessian(lambda flat: loss(flat.view_as(z), batch[1]), z.flatten())
        return j.T @ h @ j

    return matrix


@pytest.mark.parametrize("build", [mlp, conv, transformer], ids=lambda f: f.__name__)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_it_equals_the_dense_solution(build, chunk_size):
    adapt = {mlp: None, conv: ["7", "10"], transformer: ["layer.linear1", "head"]}[build]
    model, objective, tasks = problem(build, adapt=adapt, tasks=2)
    expected = implicit(oracle_setting(engine(), model, objective, tasks), gauss_newton(model, F.cross_entropy))[1]
    assert relative_error(engine(chunk_size=chunk_size).value_and_grad(objective, tasks)[1], expected) <= 1e-9
    assert relative_error(implicit(oracle_setting(engine(), model, objective, tasks))[1], expected) > 1e-3


def test_it_is_exact_where_the_output_is_linear_in_what_adapts():
    """The head of a network, with a body that is meta-learned through it."""
    model, objective, tasks = problem(mlp, adapt=["2"])
    expected = implicit(oracle_setting(engine(), model, objective, tasks))[1]
    assert relative_error(engine().value_and_grad(objective, tasks)[1], expected) <= 1e-10


def test_cg_converges_where_the_hessian_is_indefinite():
    model, objective, tasks = problem(mlp, tasks=1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    settings = {"regularization": 0.02, "inner": GradientDescent(lr=0.01, steps=1)}
    s = oracle_setting(engine(**settings), model, objective, tasks)
    assert torch.linalg.eigvalsh(hessian(s, s.theta, s.tasks[0][0])).min() < -0.02
    report = engine(**settings)(objective, tasks).report
    assert (report.solver_status == Status.CONVERGED).all()
    plain = engine(**settings, curvature="hessian", on_failure="ignore")(objective, tasks).report
    assert (plain.solver_status == Status.BREAKDOWN).all()


class Pair(nn.Module):
    """Two outputs, and one that depends on no parameter."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 5), nn.Linear(5, CLASSES), nn.Linear(5, 1)

    def forward(self, x):
        hidden = self.body(x).tanh()
        return {"one": self.one(hidden), "two": self.two(hidden), "unused": x}


def test_an_output_of_several_tensors():
    model, tasks = Pair().double(), classification((4,), tasks=2)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES + 1)).double()
    with torch.no_grad():
        for a, b in ((plain[0].weight, model.body.weight), (plain[0].bias, model.body.bias)):
            a.copy_(b)
        plain[2].weight.copy_(torch.cat([model.one.weight, model.two.weight]))
        plain[2].bias.copy_(torch.cat([model.one.bias, model.two.bias]))

    def loss(one, two, target):
        return F.cross_entropy(one, target) + (two**2).mean()

    got = engine().value_and_grad(Objective(model, lambda out, y: loss(out["one"], out["two"], y)), tasks)[1]
    joined = Objective(plain, lambda out, y: loss(out[..., :CLASSES], out[..., CLASSES:], y))
    expected = engine().value_and_grad(joined, tasks)[1]
    torch.testing.assert_close(got["body.weight"], expected["0.weight"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(torch.cat([got["one.weight"], got["two.weight"]]), expected["2.weight"])


class Branches(nn.Module):
    """Has a second output, from a layer of its own, and a layer that no output depends on."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.other, self.idle = (nn.Linear(4, n) for n in (4, CLASSES, 2, 2))

    def forward(self, x):
        hidden = self.body(x).tanh()
        return self.head(hidden), self.other(hidden)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_an_output_that_the_loss_ignores_and_a_parameter_without_use(chunk_size):
    """The output is linear in what adapts, so G is the Hessian."""
    model, tasks = Branches().double(), classification((4,), tasks=2)
    objective = Objective(model, lambda out, y: F.cross_entropy(out[0], y), adapt=["idle", "head", "other"])
    engine_ = engine(chunk_size=chunk_size)
    s = setting(
        engine_,
        tasks,
        lambda p, batch: F.cross_entropy(functional_call(model, p, (batch[0],))[0], batch[1]),
        dict(model.named_parameters()),
        objective.adapted,
    )
    got = engine_.value_and_grad(objective, tasks)[1]
    assert relative_error(got, implicit(s)[1]) <= 1e-10
    assert not any(got[n].any() for n in ("idle.weight", "idle.bias", "other.weight", "other.bias"))


def test_a_loss_that_is_linear_in_the_output_has_no_curvature():
    """G is zero, and the meta-gradient that of the query loss."""
    model, _, tasks = problem(mlp)
    objective = Objective(model, lambda z, y: (z * F.one_hot(y, CLASSES)).mean())
    gradients = engine().value_and_grad(objective, tasks)[1]
    assert relative_error(gradients, FOMAML(inner=SHORT, regularization=0.5).value_and_grad(objective, tasks)[1]) == 0


def test_dropout_is_the_same_in_every_product():
    """Else the system would not be symmetric, and the two solvers would not agree."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES)).double()
    tasks, found = classification((4,), tasks=2), []
    for solver in (TIGHT, Dense()):
        torch.manual_seed(3)
        found.append(engine(solver=solver).value_and_grad(Objective(net, F.cross_entropy), tasks)[1])
    assert relative_error(*found) <= 1e-9


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_dropout_is_that_of_the_hessian(chunk_size):
    """G is the Hessian where the head alone adapts: both see the same masks, in the mixed product too."""
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES)).double()
    objective, tasks, found = Objective(net, F.cross_entropy, adapt=["3"]), classification((4,), tasks=2), []
    for curvature in ("ggn", "hessian"):
        torch.manual_seed(3)
        found.append(engine(curvature=curvature, chunk_size=chunk_size).value_and_grad(objective, tasks)[1])
    assert relative_error(*found) <= 1e-10


def test_the_report_says_it():
    _, objective, tasks = problem(mlp)
    report = engine(inner=GradientDescent(lr=0.1, steps=4), solver=CG(max_steps=2, rtol=0.0))(objective, tasks).report
    assert report.hvp_mode == "gauss-newton" and report.error_bound is None
    assert report.hvps == 3 * 2 and report.gradients == 3 * (4 + 1 + 1)


@pytest.mark.parametrize(
    ("hvp", "exact"), [("auto", True), ("forward-over-reverse", True), ("finite-difference", False)]
)
def test_the_derivative_of_what_does_not_adapt_has_the_mode_of_hvp(hvp, exact):
    model, objective, tasks = problem(mlp, adapt=["2"])
    result = engine(hvp=hvp)(objective, tasks)
    result.loss.backward()
    expected = implicit(oracle_setting(engine(), model, objective, tasks))[1]
    assert relative_error({n: p.grad for n, p in model.named_parameters()}, expected) <= (1e-10 if exact else 1e-6)
    assert (result.report.hvp_error is None) == exact


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


class Doubled(nn.Module):
    def forward(self, x):
        return Once.apply(x)


def test_an_operation_without_second_derivative_is_an_error():
    net = nn.Sequential(nn.Linear(4, 5), Doubled(), nn.Linear(5, CLASSES)).double()
    with pytest.raises(RuntimeError, match="curvature='ggn' differ.*Use chunk_size=1 .* or curvature='hessian'"):
        engine(chunk_size=1)(Objective(net, F.cross_entropy), classification((4,)))


def test_a_function_has_no_output():
    model, _, tasks = problem(mlp)
    objective = Objective.from_function(
        lambda p, batch: F.cross_entropy(functional_call(model, p, batch[0]), batch[1]), dict(model.named_parameters())
    )
    with pytest.raises(ValueError, match=r"Expected Objective\(model, loss\)"):
        engine()(objective, tasks)


def test_unknown_curvature():
    with pytest.raises(ValueError, match="`curvature` must be 'hessian' or 'ggn'. Got 'fisher'"):
        engine(curvature="fisher")


class Decorated(nn.Module):
    """Its output holds more than tensors."""

    def __init__(self, decorate):
        super().__init__()
        self.net, self.decorate = mlp(), decorate

    def forward(self, x):
        return self.decorate(self.net(x), x)


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize(
    "decorate",
    [
        lambda z, x: (None, 1, z, "name"),
        lambda z, x: ("name", True, z, None) if bool(x.sum() > 0) else (None, 1.5, z, "name"),
    ],
    ids=["vectorised", "one by one"],
)
def test_what_is_no_tensor_in_an_output_reaches_the_loss(decorate, chunk_size):
    model, tasks = Decorated(decorate), classification((4,))

    def loss(out, y):
        scale = 3 if out[0] == "name" else 1
        return scale * F.cross_entropy(out[2], y)

    found = [engine(chunk_size=size).value_and_grad(Objective(model, loss), tasks)[1] for size in (chunk_size, 1)]
    assert relative_error(*found) <= 1e-10


@dataclass
class Output:
    """No node of a pytree."""

    logits: torch.Tensor


def test_tensors_that_an_output_hides_are_refused():
    objective = Objective(Decorated(lambda z, x: (z, Output(z))), lambda out, y: F.cross_entropy(out[1].logits, y))
    with pytest.raises(TypeError, match="Got Output: return its tensors in a tuple"):
        engine()(objective, classification((4,)))
