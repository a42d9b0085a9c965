"""Meta-parameters of losses and of the proximal term, and networks that produce parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Objective, TaskBatch, verify
from tests.inner import cases, unrolled
from tests.inner.cases import close

EXACT = CG(max_steps=100, rtol=1e-13)


def weighted(output, target, meta):
    """Example weights: a task's target holds the indices of its examples too."""
    values, index = target
    return (meta["weights"].sigmoid()[index].unsqueeze(-1) * (output - values) ** 2).mean()


def plain(output, target):
    return F.mse_loss(output, target[0])


def with_indices(tasks):
    def add(batch, start):
        index = torch.arange(start, start + batch[1].shape[0] * batch[1].shape[1]).view(batch[1].shape[:2])
        return batch[0], (batch[1], index)

    return TaskBatch(support=add(tasks.support, 0), query=add(tasks.query, 0))


LEARNED = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def learned(output, target, meta):
    """A loss network that scores predictions."""
    return functional_call(LEARNED, meta["loss"], (torch.cat([output, target], -1),)).square().mean()


def problems():
    tasks = cases.make_tasks()
    weights = {"weights": torch.linspace(-1, 1, 10, dtype=torch.float64, requires_grad=True)}
    network = {"loss": dict(LEARNED.named_parameters())}
    return {
        "example weights": (weighted, plain, weights, with_indices(tasks)),
        "example weights in both losses": (weighted, None, weights, with_indices(tasks)),
        "learned loss": (learned, F.mse_loss, network, tasks),
    }


@pytest.mark.parametrize("name", problems())
def test_maml_equals_an_unrolled_loop(name):
    loss, outer, meta, tasks = problems()[name]
    model = cases.make_model()

    def by_hand(criterion):
        def of(phi, flat, batch):
            groups = {"loss": {n.removeprefix("loss."): t for n, t in flat.items()}} if loss is learned else flat
            arguments = (functional_call(model, phi, (batch[0],)), batch[1])
            return criterion(*arguments, groups) if criterion in (weighted, learned) else criterion(*arguments)

        return of

    expected = unrolled.meta_gradient(
        by_hand(loss),
        by_hand(outer or loss),
        dict(model.named_parameters()),
        {f"loss.{n}": t for n, t in meta["loss"].items()} if loss is learned else meta,
        tasks,
        unrolled.adam(),
        3,
        lr=lambda meta, name, k: 0.05,
    )
    objective = Objective(model, loss, outer_loss=outer, meta=meta)
    for chunk_size in (None, 1):
        engine = MAML(inner=Adam(lr=0.05, steps=3), chunk_size=chunk_size)
        close(engine.value_and_grad(objective, tasks)[1], expected)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize("name", problems())
def test_implicit_gradients_are_finite_differences(name, curvature):
    loss, outer, meta, tasks = problems()[name]
    model = nn.Linear(3, 2).double()  # linear: the Gauss-Newton matrix of a squared error is the Hessian
    if curvature == "ggn" and loss is learned:
        pytest.skip("not convex in the output, so not the Hessian")
    objective = Objective(model, loss, outer_loss=outer, meta=meta)
    inner = GradientDescent(lr=0.3, steps=100)
    engine = ImplicitMAML(inner=inner, regularization=1.0, solver=EXACT, curvature=curvature)
    found = verify.meta_gradient(engine, objective, tasks)
    assert found.status == "passed" and found.relative_error < 1e-7


def test_gradients_arrive_in_grad_and_pass_through_to_a_network_that_produced_them():
    model, tasks = cases.make_model(), cases.make_tasks()
    base = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    objective = Objective(model, F.mse_loss, meta={"log_lr": 2 * base})
    engine = MAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=3))
    engine(objective, tasks).loss.backward()
    gradient = engine.value_and_grad(objective, tasks)[1]["log_lr"]
    assert base.grad.item() == pytest.approx(2 * gradient.item(), rel=1e-12) and base.grad != 0


def test_a_hyper_network_that_produces_the_init():
    tasks, maker = cases.make_tasks(), nn.Linear(2, 8).double()
    code = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def value(engine):
        made = maker(code)
        params = {"weight": made[:6].view(2, 3), "bias": made[6:]}
        loss = lambda params, batch: F.mse_loss(F.linear(batch[0], **params), batch[1])  # noqa: E731
        return engine(Objective.from_function(loss, params), tasks).loss

    engine = MAML(inner=Adam(lr=0.1, steps=3))
    value(engine).backward()
    direction, h = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 1e-5
    slope = (maker.weight.grad * direction).sum().item()
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            maker.weight.add_(sign * h * direction)
            ends.append(value(engine).item())
            maker.weight.sub_(sign * h * direction)
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("per_parameter", [False, True])
def test_a_learned_lambda_of_implicit_gradients(per_parameter):
    model = cases.make_model()
    names = [n for n, _ in model.named_parameters()] if per_parameter else ["all"]
    meta = {
        f"log {n}": torch.tensor(0.5 + 0.3 * i, dtype=torch.float64, requires_grad=True) for i, n in enumerate(names)
    }

    def weight(meta):
        return {n: meta[f"log {n}"].exp() for n in names} if per_parameter else meta["log all"].exp()

    engine = ImplicitMAML(inner=GradientDescent(lr=0.2, steps=200), regularization=weight, solver=EXACT)
    found = verify.meta_gradient(engine, Objective(model, F.mse_loss, meta=meta), cases.make_tasks())
    assert found.status == "passed" and found.relative_error < 1e-7


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            MAML(inner=GradientDescent(lr=0.1, steps=2)),
            "'log_lr' is zero: no derivative leads to it from a loss",
        ),
        (
            FOMAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=2)),
            "'log_lr' is zero: FOMAML differentiates the query loss alone.*use MAML|MAML",
        ),
        (
            ImplicitMAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=2)),
            "'log_lr' is zero: .*the stationary point does not depend.*MAML differentiates step sizes",
        ),
    ],
)
def test_meta_parameters_without_gradient(engine, message):
    meta = {"log_lr": torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match=message):
        engine(Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks())
    with torch.no_grad():
        engine(Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks())  # evaluates


def test_a_learned_lambda_must_be_positive():
    meta = {"a": torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)}
    engine = ImplicitMAML(inner=GradientDescent(lr=0.1, steps=2), regularization=lambda meta: meta["a"])
    with pytest.raises(ValueError, match="`regularization` must be >= 0.*Got -1.*exp"):
        engine(Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks())


@pytest.mark.parametrize(
    ("meta", "error", "message"),
    [
        ({"0.weight": torch.ones(2)}, ValueError, r"\['0.weight'\] in `meta`.*rename"),
        ({"a": 0.1}, TypeError, "'a' must be a dense floating-point tensor.*Got float"),
        ({"a": torch.ones(2, dtype=torch.long)}, TypeError, "'a' must be a dense floating-point.*Got torch.int64"),
    ],
)
def test_bad_meta_parameters(meta, error, message):
    with pytest.raises(error, match=message):
        Objective(cases.make_model(), F.mse_loss, meta=meta)


def test_outer_loss_must_be_callable():
    with pytest.raises(TypeError, match="`outer_loss` must be callable. Got str"):
        Objective(cases.make_model(), F.mse_loss, outer_loss="mse")


def test_the_users_tensors_are_not_changed():
    meta = {"log_lr": cases.random(4)}
    before = meta["log_lr"].detach().clone()
    engine = MAML(inner=GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=4))
    engine.value_and_grad(Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks())
    assert torch.equal(meta["log_lr"], before) and meta["log_lr"].grad is None
