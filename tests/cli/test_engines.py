"""The engines that `imaml bench` and `imaml plan` look at."""

from dataclasses import replace

import pytest
import torch

from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, NewtonCG, TorchOptimizer
from imaml.cli._engines import DEFAULTS, engines
from imaml.cli._factory import Made
from imaml.cli._options import STRATEGIES, EngineOptions

ADAM = Adam(lr=0.1, steps=3)
LBFGS = TorchOptimizer(torch.optim.LBFGS, steps=4)


def of(subject, strategies=STRATEGIES, **options):
    return dict(engines(Made(None, None, subject), strategies, EngineOptions(**options)))


def test_without_an_engine_they_are_those_of_the_options():
    found = of(None, inner_lr=0.3, checkpoints=2)
    assert found["maml"] == MAML(inner=GradientDescent(lr=0.3, steps=5), checkpoints=2)
    assert found["fomaml"] == FOMAML(inner=GradientDescent(lr=0.3, steps=5))
    assert found["imaml"].solver.max_steps == DEFAULTS["imaml"].cg_steps


def test_the_engine_of_the_problem_is_kept_and_the_others_take_its_inner_loop():
    subject = MAML(inner=ADAM, regularization=0.5, checkpoints=2, hvp="finite-difference", microbatch_size=2)
    found = of(subject)
    assert found["maml"] == subject
    assert found["fomaml"] == FOMAML(inner=ADAM, regularization=0.5, microbatch_size=2)
    implicit = found["imaml"]
    assert (implicit.inner, implicit.regularization, implicit.hvp) == (ADAM, 0.5, "finite-difference")


def test_options_change_the_engine_of_the_problem():
    subject = MAML(inner=ADAM, regularization=0.5, checkpoints=2)
    found = of(subject, inner_lr=0.2, inner_steps=7, checkpoints=1, regularization=0.25)
    inner = Adam(lr=0.2, steps=7)
    assert found["maml"] == MAML(inner=inner, regularization=0.25, checkpoints=1)
    assert found["imaml"].inner == inner and found["imaml"].regularization == 0.25


def test_an_implicit_engine_keeps_its_solver_unless_steps_are_given():
    subject = ImplicitMAML(inner=ADAM, solver=CG(max_steps=3), curvature="ggn", warm_start=True, on_failure="raise")
    assert of(subject)["imaml"] == subject
    assert of(subject, cg_steps=9)["imaml"].solver.max_steps == 9


def test_implicit_differentiation_gets_a_proximal_term_where_the_problem_has_none():
    assert of(FOMAML(inner=ADAM))["imaml"].regularization == DEFAULTS["imaml"].regularization


@pytest.mark.parametrize("inner", [LBFGS, NewtonCG(steps=2), Adam(lr=0.1, steps=3, stationarity=1e-3)])
def test_a_strategy_that_cannot_take_the_inner_loop_says_why(inner):
    found = of(ImplicitMAML(inner=inner))
    assert "MAML differentiates" in found["maml"]
    assert found["fomaml"].inner == found["imaml"].inner == inner
    with pytest.raises(ValueError, match="MAML differentiates"):
        of(ImplicitMAML(inner=inner), ("maml",))


def test_a_step_size_that_the_inner_loop_does_not_have():
    with pytest.raises(ValueError, match="--inner-lr does not apply to the TorchOptimizer of the problem. Got 0.1"):
        of(FOMAML(inner=LBFGS), inner_lr=0.1)
    assert of(FOMAML(inner=LBFGS), inner_steps=9)["fomaml"].inner == replace(LBFGS, steps=9)


def test_at_least_one_strategy():
    with pytest.raises(ValueError, match="--strategies needs at least one"):
        of(None, ())
