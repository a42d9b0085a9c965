"""What cannot be verified is said in one sentence, with the remedy."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import imaml
from imaml import MAML, GradientDescent, Objective, TaskBatch

ENGINE = MAML(inner=GradientDescent(lr=0.1, steps=2))
x, y = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 2)
TASKS = TaskBatch(support=(x[None], y[None]), query=(x[None], y[None]))


class Kept(nn.Module):
    """Cannot be copied: it keeps a tensor with a graph."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.kept = self.linear.weight * 2

    def forward(self, x):
        return self.linear(x)


def ours(objective):
    return imaml.verify.hvp(objective, None, (x, y))


def theirs(objective):
    return imaml.verify.meta_gradient(ENGINE, objective, TASKS)


both = pytest.mark.parametrize("verify", [ours, theirs], ids=["hvp", "meta_gradient"])


@both
def test_a_loss_that_differs_between_two_calls(verify):
    count = itertools.count()
    with pytest.raises(ValueError, match="not deterministic.*Draw its random numbers"):
        verify(Objective(nn.Linear(4, 2), lambda output, target: F.mse_loss(output, target) * (1 + next(count))))


@both
def test_float64_is_blamed_only_for_what_runs_without_it(verify):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        verify(Objective(nn.Linear(3, 2), F.mse_loss))
    assert "float64" not in str(raised.value)
    with pytest.raises(TypeError, match="does not run in float64"):
        verify(Objective(nn.Linear(4, 2), lambda output, target: F.mse_loss(output @ torch.eye(2), target)))


@both
def test_a_loss_that_is_not_finite(verify):
    with pytest.raises(ValueError, match="not finite.*nan"):
        verify(Objective(nn.Linear(4, 2), lambda output, target: output.mean() * float("nan")))


@both
def test_a_model_that_cannot_be_copied(verify):
    with pytest.raises(TypeError, match="Kept or its loss cannot be copied.*detach"):
        verify(Objective(Kept(), F.mse_loss))


@both
def test_running_statistics_in_training_mode(verify):
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match="running statistics"):
        verify(Objective(model, F.mse_loss))


@both
def test_a_model_in_place_of_an_objective(verify):
    with pytest.raises(TypeError, match="Expected an Objective.*Got Linear"):
        verify(nn.Linear(4, 2))


@both
def test_a_loss_that_depends_on_no_adapted_parameter(verify):
    with pytest.raises(ValueError, match="depends on no adapted parameter"):
        verify(Objective(nn.Linear(4, 2), lambda output, target: (output.detach() - target).square().mean()))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"wieght": torch.zeros(2, 4)}, ValueError, "among.*weight.*Got.*wieght"),
        ({"weight": torch.zeros(4, 2)}, ValueError, r"shape \(2, 4\). Got \(4, 2\)"),
        ({"weight": 1.0}, ValueError, "Got float"),
        ([torch.zeros(2, 4)], TypeError, "dict of tensors.*Got list"),
    ],
)
def test_wrong_params(params, error, message):
    with pytest.raises(error, match=message):
        imaml.verify.hvp(Objective(nn.Linear(4, 2), F.mse_loss), params, (x, y))


@pytest.mark.parametrize("tolerance", [0.0, -1e-5, float("nan")])
def test_a_tolerance_that_is_not_positive(tolerance):
    with pytest.raises(ValueError, match="`tolerance` must be positive"):
        imaml.verify.hvp(Objective(nn.Linear(4, 2), F.mse_loss), None, (x, y), tolerance=tolerance)


def test_a_batch_without_tensors():
    with pytest.raises(TypeError, match="must be a tensor. Got list|must be a tensor. Got float"):
        imaml.verify.hvp(Objective(nn.Linear(4, 2), F.mse_loss), None, (1.0, 2.0))


GRADIENTS = {
    "a name missing": (lambda o, t: {"weight": torch.zeros(2, 4)}, ValueError, "Missing: .'bias'"),
    "an unknown name": (
        lambda o, t: {n: torch.zeros_like(p) for n, p in o.parameters().items()} | {"more": torch.zeros(1)},
        ValueError,
        "unknown: .'more'",
    ),
    "a wrong shape": (
        lambda o, t: {"weight": torch.zeros(4, 2), "bias": torch.zeros(2)},
        ValueError,
        r"shape \(2, 4\).*Got \(4, 2\)",
    ),
    "a wrong length": (lambda o, t: torch.zeros(3), ValueError, r"must return \(10,\).*Got \(3,\)"),
    "NaN": (lambda o, t: torch.full((10,), float("nan")), ValueError, "NaN or infinite"),
    "a list": (lambda o, t: [torch.zeros(10)], TypeError, "Got list"),
    "None": (lambda o, t: None, TypeError, "Got NoneType"),
}


@pytest.mark.parametrize(("function", "error", "message"), GRADIENTS.values(), ids=GRADIENTS)
def test_what_a_function_returns(function, error, message):
    with pytest.raises(error, match=message):
        imaml.verify.meta_gradient(
            function, Objective(nn.Linear(4, 2), F.mse_loss), TASKS, against="maml", inner=ENGINE.inner
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "Pass against="),
        ({"against": "reptile", "inner": ENGINE.inner}, "must be one of.*Got 'reptile'"),
        ({"against": "maml"}, "inner=GradientDescent"),
        ({"against": "implicit", "inner": ENGINE.inner}, "regularization=lambda"),
        ({"against": "implicit", "regularization": 0.0}, "must be > 0"),
        ({"against": "maml", "inner": ENGINE.inner, "regularization": {"weight": 1.0}}, "must name"),
    ],
)
def test_a_claim_that_is_not_said(options, message):
    with pytest.raises(ValueError, match=message):
        imaml.verify.meta_gradient(
            lambda o, t: torch.zeros(10), Objective(nn.Linear(4, 2), F.mse_loss), TASKS, **options
        )


def test_no_tasks():
    with pytest.raises(ValueError, match="at least one task"):
        imaml.verify.meta_gradient(ENGINE, Objective(nn.Linear(4, 2), F.mse_loss), [])


def test_a_loss_that_reads_the_model_itself_is_refused() -> None:
    """It would read the original, and a wrong result could pass."""
    model = nn.Linear(4, 3)
    model.penalty = torch.zeros(())

    def loss(output, target):
        return F.cross_entropy(output, target) + model.penalty

    objective = Objective(model, loss)
    batch = (torch.randn(2, 5, 4), torch.randint(3, (2, 5)))
    with pytest.raises(TypeError, match="reads Linear itself"):
        imaml.verify.meta_gradient(
            MAML(inner=GradientDescent(lr=0.1, steps=1)), objective, TaskBatch(support=batch, query=batch)
        )


def test_a_loss_that_asks_the_model_for_no_tensor_is_verified() -> None:
    model = nn.Linear(4, 3)

    def loss(output, target):
        smoothing = 0.1 if model.training and model.weight.dtype is not None else 0.0
        return F.cross_entropy(output.view(-1, model.out_features), target, label_smoothing=smoothing)

    batch = (torch.randn(2, 5, 4), torch.randint(3, (2, 5)))
    engine = MAML(inner=GradientDescent(lr=0.1, steps=1))
    tasks = TaskBatch(support=batch, query=batch)
    assert imaml.verify.meta_gradient(engine, Objective(model, loss), tasks).status == "passed"
