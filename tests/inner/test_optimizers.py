"""Inner optimisers: forward like torch.optim, backward like an unrolled loop and like finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import FOMAML, MAML, Adam, AdamW, GradientDescent, ImplicitMAML, Objective, RMSprop, verify
from imaml.inner import _base
from imaml.measure import peak_memory
from tests.inner import cases, unrolled
from tests.inner.cases import OPTIMIZERS, RATES, STEPS, close


@pytest.mark.parametrize("name", [name for name, (_, torchs, *_) in OPTIMIZERS.items() if torchs])
def test_steps_are_those_of_torch(name):
    ours, torchs, options, _ = OPTIMIZERS[name]
    model, task = cases.make_model(), cases.make_tasks()[0]
    adapted = FOMAML(inner=ours(lr=0.05, steps=7, **options)).adapt(Objective(model, F.mse_loss), task.support)
    optimizer = torchs(model.parameters(), lr=0.05, **options)
    for _ in range(7):
        optimizer.zero_grad()
        F.mse_loss(model(task.support[0]), task.support[1]).backward()
        optimizer.step()
    for key, parameter in model.named_parameters():
        assert (adapted[key] - parameter).abs().max() <= 1e-12


def by_hand(model, tasks, name, meta, rates, **options):
    loss = cases.plain_loss(model)
    return unrolled.meta_gradient(
        loss, loss, dict(model.named_parameters()), meta, tasks, OPTIMIZERS[name][3], STEPS, lr=rates, **options
    )


@pytest.mark.parametrize(
    "settings", [{}, {"checkpoints": 1}, {"linearize": True}, {"linearize": 2}, {"hvp": "forward-over-reverse"}]
)
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_are_those_of_an_unrolled_loop(name, rate, settings):
    ours, _, options, _ = OPTIMIZERS[name]
    make_meta, lr, rates = RATES[rate]
    model, tasks = cases.make_model(), cases.make_tasks()
    meta = make_meta(model)
    engine = MAML(inner=ours(lr=lr, steps=STEPS, **options), **settings)
    got = engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1]
    close(got, by_hand(model, tasks, name, meta, rates))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_pulled_back_in_blocks(name, rate, monkeypatch):
    monkeypatch.setattr(_base, "BLOCK", 1)
    test_meta_gradients_are_those_of_an_unrolled_loop(name, rate, {})


def test_cotangents_that_share_memory_are_not_written_over_twice(monkeypatch):
    state, gradient = (torch.rand(1, 9, dtype=torch.float64),) * 3, torch.rand(1, 9, dtype=torch.float64)
    zeros, adam = torch.zeros(1, 9, dtype=torch.float64), Adam(lr=0.1, steps=1)

    def pulled():
        return adam.pullback(state, gradient.clone(), (zeros + 1, zeros, zeros), 0, {"lr": 0.1}, frozenset())

    whole = pulled()
    monkeypatch.setattr(_base, "BLOCK", 1)
    blocks = pulled()
    torch.testing.assert_close((*blocks[0], blocks[1]), (*whole[0], whole[1]))


def test_the_graph_of_an_update_is_short():
    n = 2**22
    state, gradient = (torch.rand(1, n),) * 3, torch.rand(1, n)
    cotangents = tuple(torch.rand(1, n) for _ in range(3))
    adam = Adam(lr=0.1, steps=1)
    call = lambda: adam.pullback(state, gradient, cotangents, 0, {"lr": 0.1}, frozenset())  # noqa: E731
    call()
    assert peak_memory(call) < 4 * n / 2  # the graph of a block: cotangents are written over


def test_an_update_of_ones_own_is_not_cut_into_blocks(monkeypatch):
    class Clipped(Adam):
        def update(self, state, gradient, step, at):
            return super().update(state, gradient / gradient.norm(dim=-1, keepdim=True), step, at)

    task = [torch.rand(1, 9, dtype=torch.float64) for _ in range(7)]
    at = (tuple(task[:3]), task[3], tuple(task[4:]), 0, {"lr": 0.1}, frozenset())
    whole = Clipped(lr=0.1, steps=1).pullback(*at)
    monkeypatch.setattr(_base, "BLOCK", 1)
    assert torch.equal(Clipped(lr=0.1, steps=1).pullback(*at)[1], whole[1])


@pytest.mark.parametrize("rate", ["number", "per parameter"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_are_finite_differences(name, rate):
    ours, _, options, _ = OPTIMIZERS[name]
    make_meta, lr, _ = RATES[rate]
    model = cases.make_model()
    engine = MAML(inner=ours(lr=lr, steps=STEPS, **options))
    found = verify.meta_gradient(engine, Objective(model, F.mse_loss, meta=make_meta(model)), cases.make_tasks())
    assert found.status == "passed" and found.relative_error <= max(1e-8, 3 * found.resolution)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_learned_regularisation(name):
    ours, _, options, _ = OPTIMIZERS[name]
    model, tasks, meta = cases.make_model(), cases.make_tasks(), {"log_lambda": cases.random(shift=-1.0)}
    engine = MAML(inner=ours(lr=0.05, steps=STEPS, **options), regularization=lambda meta: meta["log_lambda"].exp())
    got = engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1]
    damping = lambda meta: meta["log_lambda"].exp()  # noqa: E731
    close(got, by_hand(model, tasks, name, meta, lambda meta, name, k: 0.05, damping=damping))


@pytest.mark.parametrize("truncate", [0, 1, 3, STEPS, STEPS + 2])
@pytest.mark.parametrize("checkpoints", [None, 1])
@pytest.mark.parametrize("name", ["gradient descent", "adam"])
def test_truncated_sweeps_differentiate_the_last_steps(name, checkpoints, truncate):
    ours, _, options, _ = OPTIMIZERS[name]
    make_meta, lr, rates = RATES["per step"]
    model, tasks = cases.make_model(), cases.make_tasks()
    meta = make_meta(model) if truncate else {}
    rates = rates if truncate else lambda meta, name, k: 0.05
    engine = MAML(
        inner=ours(lr=lr if truncate else 0.05, steps=STEPS, **options), truncate=truncate, checkpoints=checkpoints
    )
    result = engine(objective := Objective(model, F.mse_loss, meta=meta), tasks)
    close(engine.value_and_grad(objective, tasks)[1], by_hand(model, tasks, name, meta, rates, truncate=truncate))
    assert result.report.hvps == min(truncate, STEPS) * len(tasks)


def test_momentum_may_be_learned_too():
    model, meta = cases.make_model(), {"mu": torch.tensor(0.7, dtype=torch.float64, requires_grad=True)}
    for kind in (GradientDescent, RMSprop):
        inner = kind(lr=0.05, steps=STEPS, momentum=lambda meta: meta["mu"], weight_decay=lambda meta: meta["mu"] / 10)
        found = verify.meta_gradient(MAML(inner=inner), Objective(model, F.mse_loss, meta=meta), cases.make_tasks())
        assert found.status == "passed"


@pytest.mark.parametrize("kind", [Adam, AdamW, RMSprop])
def test_derivatives_are_finite_at_zero_gradients(kind):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)  # a dead layer: its gradients are zero exactly
    grads = MAML(inner=kind(lr=0.05, steps=3)).value_and_grad(Objective(model, F.mse_loss), cases.make_tasks())[1]
    assert all(bool(g.isfinite().all()) for g in grads.values())
    assert bool(grads["2.bias"].any())


def test_early_stopping_stops_each_task_where_its_gradient_is_small():
    model, tasks = cases.make_model(), cases.make_tasks()
    engine = ImplicitMAML(inner=GradientDescent(lr=0.2, steps=2000, stationarity=1e-6), regularization=1.0)
    report = engine(Objective(model, F.mse_loss), tasks).report
    assert report.stationarity.max() <= 1e-6 and report.gradients < 1000
    alone = [engine(Objective(model, F.mse_loss), [task]).report for task in tasks]
    steps = [int(one.support_loss.isfinite().sum()) for one in alone]
    assert steps[0] != steps[1] and int(report.support_loss[:, 0].isfinite().sum()) == max(steps)
    for task, one in enumerate(alone):
        assert one.query_loss.item() == pytest.approx(report.query_loss[task].item(), rel=1e-12)
        assert one.stationarity.item() >= 1e-8  # it stopped there, rather than go on with the others


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: GradientDescent(lr=[0.1, -0.1], steps=2), ValueError, "`lr` must be positive.*Got -0.1 at step 1"),
        (lambda: GradientDescent(lr={"a": 0.0}, steps=2), ValueError, "`lr` must be positive.*Got 0.0 for 'a'"),
        (lambda: GradientDescent(lr=0.1, steps=2, momentum=-1), ValueError, "`momentum` must be >= 0. Got -1"),
        (lambda: GradientDescent(lr=0.1, steps=2, nesterov=True), ValueError, "nesterov=True needs `momentum`"),
        (lambda: Adam(lr=0.1, steps=2, betas=(0.9, 1.0)), ValueError, "`betas` must be >= 0 and < 1. Got 1.0"),
        (lambda: Adam(lr=0.1, steps=2, betas=(0.9,)), ValueError, "`betas` must be two numbers"),
        (lambda: Adam(lr=0.1, steps=2, eps=0.0), ValueError, "`eps` must be positive"),
        (lambda: Adam(lr=0.1, steps=2, eps_root=-1.0), ValueError, "`eps_root` must be >= 0. Got -1.0"),
        (lambda: RMSprop(lr=0.1, steps=2, eps_root="a"), TypeError, "`eps_root` must be a number. Got 'a'"),
        (lambda: RMSprop(lr=0.1, steps=2, alpha=2.0), ValueError, "`alpha` must be >= 0 and < 1. Got 2.0"),
        (lambda: AdamW(lr=0.1, steps=2, weight_decay="a"), TypeError, "`weight_decay` must be a number. Got 'a'"),
        (lambda: Adam(lr=0.1, steps=2, stationarity=-1.0), ValueError, "`stationarity` must be >= 0"),
        (
            lambda: GradientDescent(lr=torch.tensor(0.1, requires_grad=True), steps=2),
            ValueError,
            "`lr` is a tensor that requires grad.*meta",
        ),
        (
            lambda: MAML(inner=Adam(lr=0.1, steps=2, stationarity=0.1)),
            ValueError,
            "Expected an inner loop with stationarity=None. Got 0.1: use ImplicitMAML",
        ),
        (lambda: MAML(inner=Adam(lr=0.1, steps=2), truncate=-1), ValueError, "`truncate`.*>= 0. Got -1"),
    ],
)
def test_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (lambda meta: meta["a"], r"`lr` must be a number, or one per inner step, shape \(4,\). Got \(3,\)"),
        (lambda meta: {"0.weight": meta["b"]}, "`lr` must name every adapted parameter.*Missing: .*'2.bias'"),
        (
            lambda meta: dict.fromkeys(["0.weight", "0.bias", "2.weight", "2.bias"], meta["a"]),
            r"`lr\['0.weight'\]` must be a number, of the parameter's shape \(4, 3\).*Got \(3,\)",
        ),
        (lambda meta: meta["c"], "`lr` asks for the meta-parameter 'c'. Got \\['a', 'b'\\]"),
        (lambda meta: meta["b"] * float("nan"), "`lr` must be finite"),
    ],
)
def test_rates_that_do_not_fit(lr, message):
    objective = Objective(cases.make_model(), F.mse_loss, meta={"a": torch.ones(3), "b": torch.tensor(0.1)})
    with pytest.raises(ValueError, match=message):
        MAML(inner=GradientDescent(lr=lr, steps=4))(objective, cases.make_tasks())


def test_numbers_per_step_and_per_parameter():
    model, task = cases.make_model(), cases.make_tasks()[0]
    names = [n for n, _ in model.named_parameters()]
    objective = Objective(model, F.mse_loss)
    per_step = FOMAML(inner=GradientDescent(lr=[0.1, 0.2], steps=2)).adapt(objective, task.support)
    per_name = FOMAML(
        inner=GradientDescent(lr={n: [0.1, 0.2] if n != "2.bias" else 1e-3 for n in names}, steps=2)
    ).adapt(objective, task.support)
    for rate in (0.1, 0.2):
        grads = torch.autograd.grad(F.mse_loss(model(task.support[0]), task.support[1]), list(model.parameters()))
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.sub_(rate * grad)
    for name, parameter in model.named_parameters():
        assert torch.allclose(per_step[name], parameter, rtol=1e-12)
    assert torch.equal(per_name["0.weight"] != per_step["0.weight"], torch.ones(4, 3, dtype=torch.bool))
