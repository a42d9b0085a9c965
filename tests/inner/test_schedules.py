"""Hyper-parameters that are functions of the step."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from imaml import FOMAML, MAML, Adam, AdamW, GradientDescent, ImplicitMAML, InnerState, Objective, TaskBatch, verify
from imaml.inner import warmup_cosine, warmup_linear
from imaml.inner._hyper import takes_step
from imaml.measure import peak_memory
from tests.inner import cases, unrolled
from tests.inner.cases import close

STEPS = 5


def warmed(step, warmup=2, total=5, floor=0.0, peak=1.0):
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * min(1, (step - warmup) / (total - warmup)))) / 2


# name: the meta-parameters, the library's lr, and lr(meta, parameter, step) by hand
SCHEDULES = {
    "numbers": ({}, lambda meta, step: 0.1 / (1 + step), lambda meta, name, k: 0.1 / (1 + k)),
    "learned": (
        {"log_lr": cases.random(), "decay": cases.random(shift=0.0)},
        lambda meta, step: (meta["log_lr"] - step * meta["decay"]).exp(),
        lambda meta, name, k: (meta["log_lr"] - k * meta["decay"]).exp(),
    ),
    "learned at some steps": (
        {"late": cases.random()},
        lambda meta, step: [0.05, torch.tensor(0.0625)][step] if step < 2 else meta["late"].exp(),
        lambda meta, name, k: [0.05, 0.0625][k] if k < 2 else meta["late"].exp(),
    ),
    "by name": (
        {"rates": {"0.weight": cases.random(4, 3), "2.bias": cases.random()}},
        lambda meta, step: {
            "0.weight": meta["rates"]["0.weight"].exp() / (1 + step),
            "2.bias": meta["rates"]["2.bias"].exp(),
            "0.bias": 0.01 * step,
            "2.weight": torch.tensor(0.0625),
        },
        lambda meta, name, k: {
            "0.weight": meta["rates.0.weight"].exp() / (1 + k),
            "2.bias": meta["rates.2.bias"].exp(),
            "0.bias": 0.01 * k,
            "2.weight": 0.0625,
        }[name],
    ),
    "cosine": ({}, warmup_cosine(0.1, warmup=2, total=5), lambda meta, name, k: warmed(k, peak=0.1)),
    "learned peak": (
        {"log_lr": cases.random()},
        warmup_cosine(lambda meta: meta["log_lr"].exp(), warmup=1, total=4, floor=0.01),
        lambda meta, name, k: warmed(k, 1, 4, 0.01, meta["log_lr"].exp()),
    ),
}


def by_hand(model, tasks, meta, rates, update, steps=STEPS):
    loss = cases.plain_loss(model)
    flat = {}
    for key, value in meta.items():
        flat |= {f"{key}.{n}": t for n, t in value.items()} if isinstance(value, dict) else {key: value}
    return unrolled.meta_gradient(loss, loss, dict(model.named_parameters()), flat, tasks, update, steps, lr=rates)


OPTIMIZERS = {
    "gradient descent": (GradientDescent, {}, unrolled.sgd()),
    "momentum": (GradientDescent, {"momentum": 0.8}, unrolled.sgd(0.8)),
    "adam": (Adam, {"eps": 1e-3}, unrolled.adam(eps=1e-3)),
}


@pytest.mark.parametrize("settings", [{}, {"checkpoints": 1, "chunk_size": 1}, {"linearize": 2}])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_are_those_of_an_unrolled_loop(name, schedule, settings):
    kind, options, update = OPTIMIZERS[name]
    meta, lr, rates = SCHEDULES[schedule]
    model, tasks = cases.make_model(), cases.make_tasks()
    engine = MAML(inner=kind(lr=lr, steps=STEPS, **options), **settings)
    got = engine.value_and_grad(Objective(model, F.mse_loss, meta=meta), tasks)[1]
    close(got, by_hand(model, tasks, meta, rates, update))


def test_every_hyperparameter_may_be_a_schedule():
    meta = {"a": cases.random(shift=-1.0), "b": cases.random(shift=-2.0)}
    inner = AdamW(
        lr=lambda meta, step: meta["a"].exp() / (1 + step),
        weight_decay=lambda meta, step: meta["b"].exp() * step,
        max_grad_norm=lambda meta, step: 0.1 + meta["b"].exp() / (1 + step),
        eps=1e-3,
        steps=3,
    )
    found = verify.meta_gradient(
        MAML(inner=inner), Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks()
    )
    assert found.status == "passed" and found.relative_error <= max(1e-8, 3 * found.resolution)


def test_a_schedule_counts_the_steps_of_the_whole_training():
    model, task = cases.make_model(), cases.make_tasks(1)
    objective = Objective(model, F.mse_loss)
    lr = lambda meta, step: 0.1 / (1 + step)  # noqa: E731
    whole = MAML(inner=GradientDescent(lr=lr, steps=5))(objective, task, return_state=True)
    half = MAML(inner=GradientDescent(lr=lr, steps=2))(objective, task, return_state=True)
    rest = MAML(inner=GradientDescent(lr=lr, steps=3))(objective, task, start=half.state, return_state=True)
    for name, parameter in whole.state.parameters.items():
        torch.testing.assert_close(rest.state.parameters[name], parameter, rtol=1e-12, atol=0)


def test_a_schedule_is_called_at_the_steps_of_the_call_alone():
    seen, objective = set(), Objective(cases.make_model(), F.mse_loss, meta={"a": cases.random()})
    start = InnerState(parameters={n: p.detach().unsqueeze(0) for n, p in objective.model.named_parameters()}, step=7)

    def lr(meta, step):
        seen.add(step)
        return meta["a"].exp()

    MAML(inner=GradientDescent(lr=lr, steps=3), regularization=0.1)(objective, cases.make_tasks(), start=start)
    assert seen == {7, 8, 9}


def test_a_schedule_of_numbers_leaves_gradient_descent_a_linear_step():
    objective, tasks = Objective(cases.make_model(), F.mse_loss), cases.make_tasks()
    inner = GradientDescent(lr=warmup_cosine(0.1, warmup=1, total=4), steps=4)
    report = MAML(inner=inner, linearize=False)(objective, tasks).report
    assert report.gradients == 5 * len(tasks)


def test_the_memory_of_a_learned_schedule_does_not_grow_with_the_steps():
    model = torch.nn.Linear(64, 64)
    x = torch.randn(1, 4, 64)
    tasks, peaks = TaskBatch(support=(x, x), query=(x, x)), []
    for steps in (8, 64):
        meta = {"log_lr": {n: torch.full_like(p, -5.0).requires_grad_() for n, p in model.named_parameters()}}
        lr = lambda meta, step: {n: t.exp() / (1 + step) for n, t in meta["log_lr"].items()}  # noqa: E731
        engine = MAML(inner=GradientDescent(lr=lr, steps=steps), checkpoints=2)
        objective = Objective(model, F.mse_loss, meta=meta)
        engine(objective, tasks)
        peaks.append(peak_memory(lambda engine=engine, objective=objective: engine(objective, tasks)))
    assert peaks[1] <= 1.02 * peaks[0]


@pytest.mark.parametrize("make", [warmup_cosine, warmup_linear])
def test_warm_ups_rise_to_the_peak_and_fall_to_the_floor(make):
    lr = make(2.0, warmup=4, total=10, floor=0.5)
    values = [lr({}, step) for step in range(13)]
    assert values[:5] == pytest.approx([0.0, 0.5, 1.0, 1.5, 2.0])
    assert values[7] == pytest.approx(1.25) and values[10:] == pytest.approx([0.5] * 3)
    assert sorted(values[4:], reverse=True) == values[4:]
    assert make({"a": 1.0, "b": 2.0}, warmup=2, total=3)({}, 1) == pytest.approx({"a": 0.5, "b": 1.0})
    assert make(1.0, warmup=0, total=3)({}, 0) == 1.0
    assert pickle.loads(pickle.dumps(lr)) == lr and takes_step(lr)


def test_warm_ups_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    pairs = (
        (warmup_cosine, transformers.get_cosine_schedule_with_warmup),
        (warmup_linear, transformers.get_linear_schedule_with_warmup),
    )
    for ours, theirs in pairs:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
        scheduler = theirs(optimizer, num_warmup_steps=3, num_training_steps=9)
        for step in range(9):
            assert ours(0.3, warmup=3, total=9)({}, step) == pytest.approx(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize(
    ("function", "is_one"),
    [
        (lambda meta: 0.1, False),
        (lambda meta, step: 0.1, True),
        (lambda meta, n=2: 0.1, False),
        (lambda meta, step, n=2: 0.1, True),
        (lambda *both: 0.1, False),
        (0.1, False),
        (dict, False),
    ],
)
def test_a_function_of_two_arguments_is_a_schedule(function, is_one):
    assert takes_step(function) is is_one


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: warmup_cosine(0.0, warmup=1, total=2), ValueError, "`peak` must be positive. Got 0.0"),
        (lambda: warmup_cosine([0.1, 0.2], warmup=1, total=2), TypeError, "`peak` is one for all steps"),
        (lambda: warmup_linear(0.1, warmup=-1, total=2), ValueError, "`warmup`.*>= 0. Got -1"),
        (lambda: warmup_linear(0.1, warmup=2, total=2), ValueError, "`total`.*>= 3. Got 2"),
        (lambda: warmup_linear(0.1, warmup=2, total=9, floor=-0.1), ValueError, "`floor` must be >= 0. Got -0.1"),
        (
            lambda: MAML(inner=Adam(lr=0.1, steps=2), regularization=lambda meta, step: 1.0),
            TypeError,
            "`regularization` is one for all steps.*Got a function of two arguments",
        ),
        (
            lambda: ImplicitMAML(inner=Adam(lr=0.1, steps=2), regularization=warmup_linear(1.0, warmup=0, total=2)),
            TypeError,
            "`regularization` is one for all steps",
        ),
    ],
)
def test_configuration(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("lr", "message"),
    [
        (lambda meta, step: torch.ones(5), r"`lr\(meta, 0\)` must be a number.*Got \(5,\)"),
        (lambda meta, step: float("nan") if step == 2 else 0.1, r"`lr\(meta, 2\)` must be finite. Got nan"),
        (lambda meta, step: meta["b"], r"`lr\(meta, 0\)` asks for the meta-parameter 'b'. Got \['a'\]"),
        (lambda meta, step: {"0.weight": 0.1}, r"`lr\(meta, 0\)` must name every adapted parameter"),
        (lambda meta, step: CAPTURED.exp(), r"`lr\(meta, 0\)` depends on a tensor that requires grad and is not in"),
    ],
)
def test_what_is_said_of_a_schedule_that_does_not_fit(lr, message):
    objective = Objective(cases.make_model(), F.mse_loss, meta={"a": torch.ones(1)})
    with pytest.raises(ValueError, match=message):
        FOMAML(inner=GradientDescent(lr=lr, steps=5))(objective, cases.make_tasks())


CAPTURED = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)


def test_a_schedule_that_leads_nowhere_is_an_error_as_it_is_in_a_forecast():
    meta = {"a": cases.random(), "b": cases.random()}
    objective, tasks = Objective(cases.make_model(), F.mse_loss, meta=meta), cases.make_tasks()
    engine = MAML(inner=GradientDescent(lr=lambda meta, step: meta["a"].exp(), steps=3))
    for call in (engine, engine.plan):
        with pytest.raises(ValueError, match="'b' is zero"):
            call(objective, tasks)
    both = MAML(inner=GradientDescent(lr=lambda meta, step: meta["b" if step == 1 else "a"].exp(), steps=3))
    both(objective, tasks)
    both.plan(objective, tasks)
