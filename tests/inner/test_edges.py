"""Inner optimisers and solvers at their edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import (
    CG,
    FOMAML,
    MAML,
    Adam,
    AdamW,
    GradientDescent,
    ImplicitMAML,
    NewtonCG,
    Objective,
    RMSprop,
    Status,
    Task,
    TaskBatch,
    TorchOptimizer,
    bilevel,
)
from tests.inner import cases, unrolled


def test_an_optimizer_that_takes_matrices_alone():
    """Muon refuses parameters of other shapes, on which it is not tried."""
    model, task = nn.Linear(3, 2, bias=False).double(), cases.make_tasks()[0]
    inner = TorchOptimizer(torch.optim.Muon, steps=3, lr=0.1)
    adapted = FOMAML(inner=inner).adapt(Objective(model, F.mse_loss), task.support)
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(model(task.support[0]), task.support[1]).backward()
        optimizer.step()
    torch.testing.assert_close(adapted["weight"], model.weight.detach())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: TorchOptimizer(list, steps=1),
            TypeError,
            r"^`optimizer` must make a torch\.optim\.Optimizer\. Got list\.$",
        ),
        (lambda: NewtonCG(steps=2, stationarity="small"), TypeError, "^`stationarity` must be a number. Got 'small'"),
        (lambda: NewtonCG(steps=2, stationarity=float("nan")), ValueError, "^`stationarity` must be finite"),
        (lambda: Adam(lr=1.0, steps=2, stationarity="a"), TypeError, "^`stationarity` must be a number. Got 'a'"),
        (lambda: Adam(lr=1.0, steps=2, betas=(0.9, "a")), TypeError, "^Each of `betas` must be a number. Got 'a'"),
        (lambda: RMSprop(lr=1.0, steps=2, alpha="a"), TypeError, "^`alpha` must be a number. Got 'a'"),
        (lambda: RMSprop(lr=1.0, steps=2, eps="a"), TypeError, "^`eps` must be a number. Got 'a'"),
        (lambda: bilevel(0.5, distance, inner=START, meta={}), TypeError, "^`inner_loss` must be callable. Got float"),
        (lambda: NewtonCG(steps=1.5), TypeError, "^`steps` must be an integer. Got 1.5"),
    ],
)
def test_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


def quadratic(params, batch):
    """With eigenvalues 1 and 10 and the minimum at the batch."""
    return (torch.tensor([1.0, 10.0], dtype=torch.float64) * (params["w"] - batch) ** 2).sum() / 2


TARGET = torch.tensor([3.0, -2.0], dtype=torch.float64)
START = {"w": torch.zeros(2, dtype=torch.float64)}


def adapt(solver, loss=quadratic, **settings):
    return FOMAML(inner=solver, **settings).adapt(Objective.from_function(loss, START), TARGET)["w"]


def test_one_newton_step_minimises_a_quadratic():
    exact = NewtonCG(steps=1, solver=CG(max_steps=2, rtol=1e-14))
    torch.testing.assert_close(adapt(exact), TARGET, rtol=1e-10, atol=0)
    curvature = torch.tensor([1.0, 10.0], dtype=torch.float64)
    with_proximal_term = curvature * TARGET / (curvature + 0.5)
    torch.testing.assert_close(adapt(exact, regularization=0.5), with_proximal_term, rtol=1e-10, atol=0)


def test_no_newton_step_leaves_the_parameters():
    assert torch.equal(adapt(NewtonCG(steps=0)), START["w"])
    assert torch.equal(adapt(NewtonCG(steps=5, stationarity=1e3)), START["w"])


def distance(params, batch):
    """Smoothed: about a far minimum a full Newton step overshoots by the square of the way."""
    return (1 + (params["w"] - batch) ** 2).sqrt().sum()


@pytest.mark.parametrize("target", [TARGET, 300 * TARGET], ids=["near", "far"])
def test_a_newton_step_is_halved_until_the_loss_decreases_enough(target):
    solver = CG(max_steps=2, rtol=1e-14)
    objective = Objective.from_function(distance, START)
    w = FOMAML(inner=NewtonCG(steps=1, solver=solver)).adapt(objective, target)["w"]
    root = (1 + target**2).sqrt()
    direction, slope = target * root**2, -target / root
    length = 1.0
    while distance({"w": length * direction}, target) > root.sum() + 1e-4 * length * (slope * direction).sum():
        length /= 2
    assert length < 1
    torch.testing.assert_close(w, length * direction, rtol=1e-8, atol=0)


def test_newton_finds_the_minimum_that_full_steps_run_away_from():
    w = adapt(NewtonCG(steps=30, solver=CG(max_steps=2, rtol=1e-14)), distance)
    torch.testing.assert_close(w, TARGET, rtol=1e-8, atol=1e-8)


def test_the_tasks_of_a_chunk_do_not_see_each_other():
    """Their losses and slopes differ by factors of a million."""

    def loss(params, batch):
        return batch[0] * (distance(params, batch[1:]) + (params["w"] - 1).square().sum() / 10)

    batch = torch.cat([torch.tensor([[1e-3], [1e3], [1.0]], dtype=torch.float64), torch.randn(3, 2).double() * 3], 1)
    objective, tasks = Objective.from_function(loss, START), TaskBatch(support=batch, query=batch)
    engine = FOMAML(inner=NewtonCG(steps=3, stationarity=1e-6))
    losses = engine(objective, tasks).report.query_loss
    for i, task in enumerate(tasks):
        torch.testing.assert_close(engine(objective, [task]).report.query_loss[0], losses[i], rtol=1e-9, atol=0)


@pytest.mark.parametrize("solver", [NewtonCG, lambda **options: GradientDescent(lr=0.1, **options)])
def test_a_task_stops_at_its_own_gradient(solver):
    """The first is stationary enough from the start, the second far from it, the third nearly so."""
    batch = torch.tensor([[0.1, 0.01], [3.0, -2.0], [0.0, 0.05]], dtype=torch.float64)
    objective, tasks = Objective.from_function(quadratic, START), TaskBatch(support=batch, query=batch)
    report = FOMAML(inner=solver(steps=400, stationarity=0.2))(objective, tasks).report
    at_start = torch.stack([quadratic(START, b) for b in batch])
    assert report.query_loss[0] == at_start[0]
    assert (report.query_loss[1:] < at_start[1:]).all()


def test_the_report_has_the_loss_before_every_newton_step():
    objective, task = Objective.from_function(distance, START), Task(support=TARGET, query=TARGET)
    report = FOMAML(inner=NewtonCG(steps=3))(objective, [task]).report
    before = [FOMAML(inner=NewtonCG(steps=k)).adapt(objective, TARGET) for k in range(3)]
    expected = torch.stack([distance(w, TARGET) for w in before])
    torch.testing.assert_close(report.support_loss[:, 0], expected, rtol=1e-12, atol=0)


def test_a_line_search_sees_the_draws_of_its_step():
    """A full step minimises the loss of one mask: an entry arrives or, where the mask is zero, stays."""

    def masked(params, batch):
        return (F.dropout(torch.ones(3, dtype=torch.float64), 0.5) * (params["w"] - batch) ** 2).sum()

    objective = Objective.from_function(masked, {"w": torch.zeros(3, dtype=torch.float64)})
    engine = FOMAML(inner=NewtonCG(steps=1, solver=CG(max_steps=5, rtol=1e-14)))
    for seed in range(20):
        torch.manual_seed(seed)
        w = engine.adapt(objective, torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))["w"]
        torch.manual_seed(seed)
        kept = F.dropout(torch.ones(3, dtype=torch.float64), 0.5) > 0
        torch.testing.assert_close(w, kept * torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64))


@pytest.mark.parametrize("settings", [{"momentum": 0.5}, {"weight_decay": 0.3}, {"momentum": 0.5, "weight_decay": 0.3}])
@pytest.mark.parametrize("kind", ["gradient descent", "rmsprop"])
def test_momentum_and_weight_decay_one_without_the_other(kind, settings):
    ours, by_hand = {"gradient descent": (GradientDescent, unrolled.sgd), "rmsprop": (RMSprop, unrolled.rmsprop)}[kind]
    model, tasks = cases.make_model(), cases.make_tasks()
    loss, update = (
        cases.plain_loss(model),
        by_hand(momentum=settings.get("momentum", 0.0), decay=settings.get("weight_decay", 0.0)),
    )
    expected = unrolled.meta_gradient(
        loss, loss, dict(model.named_parameters()), {}, tasks, update, 3, lr=lambda meta, name, k: 0.1
    )
    engine = MAML(inner=ours(lr=0.1, steps=3, **settings))
    cases.close(engine.value_and_grad(Objective(model, F.mse_loss), tasks)[1], expected)


@pytest.mark.parametrize("root", [0.0, 0.0625])
@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop])
def test_the_derivative_of_an_adaptive_step_at_a_gradient_of_zero(kind, root):
    """g / (sqrt(c g^2 + root) + eps) has the derivative 1 / (sqrt(root) + eps) at 0, whatever c."""
    start = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)}
    objective = Objective.from_function(
        lambda params, batch: ((params["w"] - batch) ** 2).sum() / 2,
        start,
        outer_loss=lambda params, batch: (params["w"] * batch).sum(),
    )
    target = start["w"].detach()
    inner = kind(lr=0.1, steps=1, eps=0.5, eps_root=root, weight_decay=0.0)
    found = MAML(inner=inner).value_and_grad(objective, [Task(support=target, query=target)])[1]["w"]
    torch.testing.assert_close(found, (1 - 0.1 / (root**0.5 + 0.5)) * target, rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk_size", [None, 1])
def test_torch_descent_is_gradient_descent_in_all_that_a_report_says(chunk_size):
    """Statistics of BatchNorm and dropout masks included; those of a chunk are drawn for all its tasks at once."""
    dropout = nn.Dropout(0.5) if chunk_size == 1 else nn.Identity()
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), dropout, nn.Linear(4, 2)).double()
    objective, tasks, reports = Objective(model, F.mse_loss, buffers="update"), cases.make_tasks(3), []
    for inner in (GradientDescent(lr=0.1, steps=4), TorchOptimizer(torch.optim.SGD, steps=4, lr=0.1)):
        torch.manual_seed(0)
        reports.append(FOMAML(inner=inner, regularization=0.2, chunk_size=chunk_size)(objective, tasks).report)
    for name in ("query_loss", "support_loss", "gradients", "buffers"):
        torch.testing.assert_close(*(getattr(report, name) for report in reports), rtol=1e-10, atol=0)


def test_a_query_loss_without_gradient_leaves_nothing_to_solve():
    """The first task's query set is fitted already; its relative residual is 0, not 0 / 0."""
    objective = Objective.from_function(quadratic, {n: t.clone().requires_grad_() for n, t in START.items()})
    support = torch.zeros(2, 2, dtype=torch.float64)
    tasks = TaskBatch(support=support, query=torch.stack([support[0], TARGET]))
    engine = ImplicitMAML(inner=GradientDescent(lr=0.05, steps=3), solver=CG(max_steps=9, rtol=1e-10))
    report = engine(objective, tasks).report
    assert report.solver_residual[0] == 0 and report.solver_residual[1] <= 1e-10
    assert report.query_loss[0] == 0 and (report.solver_status == Status.CONVERGED).all()
