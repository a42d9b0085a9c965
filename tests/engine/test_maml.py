"""MAML is the gradient of the unrolled inner loop, however it is computed."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from imaml import MAML, GradientDescent
from tests.engine.cases import MODELS, mlp, oracle_setting, problem
from tests.oracles import finite_difference, relative_error, unrolled

EXACT = ("auto", "forward-over-reverse", "reverse-over-reverse")
CHUNKS = (None, 1, 2)


def variants(steps):
    """Every mode with every chunk size, then every number of checkpoints."""
    if steps > 5:  # expensive: each value once
        return [dict(hvp=EXACT[1], chunk_size=2), dict(hvp=EXACT[2], chunk_size=None, checkpoints=2)]
    chunked = [dict(hvp=hvp, chunk_size=size) for hvp, size in itertools.product(EXACT, CHUNKS)]
    return chunked + [dict(checkpoints=count) for count in (0, 1, 2, 5, 100)]


@pytest.mark.parametrize("regularization", [0.0, 0.7])
@pytest.mark.parametrize("steps", [1, 5, 16])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_equals_the_unrolled_loop(build, steps, regularization):
    model, objective, tasks = problem(build)
    inner = GradientDescent(lr=0.2, steps=steps)
    engines = [MAML(inner=inner, regularization=regularization, **v) for v in variants(steps)]
    loss, expected = unrolled(oracle_setting(engines[0], model, objective, tasks))
    for engine in engines:
        got_loss, got = engine.value_and_grad(objective, tasks)
        torch.testing.assert_close(got_loss, loss, rtol=1e-10, atol=0)
        assert relative_error(got, expected) <= 1e-10, engine


@pytest.mark.parametrize("checkpoints", [0, 1, 2, 5, 100])
def test_16_steps_with_every_number_of_checkpoints(checkpoints):
    model, objective, tasks = problem(mlp)
    engine = MAML(inner=GradientDescent(lr=0.2, steps=16), checkpoints=checkpoints)
    _, expected = unrolled(oracle_setting(engine, model, objective, tasks))
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-10


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_finite_differences_of_the_gradient(build, chunk_size):
    model, objective, tasks = problem(build)
    engine = MAML(inner=GradientDescent(lr=0.2, steps=5), hvp="finite-difference", chunk_size=chunk_size)
    _, expected = unrolled(oracle_setting(engine, model, objective, tasks))
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-6


def test_one_number_of_regularization_per_parameter():
    model, objective, tasks = problem(mlp)
    weights = {n: 0.1 * (i + 1) for i, n in enumerate(objective.adapted)}
    engine = MAML(inner=GradientDescent(lr=0.2, steps=4), regularization=weights)
    _, expected = unrolled(oracle_setting(engine, model, objective, tasks))
    assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-10


def test_is_the_slope_of_the_query_loss():
    """Neither the library nor the oracle can be wrong together: no second derivative is taken here."""
    model, objective, tasks = problem(mlp)
    engine = MAML(inner=GradientDescent(lr=0.2, steps=5), regularization=0.3)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    slope = finite_difference(oracle_setting(engine, model, objective, tasks), direction)
    _, gradient = engine.value_and_grad(objective, tasks)
    torch.testing.assert_close(sum((gradient[n] * d).sum() for n, d in direction.items()), slope, rtol=1e-7, atol=0)


@pytest.mark.parametrize("adapt", [["2"], ["0.weight", "*.bias"]], ids=str)
@pytest.mark.parametrize("hvp", EXACT)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_other_parameters_are_learned_through_the_adaptation(adapt, hvp, chunk_size):
    model, objective, tasks = problem(mlp, adapt=adapt)
    engine = MAML(inner=GradientDescent(lr=0.3, steps=3), hvp=hvp, chunk_size=chunk_size, regularization=0.2)
    _, expected = unrolled(oracle_setting(engine, model, objective, tasks))
    _, got = engine.value_and_grad(objective, tasks)
    assert relative_error(got, expected) <= 1e-10
    assert all(got[n].any() for n in got if n not in objective.adapted)


def test_without_steps_it_is_the_gradient_of_the_query_loss():
    model, objective, tasks = problem(mlp)
    _, got = MAML(inner=GradientDescent(lr=0.2, steps=0)).value_and_grad(objective, tasks)
    x, y = (t.flatten(0, 1) for t in tasks.query)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert relative_error(got, dict(zip(objective.adapted, expected, strict=True))) <= 1e-14
