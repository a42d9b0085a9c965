"""What holds for every strategy. A new public `MetaGradient` is found by itself, and needs but an oracle."""

import copy
import dataclasses
import inspect

import pytest
import torch
from torch import nn

import imaml
from imaml import FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient
from imaml.testing import strategy_conformance
from tests.engine.cases import classification, conv, mlp, oracle_setting, problem, transformer
from tests.oracles import ORACLES, relative_error

STRATEGIES = [
    value
    for name, value in vars(imaml).items()
    if inspect.isclass(value) and issubclass(value, MetaGradient) and not inspect.isabstract(value)
]
INNER = GradientDescent(lr=0.2, steps=3)
EXACT = {"inner": INNER, "solver": imaml.Dense(), "on_failure": "ignore"}


def make(strategy, **options):
    """The strategy, with those of the options that it has; a solver, where it has one, is dense."""
    fields = {f.name for f in dataclasses.fields(strategy)}
    return strategy(**{k: v for k, v in (EXACT | options).items() if k in fields})


CLAIMS = {MAML: "maml", FOMAML: "fomaml", ImplicitMAML: "implicit"}
for found in STRATEGIES:  # collected by pytest
    globals()[f"Test{found.__name__}"] = strategy_conformance(
        lambda inner, found=found: make(found, inner=inner), against=CLAIMS.get(found), rtol=1e-10
    )


@pytest.fixture(params=STRATEGIES, ids=lambda s: s.__name__)
def strategy(request):
    return request.param


def test_the_three_strategies_are_found():
    assert {s.__name__ for s in STRATEGIES} >= {"MAML", "FOMAML", "ImplicitMAML"}


@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
@pytest.mark.parametrize("regularization", [0.5, 2.0])
def test_value_and_gradient_are_those_of_the_oracle(strategy, regularization, adapt):
    assert strategy in ORACLES, (
        f"{strategy.__name__} has no oracle: write one in tests/oracles.py, a slow and obvious computation of the same "
        "meta-gradient in plain PyTorch, and add it to ORACLES."
    )
    engine = make(strategy, regularization=regularization)
    model, objective, tasks = problem(mlp, adapt=adapt)
    loss, expected = ORACLES[strategy](oracle_setting(engine, model, objective, tasks))
    got_loss, got = engine.value_and_grad(objective, tasks)
    torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
    assert relative_error(got, expected) <= 1e-10
    assert all(got[n].shape == p.shape and got[n].dtype == p.dtype for n, p in model.named_parameters())


@pytest.mark.parametrize("build", [conv, transformer], ids=lambda build: build.__name__)
def test_chunks_do_not_matter(strategy, build):
    _, objective, tasks = problem(build, tasks=5)
    solver = imaml.CG(max_steps=3, rtol=0.0)
    loss, expected = make(strategy, solver=solver, chunk_size=1).value_and_grad(objective, tasks)
    for size in (None, 2, 100):
        got_loss, got = make(strategy, solver=solver, chunk_size=size).value_and_grad(objective, tasks)
        torch.testing.assert_close(got_loss, loss, rtol=1e-12, atol=0)
        assert relative_error(got, expected) <= 1e-10


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("options", [{}, {"hvp": "finite-difference"}, {"linearize": False}], ids=str)
def test_the_report_has_one_support_loss_per_step_and_task(strategy, steps, options):
    _, objective, tasks = problem(mlp)
    engine = make(strategy, inner=GradientDescent(lr=0.2, steps=steps), **options)
    report = engine(objective, tasks).report
    assert report.support_loss.shape == (steps, len(tasks))
    assert report.query_loss.shape == (len(tasks),)
    with torch.no_grad():
        assert torch.equal(engine(objective, tasks).report.support_loss, report.support_loss)


def test_an_optimizer_lowers_the_loss(strategy):
    model, objective, tasks = problem(mlp)
    engine, optimizer = make(strategy), torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        result = engine(objective, tasks)
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.item())
    assert losses == sorted(losses, reverse=True)


def test_gradients_can_be_clipped(strategy):
    model, objective, tasks = problem(mlp)
    make(strategy)(objective, tasks).loss.backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-3) > 1e-3
    assert 0.99e-3 < nn.utils.get_total_norm(p.grad for p in model.parameters()) <= 1e-3


def test_tasks_made_in_inference_mode(strategy):
    _, objective, _ = problem(mlp)
    with torch.inference_mode():
        result = make(strategy)(objective, classification((4,)))
    assert result.loss.isfinite() and not result.loss.requires_grad


def test_strategies_are_frozen_keyword_only_dataclasses(strategy):
    engine = make(strategy)
    assert dataclasses.is_dataclass(strategy)
    assert all(f.kw_only for f in dataclasses.fields(strategy) if f.init)
    with pytest.raises(dataclasses.FrozenInstanceError):
        engine.chunk_size = 3
    changed = dataclasses.replace(engine, chunk_size=3)
    assert changed.chunk_size == 3 and engine.chunk_size is None
    assert dataclasses.replace(changed, chunk_size=None) == engine == copy.deepcopy(engine)


def test_strategies_are_documented(strategy):
    assert "Cost" in strategy.__doc__ and "Memory" in strategy.__doc__


def test_fields_that_every_strategy_has(strategy):
    assert {f.name for f in dataclasses.fields(FOMAML)} <= {f.name for f in dataclasses.fields(strategy)}
