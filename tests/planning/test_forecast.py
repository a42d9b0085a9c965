"""Predicted peaks against measured ones, predicted counts against the report's, and what is recommended."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imaml import (
    CG,
    FOMAML,
    LAMB,
    MAML,
    Adam,
    GradientDescent,
    ImplicitMAML,
    Lion,
    Muon,
    Neumann,
    Objective,
    Task,
    TaskBatch,
    TorchOptimizer,
)
from imaml._curvature.curvature import Curvature
from imaml._strategies.schedule import sweep
from imaml.measure import peak_memory
from tests.engine.test_counts import fewest_advances
from tests.planning.models import TASKS, problem


def descent(steps=4, **options):
    return GradientDescent(lr=0.01, steps=steps, **options)


def implicit(**options):
    budget = {"solver": CG(max_steps=3, rtol=0.0), "inner": descent(), "on_failure": "ignore"}
    return ImplicitMAML(**(budget | options))


def of_engine(forecast):
    """The setting that is the engine itself."""
    [setting] = [each for each in forecast.settings if not each.options]
    return setting


MOMENTUM = descent(4, momentum=0.9)
ALONG = {0: 0.2, 1: 0.3, 3: 0.1, 4: 0.4}
CASES = [
    ("mlp", MAML(inner=descent())),
    ("mlp", MAML(inner=descent(1), linearize=False, chunk_size=4)),
    ("mlp", MAML(inner=descent(0))),
    ("mlp", MAML(inner=descent(9, momentum=0.9), regularization=0.1, checkpoints=2, chunk_size=2)),
    ("mlp", MAML(inner=Adam(lr=0.01, steps=4), linearize=False, chunk_size=1)),
    ("mlp", MAML(inner=Adam(lr=0.01, steps=4), linearize=True, chunk_size=5)),
    ("mlp", MAML(inner=Adam(lr=0.01, steps=9), checkpoints=2, chunk_size=2)),
    ("mlp", MAML(inner=descent(), linearize=2, chunk_size=1)),
    ("mlp", MAML(inner=descent(), linearize=3, regularization=0.1, chunk_size=1)),
    ("mlp", MAML(inner=descent(9, momentum=0.9), linearize=4, storage="disk", chunk_size=2)),
    ("mlp", MAML(inner=Adam(lr=0.01, steps=9), linearize=2, checkpoints=2, chunk_size=2)),
    ("mlp", MAML(inner=descent(6), linearize=2, truncate=4, regularization=0.1, chunk_size=5)),
    ("mlp", MAML(inner=descent(), truncate=2, linearize=False)),
    ("mlp", MAML(inner=descent(), storage="disk", chunk_size=4)),
    ("mlp", MAML(inner=descent(9), storage="cpu", chunk_size=4)),
    ("mlp", MAML(inner=descent(), hvp="finite-difference", chunk_size=2)),
    ("mlp", MAML(inner=descent(), outer_steps=ALONG, linearize=True, chunk_size=4)),
    ("mlp", MAML(inner=descent(9, momentum=0.9), outer_steps=ALONG, regularization=0.1, linearize=3, chunk_size=2)),
    ("mlp", MAML(inner=Adam(lr=0.01, steps=9), outer_steps=ALONG, checkpoints=2, chunk_size=2)),
    ("conv", MAML(inner=descent(4), outer_steps=ALONG, linearize=False, chunk_size=2)),
    ("conv", MAML(inner=descent(4), outer_steps=ALONG, linearize=1, chunk_size=2)),
    ("many queries", MAML(inner=MOMENTUM, outer_steps=ALONG, checkpoints=1, chunk_size=2)),
    ("many queries", MAML(inner=MOMENTUM, outer_steps={3: 0.5, 4: 0.5}, regularization=0.1, linearize=False)),
    ("many queries", MAML(inner=MOMENTUM, outer_steps={2: 0.5}, regularization=0.1, linearize=1, truncate=2)),
    ("many queries", MAML(inner=MOMENTUM, outer_steps={3: 0.5, 4: 0.5}, regularization=0.1, linearize=2)),
    ("many queries", MAML(inner=descent(1, momentum=0.5), outer_steps={0: 0.5, 1: 0.5}, linearize=False)),
    ("many queries", MAML(inner=descent(1, momentum=0.5), outer_steps={0: 0.5, 1: 0.5}, linearize=True)),
    ("initial", MAML(inner=MOMENTUM, outer_steps=ALONG, linearize=False, chunk_size=2)),
    ("initial", MAML(inner=descent(), linearize=True, chunk_size=1)),
    ("initial", FOMAML(inner=descent())),
    ("initial", implicit(chunk_size=4)),
    ("mlp", FOMAML(inner=descent(9, stationarity=1e-9), chunk_size=6)),
    ("mlp", FOMAML(inner=TorchOptimizer(torch.optim.LBFGS, steps=5, max_iter=2), chunk_size=2)),
    ("mlp", MAML(inner=descent(max_grad_norm=0.5), linearize=False, chunk_size=4)),
    ("mlp", MAML(inner=Adam(lr=0.01, steps=9, max_grad_norm=0.5), checkpoints=2, chunk_size=2)),
    ("mlp", MAML(inner=LAMB(lr=0.01, steps=4), linearize=True, chunk_size=5)),
    ("mlp", MAML(inner=Muon(lr=0.01, steps=4), linearize=False, chunk_size=3)),
    ("mlp", MAML(inner=Lion(lr=0.01, steps=9), checkpoints=2, chunk_size=2)),
    ("mlp", FOMAML(inner=Muon(lr=0.01, steps=4, max_grad_norm=0.5), chunk_size=6)),
    ("mlp", implicit(chunk_size=4)),
    ("mlp", implicit(linearize=False, solver_dtype=torch.float64, error_bound=False)),
    ("mlp", implicit(solver=Neumann(max_steps=3), chunk_size=1)),
    ("tokens", MAML(inner=descent(3), linearize=False, chunk_size=5)),
    ("tokens", MAML(inner=descent(4), linearize=2, checkpoints=1, chunk_size=5)),
    ("tokens", MAML(inner=descent(2), microbatch_size=2, chunk_size=1)),
    ("tokens, recomputed", MAML(inner=descent(3), linearize=False, chunk_size=5)),
    ("tokens, recomputed", MAML(inner=descent(3), linearize=True, chunk_size=1)),
    ("tokens, recomputed", MAML(inner=descent(5), linearize=2, chunk_size=2)),
    ("tokens, recomputed", implicit(chunk_size=2)),
    ("lstm", implicit(inner=descent(2), chunk_size=4)),
    ("lstm", MAML(inner=descent(), linearize=2, chunk_size=4)),
    ("conv", MAML(inner=descent(), linearize=True, chunk_size=5)),
    ("conv", FOMAML(inner=descent())),
    ("conv", implicit(curvature="ggn", chunk_size=4)),
    ("head", MAML(inner=descent(), chunk_size=4)),
    ("head", implicit(chunk_size=4)),
    ("conv", implicit(damping=2.0, chunk_size=4)),
    ("conv", implicit(damping=2.0, error_bound=False, solver_dtype=torch.float64)),
]


@pytest.mark.parametrize(("model", "engine"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_peaks_are_within_four_percent_and_counts_are_those_of_the_report(model, engine):
    objective, tasks = problem(model)
    setting = of_engine(engine.plan(objective, tasks))
    call = replace(engine)
    call.value_and_grad(objective, tasks)  # what torch sets up once
    measured = peak_memory(lambda: call.value_and_grad(objective, tasks))
    assert setting.peak_bytes == pytest.approx(measured, rel=0.04)
    report = call(objective, tasks).report
    if isinstance(engine.inner, TorchOptimizer):
        assert report.hvps == setting.hvps == 0 and report.gradients <= setting.gradients
    else:
        assert (report.gradients, report.hvps) == (setting.gradients, setting.hvps)


def test_every_setting_of_a_strategy_is_within_four_percent():
    objective, tasks = problem("mlp")
    for engine in (MAML(inner=descent()), FOMAML(inner=descent()), implicit()):
        for setting in engine.plan(objective, tasks).settings[::4]:
            setting.engine.value_and_grad(objective, tasks)
            measured = peak_memory(lambda setting=setting: setting.engine.value_and_grad(objective, tasks))
            assert setting.peak_bytes == pytest.approx(measured, rel=0.04), setting.name


def test_tasks_of_several_shapes():
    objective, _ = problem("mlp")
    tasks = [Task(support=(torch.randn(n, 1),) * 2, query=(torch.randn(4, 1),) * 2) for n in (3, 30, 3, 30, 3)]
    engine = MAML(inner=descent(), chunk_size=2)
    setting = of_engine(engine.plan(objective, tasks))
    engine.value_and_grad(objective, tasks)
    assert setting.peak_bytes == pytest.approx(peak_memory(lambda: engine.value_and_grad(objective, tasks)), rel=0.04)
    assert setting.gradients == engine(objective, tasks).report.gradients


def test_the_recommended_engine_is_the_fastest_that_fits_and_gives_the_same_numbers():
    objective, tasks = problem("mlp")
    engine = MAML(inner=descent(9))
    free = engine.plan(objective, tasks)
    assert free.memory is None and free.best is free.settings[0] and free.fits
    sizes = sorted({setting.peak_bytes for setting in free.settings})
    expected = engine.value_and_grad(objective, tasks)[1]
    for limit in (sizes[0], sizes[len(sizes) // 2]):
        forecast = engine.plan(objective, tasks, memory=limit)
        assert forecast.best is next(s for s in forecast.settings if s.peak_bytes <= limit)
        assert all(s.fits == (s.peak_bytes <= limit) for s in forecast.settings)
        chosen = forecast.recommended
        assert peak_memory(lambda chosen=chosen: chosen.value_and_grad(objective, tasks)) <= 1.05 * limit
        for name, gradient in chosen.value_and_grad(objective, tasks)[1].items():
            torch.testing.assert_close(gradient, expected[name])


def test_nothing_fits():
    objective, tasks = problem("mlp")
    forecast = MAML(inner=descent()).plan(objective, tasks, memory=1000)
    assert forecast.recommended is None and forecast.best is None and not forecast.fits
    text = str(forecast)
    assert f"Nothing fits into 1 kB. The leanest is {forecast.leanest.name}" in text and "microbatch_size" in text


def test_what_the_user_has_fixed_does_not_vary():
    objective, tasks = problem("mlp")

    def options(engine):
        return {name for setting in engine.plan(objective, tasks).settings for name in setting.options}

    assert options(MAML(inner=descent(9))) == {"chunk_size", "checkpoints", "linearize", "storage"}
    assert options(MAML(inner=descent(9), chunk_size=2)) == {"checkpoints", "linearize", "storage"}
    assert options(MAML(inner=descent(9), checkpoints=2)) == {"chunk_size", "linearize"}
    assert options(MAML(inner=descent(9), linearize=True, chunk_size=1)) == set()
    assert options(FOMAML(inner=descent())) == {"chunk_size"}
    assert options(implicit()) == {"chunk_size", "linearize"}
    assert options(implicit(linearize=False)) == {"chunk_size"}


def test_linearised_and_vectorised_settings_are_predicted_to_be_faster():
    objective, tasks = problem("mlp")
    forecast = MAML(inner=descent()).plan(objective, tasks)
    ranks, settings = [s.rank for s in forecast.settings], {s.name: s for s in forecast.settings}
    assert ranks == sorted(ranks)
    one, all_, last, half, kept = (
        settings[f"linearize={keep}, chunk_size={size}"]
        for keep, size in ((False, 1), (False, TASKS), (1, TASKS), (2, TASKS), (True, TASKS))
    )
    assert kept.rank < half.rank < last.rank < all_.rank < one.rank
    assert all_.peak_bytes <= last.peak_bytes < half.peak_bytes < kept.peak_bytes
    assert one.gradient_equivalents == all_.gradient_equivalents == TASKS * (5 + 3 * 4)
    assert half.gradient_equivalents == TASKS * (5 + 3 * 2 + 2 * 2)
    assert kept.gradient_equivalents == TASKS * (5 + 2 * 4)


def test_a_gauss_newton_product_costs_one_gradient_whatever_the_mode_of_the_mixed_one():
    objective, tasks = problem("head")
    products = 3
    for mode, rebuilt in (("auto", 3), ("finite-difference", 2)):
        engine = implicit(curvature="ggn", hvp=mode, error_bound=False, chunk_size=1)
        setting = of_engine(engine.plan(objective, tasks))
        assert setting.gradient_equivalents == setting.gradients + TASKS * (products + rebuilt)


def test_a_model_that_cannot_be_vectorised_gains_nothing_from_it():
    objective, tasks = problem("lstm")
    best = FOMAML(inner=descent()).plan(objective, tasks).best
    assert best.options == {"chunk_size": 1}


def test_looking_is_cheap_and_changes_nothing():
    objective, tasks = problem("mlp")
    model = nn.Sequential(objective.model, nn.Dropout(0.5))
    objective = Objective(model, objective.loss)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    engine, random = MAML(inner=descent(50)), torch.get_rng_state()
    forecast = engine.plan(objective, tasks)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert forecast.gradients + forecast.hvps <= 36 and forecast.gradients >= 6
    assert {s.gradients for s in forecast.settings} > {TASKS * 51}


def test_the_table_lists_the_front_and_ends_in_the_advice():
    objective, tasks = problem("mlp")
    forecast = MAML(inner=descent()).plan(objective, tasks)
    lines = str(forecast).splitlines()
    assert lines[0].split() == ["setting", "peak", "gradients", "HVPs", "cost", "fits"]
    assert len(lines) == len(forecast.front) + 2 and lines[-1] == forecast.advice
    peaks = [setting.peak_bytes for setting in forecast.front if setting.options]
    assert peaks == sorted(peaks, reverse=True) and forecast.leanest in forecast.front


def test_a_strategy_without_costs_and_a_running_profiler_are_refused():
    class Own(FOMAML):
        _costs = None

    objective, tasks = problem("mlp")
    with pytest.raises(ValueError, match="Own does not say what it costs"):
        Own(inner=descent()).plan(objective, tasks)
    with (
        torch.autograd.profiler.profile(use_cpu=True),
        pytest.raises(RuntimeError, match="Plan before profiling"),
    ):
        FOMAML(inner=descent()).plan(objective, tasks)


WAYS = {
    "a step size": ({"lr": lambda meta: meta["a"].exp()}, None),
    "lambda": ({"regularization": lambda meta: meta["a"].exp()}, None),
    "the support loss": ({}, lambda output, target, meta: F.mse_loss(output, target) * meta["a"].exp()),
    "nothing": ({}, None),
}
"""How a meta-parameter acts: hyper-parameters of the engine, and the support loss."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_what_a_call_refuses_to_learn_is_not_recommended(strategy, way):
    hyper, loss = WAYS[way]
    torch.manual_seed(0)
    tasks = TaskBatch(support=tuple(torch.randn(2, 3, 5, 2)), query=tuple(torch.randn(2, 3, 5, 2)))
    meta = {"a": torch.tensor(-1.0, requires_grad=True)}
    objective = Objective(nn.Linear(2, 2), loss or F.mse_loss, outer_loss=F.mse_loss, meta=meta)
    inner = GradientDescent(lr=hyper.get("lr", 0.1), steps=2)
    options = {"regularization": hyper["regularization"]} if "regularization" in hyper else {}
    engine = strategy(inner=inner, **options)
    try:
        engine(objective, tasks)
    except ValueError as refusal:
        with pytest.raises(ValueError, match="is zero") as planned:
            engine.plan(objective, tasks)
        assert str(planned.value) == str(refusal)
        with torch.no_grad():
            assert replace(engine, chunk_size="auto")(objective, tasks).loss.isfinite()
    else:
        assert engine.plan(objective, tasks).best.options is not None


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 32])
@pytest.mark.parametrize("checkpoints", [None, 0, 1, 3, 40])
def test_the_schedule_takes_the_fewest_steps(steps, checkpoints):
    """Griewank & Walther's optimum by its recurrence; and of all states the last is reversed beside all others."""
    found, slots = sweep(steps, checkpoints), steps if checkpoints is None else checkpoints + 1
    assert found.steps == fewest_advances(steps, slots) + 1
    assert max(found.forward, found.reverse) <= min(slots, steps - 1) + (slots < steps)
    if steps > 2 and checkpoints == 0:
        assert found.again == 2  # the state at hand, and that of the step differentiated before
    if slots >= steps:
        assert found.forward == steps - 1 and found.again is None


def test_slices_of_examples_leave_nothing_for_the_garbage_collector():
    objective, tasks = problem("tokens")
    engine = MAML(inner=descent(1), microbatch_size=2, chunk_size=1)
    engine.value_and_grad(objective, tasks)
    gc.collect()
    before = {id(x) for x in gc.get_objects() if type(x) is Curvature}  # of tests that failed as they should
    gc.disable()
    try:
        engine.value_and_grad(objective, tasks)
        assert not [x for x in gc.get_objects() if type(x) is Curvature and id(x) not in before]
    finally:
        gc.enable()
