"""Bilevel problems without an initialisation to learn, against closed forms."""

from dataclasses import replace

import pytest
import torch

from imaml import (
    CG,
    FOMAML,
    MAML,
    Dense,
    GradientDescent,
    ImplicitMAML,
    NewtonCG,
    Objective,
    Status,
    Task,
    bilevel,
    verify,
)

EXACT = CG(max_steps=50, rtol=1e-14)
LIMIT = GradientDescent(lr=0.15, steps=3000, stationarity=1e-14)


def data(examples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=generator, dtype=torch.float64)
    return x, x @ torch.arange(4.0).double() + torch.randn(examples, generator=generator, dtype=torch.float64)


TRAIN, VALID = data(12, 0), data(9, 1)
TASKS = [Task(support=TRAIN, query=VALID)]


def ridge(inner, meta, batch):
    x, y = batch
    return ((x @ inner["w"] - y) ** 2).mean() + (meta["log_l2"].exp() * inner["w"] ** 2).sum()


def error(inner, meta, batch):
    x, y = batch
    return ((x @ inner["w"] - y) ** 2).mean()


def make(start, log_l2):
    return bilevel(ridge, error, inner={"w": start}, meta={"log_l2": log_l2})


def closed_form(log_l2):
    """d/d(log l2) of the validation error of ridge regression, through torch.linalg.solve."""
    log_l2 = log_l2.detach().clone().requires_grad_()
    x, y = TRAIN
    matrix = x.T @ x / len(x) + torch.diag(log_l2.exp().expand(4))
    w = torch.linalg.solve(matrix, x.T @ y / len(x))
    loss = error({"w": w}, {}, VALID)
    return w.detach(), loss.detach(), torch.autograd.grad(loss, log_l2)[0]


@pytest.mark.parametrize("shape", [(), (4,)])
@pytest.mark.parametrize("solver", [EXACT, Dense()])
@pytest.mark.parametrize("inner", [LIMIT, NewtonCG(steps=5, solver=EXACT)])
def test_ridge_regression(inner, solver, shape):
    log_l2 = torch.linspace(-2, 0, 4, dtype=torch.float64)[-1 if shape == () else slice(None)].requires_grad_()
    objective = make(torch.randn(4, dtype=torch.float64), log_l2)
    engine = ImplicitMAML(inner=inner, regularization=None, solver=solver)
    result = engine(objective, TASKS)
    result.loss.backward()
    w, loss, gradient = closed_form(log_l2)
    assert (engine.adapt(objective, TRAIN)["w"] - w).abs().max() < 1e-12
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert (log_l2.grad - gradient).abs().max() < 1e-12
    assert not engine.value_and_grad(objective, TASKS)[1]["w"].any()  # the minimum does not depend on the start


def test_unrolled_steps_approach_the_implicit_gradient_and_truncated_ones_too():
    log_l2 = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    objective, expected = make(torch.zeros(4, dtype=torch.float64), log_l2), closed_form(log_l2)[2]
    errors = []
    for settings in ({"truncate": 5}, {"truncate": 40}, {}):
        engine = MAML(inner=GradientDescent(lr=0.15, steps=400), **settings)
        errors.append(abs(engine.value_and_grad(objective, TASKS)[1]["log_l2"].item() - expected.item()))
    assert errors[2] < 1e-12 and errors[1] < 1e-3 * errors[0]


def test_verification_knows_bilevel_problems():
    objective = make(torch.zeros(4, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64, requires_grad=True))
    right = ImplicitMAML(inner=LIMIT, regularization=None, solver=EXACT)
    assert verify.meta_gradient(right, objective, TASKS).status == "passed"
    wrong = ImplicitMAML(inner=LIMIT, regularization=None, solver=CG(max_steps=1))
    assert verify.meta_gradient(wrong, objective, TASKS).status == "failed"


def test_the_direct_part_alone_is_first_order():
    log_l2 = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    objective = bilevel(ridge, ridge, inner={"w": torch.zeros(4).double()}, meta={"log_l2": log_l2})
    engine = FOMAML(inner=LIMIT)
    w = engine.adapt(objective, TRAIN)["w"]
    direct = log_l2.exp() * (w**2).sum()
    assert engine.value_and_grad(objective, TASKS)[1]["log_l2"].item() == pytest.approx(direct.item(), rel=1e-12)


def test_an_initialisation_that_does_not_matter_is_not_learned():
    start = {"w": torch.zeros(4, dtype=torch.float64, requires_grad=True)}
    alone = Objective.from_function(lambda params, batch: error(params, {}, batch), start)
    with pytest.raises(ValueError, match="does not depend on the initialisation.*Expected `regularization` > 0"):
        ImplicitMAML(inner=LIMIT, regularization=None)(alone, TASKS)


