"""Inner solvers that only find the adapted parameters: any of them leads to the same implicit meta-gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, NewtonCG, Objective, Task, TorchOptimizer, verify
from tests.inner import cases

EXACT = CG(max_steps=100, rtol=1e-13)
LBFGS = TorchOptimizer(
    torch.optim.LBFGS, steps=8, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
)
SOLVERS = {
    "newton-cg": NewtonCG(steps=20, solver=CG(max_steps=40, rtol=1e-6), stationarity=1e-12),
    "newton-cg, rough": NewtonCG(steps=60, solver=CG(max_steps=3), stationarity=1e-11),
    "lbfgs": LBFGS,
    "adam": TorchOptimizer(torch.optim.Adam, steps=500, lr=0.03),
    "gradient descent": GradientDescent(lr=0.25, steps=150),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_implicit_gradients_depend_on_the_stationary_point_alone(name):
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks(3)
    engines = [ImplicitMAML(inner=SOLVERS[name], regularization=2.0, solver=EXACT, chunk_size=n) for n in (None, 2)]
    found = verify.meta_gradient(engines[0], objective, tasks)
    assert found.status == "passed" and found.relative_error < 1e-6
    assert engines[0](objective, tasks).report.stationarity.max() < 1e-6
    whole, in_chunks = (engine.value_and_grad(objective, tasks)[1] for engine in engines)
    cases.close(in_chunks, whole, rtol=1e-7)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.LBFGS, {"lr": 0.5, "max_iter": 3}),
        (torch.optim.Adafactor, {"lr": 0.1}),  # depends on the shapes of the parameters
        (torch.optim.Rprop, {"lr": 0.01}),
    ],
)
def test_torch_optimizers_run_as_in_torch(optimizer, options):
    model, tasks = cases.make_model(), cases.make_tasks()
    engine = FOMAML(inner=TorchOptimizer(optimizer, steps=4, **options), regularization=0.3)
    report = engine(Objective(model, F.mse_loss), tasks).report
    for i, (x, y) in enumerate(task.support for task in tasks):
        copy = cases.make_model()
        theta = [p.detach().clone() for p in copy.parameters()]
        made, losses = optimizer(copy.parameters(), **options), []

        def closure(copy=copy, theta=theta, x=x, y=y, made=made, losses=losses):
            made.zero_grad()
            loss = F.mse_loss(copy(x), y)
            losses.append(loss.item())
            loss = loss + 0.15 * sum((p - t).square().sum() for p, t in zip(copy.parameters(), theta, strict=True))
            loss.backward()
            return loss

        starts = []
        for _ in range(4):
            starts.append(len(losses))
            made.step(closure)
        adapted = engine.adapt(Objective(model, F.mse_loss), (x, y))
        for name, parameter in copy.named_parameters():
            assert torch.allclose(adapted[name], parameter, rtol=1e-10, atol=1e-12)
        assert report.support_loss[:, i].tolist() == pytest.approx([losses[k] for k in starts], rel=1e-10)
        query = F.mse_loss(copy(tasks[i].query[0]), tasks[i].query[1])
        assert report.query_loss[i].item() == pytest.approx(query.item(), rel=1e-10)


def test_newton_descends_where_the_hessian_is_indefinite():
    objective = Objective.from_function(
        lambda params, batch: (params["w"].pow(4) / 4 - params["w"].pow(2) / 2 + batch * params["w"]).sum(),
        {"w": torch.tensor([0.01, -0.02, 0.6], dtype=torch.float64)},
    )
    slopes = torch.zeros(2, 3, dtype=torch.float64)
    slopes[1] = 0.1
    engine = FOMAML(inner=NewtonCG(steps=50, stationarity=1e-10))
    report = engine(objective, [Task(support=slope, query=slope) for slope in slopes]).report
    for slope in slopes:
        w = engine.adapt(objective, slope)["w"]
        assert (w**3 - w + slope).abs().max() <= 1e-10 and (3 * w**2 > 1).all()  # minima, not the maximum nearby
    assert int(report.support_loss.isfinite().sum(0).min()) < 30


def test_newton_stops_each_task_by_itself_at_rounding():
    engine = ImplicitMAML(inner=NewtonCG(steps=40, solver=CG(max_steps=40, rtol=1e-3)), regularization=1.0)
    report = engine(Objective(cases.make_model(), F.mse_loss), cases.make_tasks(3)).report
    assert report.stationarity.max() < 1e-9
    assert report.support_loss.isnan().any()  # no step decreased the objective any more


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TorchOptimizer(torch.optim.SGD, steps=-1, lr=0.1), ValueError, "`steps` must be >= 0. Got -1"),
        (lambda: TorchOptimizer(torch.optim.SGD, steps=1, rate=0.1), TypeError, "rate"),
        (lambda: TorchOptimizer(torch.optim.SGD, steps=1, lr=-0.1), ValueError, "Invalid learning rate"),
        (lambda: TorchOptimizer("adam", steps=1), TypeError, "`optimizer` must be a class.*Got 'adam'"),
        (lambda: NewtonCG(steps=2, solver="cg"), TypeError, "`solver` must be a LinearSolver.*Got 'cg'"),
        (lambda: NewtonCG(steps=2, stationarity=-1.0), ValueError, "`stationarity` must be >= 0"),
        (lambda: NewtonCG(steps=2, hvp="exact"), ValueError, "`hvp` must be one of"),
        (lambda: MAML(inner=LBFGS), TypeError, "Expected GradientDescent, Adam.*Got TorchOptimizer.*ImplicitMAML"),
        (lambda: MAML(inner=NewtonCG(steps=2)), TypeError, "use ImplicitMAML"),
    ],
)
def test_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "inner", [GradientDescent(lr=0.1, steps=60, stationarity=0.05), NewtonCG(steps=9, stationarity=0.02)]
)
def test_running_statistics_stop_with_their_task(inner):
    """Of an inner problem that is convex enough: elsewhere Newton's steps make rounding a thousand times larger."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    tasks = cases.make_tasks(3, examples=8)
    found = []
    for chunk_size in (None, 1):
        objective = Objective(model, F.mse_loss, buffers="update")
        found.append(FOMAML(inner=inner, regularization=2.0, chunk_size=chunk_size)(objective, tasks).report)
    assert len({int(n) for n in found[1].support_loss.isfinite().sum(0)}) > 1  # they stop at different steps
    for name, buffer in found[0].buffers.items():
        assert torch.allclose(buffer, found[1].buffers[name], rtol=1e-9), name


@pytest.mark.parametrize(("dtype", "reached"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_newton_gets_to_rounding(dtype, reached):
    objective = Objective(cases.make_model().to(dtype), F.mse_loss)
    engine = ImplicitMAML(inner=NewtonCG(steps=40), regularization=1.0)
    report = engine(objective, cases.make_tasks(3).to(dtype=dtype)).report
    assert report.stationarity.max() < reached
    assert report.support_loss.isnan().any()  # it notices that there is nothing left to gain