def test_losses_must_be_callable():
    with pytest.raises(TypeError, match="`outer_loss` must be callable. Got float"):
        bilevel(ridge, 0.5, inner={"w": torch.zeros(4)}, meta={})


def test_the_metric_is_of_the_outer_batch_alone():
    """A line search evaluates the inner loss, whose batch may be of another form."""

    def inner_loss(inner, meta, batch):
        return ridge(inner, meta, batch[0])

    log_l2 = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    start = {"w": torch.zeros(4, dtype=torch.float64)}
    problem = bilevel(
        inner_loss, error, inner=start, meta={"log_l2": log_l2}, metric=lambda inner, batch: error(inner, {}, batch)
    )
    engine = ImplicitMAML(inner=NewtonCG(steps=5, solver=EXACT), regularization=None, solver=EXACT)
    result = engine(problem, [Task(support=(TRAIN, torch.arange(12)), query=VALID)])
    assert result.report.metric.item() == pytest.approx(closed_form(log_l2)[1].item(), rel=1e-12)


def test_warm_starts_save_products_when_a_task_recurs():
    log_l2 = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    objective, other = make(torch.zeros(4, dtype=torch.float64), log_l2), [Task(support=VALID, query=TRAIN)]
    cold = ImplicitMAML(inner=LIMIT, regularization=None, solver=EXACT)
    warm = ImplicitMAML(inner=LIMIT, regularization=None, solver=EXACT, warm_start=True)
    first, unknown, second = (warm(objective, tasks).report for tasks in (TASKS, other, TASKS))
    assert first.solver_steps.item() >= 4 and unknown.solver_steps.item() >= 4
    assert second.solver_steps.item() == 0
    with torch.no_grad():
        log_l2.add_(1e-3)
    for tasks in (TASKS, [*other, *TASKS]):
        found, expected = (e.value_and_grad(objective, tasks)[1]["log_l2"] for e in (warm, cold))
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)


def test_warm_starts_need_a_solver_that_can_use_them():
    with pytest.raises(ValueError, match="warm_start=True needs a solver that can use a start, such as CG. Got Dense"):
        ImplicitMAML(inner=LIMIT, solver=Dense(), warm_start=True)


def test_failed_solves_are_not_started_from_again():
    """Without the start that they left behind, each call would be off by a larger factor than the one before."""
    matrix = torch.diag(torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64))
    objective = Objective.from_function(
        lambda params, batch: params["w"] @ matrix @ params["w"] / 2 + batch @ params["w"],
        {"w": torch.tensor([1.0, -0.5, 0.1], dtype=torch.float64, requires_grad=True)},
    )
    task = Task(support=torch.ones(3, dtype=torch.float64), query=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    settings = {"inner": GradientDescent(lr=0.01, steps=1), "regularization": 1.0, "on_failure": "ignore"}
    cold = ImplicitMAML(**settings).value_and_grad(objective, [task])[1]["w"]
    warm = ImplicitMAML(**settings, warm_start=True)
    for _ in range(3):
        assert torch.equal(warm.value_and_grad(objective, [task])[1]["w"], cold)
        assert warm(objective, [task]).report.solver_status.tolist() == [Status.BREAKDOWN]


def test_a_start_with_the_larger_residual_is_not_used():
    log_l2 = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    objective = make(torch.zeros(4, dtype=torch.float64), log_l2)
    opposite = [Task(support=TRAIN, query=(VALID[0], VALID[1] + 100.0))]  # its v is many times as large
    settings = {"inner": LIMIT, "regularization": None, "solver": CG(max_steps=2, rtol=0.0)}
    warm, cold = ImplicitMAML(**settings, warm_start=True), ImplicitMAML(**settings)
    warm(objective, opposite)
    found, expected = (engine.value_and_grad(objective, TASKS)[1]["log_l2"] for engine in (warm, cold))
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_verification_of_an_inner_loss_with_a_weight_for_each_of_its_examples():
    weights = torch.linspace(-1, 1, len(TRAIN[0]), dtype=torch.float64, requires_grad=True)

    def weighted(inner, meta, batch):
        x, y = batch
        return (meta["weights"].exp() * (x @ inner["w"] - y) ** 2).mean() + (inner["w"] ** 2).sum()

    objective = bilevel(weighted, error, inner={"w": torch.zeros(4).double()}, meta={"weights": weights})
    for engine in (MAML(inner=GradientDescent(lr=0.05, steps=4)), ImplicitMAML(inner=LIMIT, regularization=None)):
        settings = {"solver": EXACT} if isinstance(engine, ImplicitMAML) else {}
        assert verify.meta_gradient(replace(engine, **settings), objective, TASKS).status == "passed"
