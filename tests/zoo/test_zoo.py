"""`imaml.verify` flags every wrong implementation of the zoo, names the cause of most, and raises no false alarm."""

from collections import Counter
from functools import cache

import pytest
import torch

from imaml import GradientDescent
from imaml.verify import meta_gradient
from tests import oracles
from tests.zoo import (  # the modules of specimens fill the zoo
    problems,
    right,
    wrong_implicit,  # noqa: F401
    wrong_maml,  # noqa: F401
    wrong_modes,  # noqa: F401
    wrong_pytorch,  # noqa: F401
    wrong_solvers,  # noqa: F401
)
from tests.zoo.drawn import draw
from tests.zoo.specimen import ZOO

DRAWN = 300
RIGHT = {"maml": [right.unrolled], "implicit": [right.implicit, right.dense_implicit]}
"""By what they compute. `swept` has no proximal term, and is added where there is none."""
SETTINGS = list(dict.fromkeys((s.problem, s.setup) for s in ZOO if s.setup != problems.BRIEF))

each_specimen = pytest.mark.parametrize("specimen", ZOO, ids=lambda s: s.name)


def verify(function, setup, objective, tasks):
    return meta_gradient(
        function,
        objective,
        tasks,
        against=setup.against,
        inner=GradientDescent(lr=setup.lr, steps=setup.steps),
        regularization=setup.lam,
    )


@cache
def truth(problem, setup):
    """By the oracles; an implicit gradient belongs to the stationary point, however few the steps of `setup`."""
    objective, tasks = problem()
    is_implicit = setup.against == "implicit"
    setting = oracles.Setting(
        loss=lambda values, batch: objective.evaluate(values, batch)[0],
        theta={n: p.detach().clone() for n, p in objective.parameters().items()},
        adapted=objective.adapted,
        tasks=[(task.support, task.query) for task in tasks],
        lr=setup.lr,
        steps=problems.IMPLICIT.steps if is_implicit else setup.steps,
        damping=setup.lam,
    )
    return (oracles.implicit if is_implicit else oracles.unrolled)(setting)[1]


def test_the_zoo_is_large_enough():
    assert len(ZOO) == len({s.name for s in ZOO}) >= 16
    assert sum(s.cause is not None for s in ZOO) >= 12


@each_specimen
def test_a_specimen_is_wrong(specimen):
    objective, tasks = specimen.problem()
    got = specimen.make(specimen.setup)(objective, tasks)
    assert oracles.relative_error(got, truth(specimen.problem, specimen.setup)) > 1e-3


@pytest.mark.parametrize(("problem", "setup"), SETTINGS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_right_implementations_pass(problem, setup):
    objective, tasks = problem()
    for make in RIGHT[setup.against] + [right.swept] * (setup.lam == 0):
        function = make(setup)
        assert oracles.relative_error(function(objective, tasks), truth(problem, setup)) <= 1e-9
        verdict = verify(function, setup, objective, tasks)
        assert verdict.status == "passed" and verdict.cause is None, str(verdict)


@each_specimen
def test_a_specimen_is_flagged_and_its_cause_named(specimen):
    objective, tasks = specimen.problem()
    before = {n: p.detach().clone() for n, p in objective.model.state_dict().items()}
    verdict = verify(specimen.make(specimen.setup), specimen.setup, objective, tasks)
    assert verdict.status == "failed", str(verdict)
    if specimen.cause is not None:
        assert specimen.cause in (verdict.cause or "").lower(), str(verdict)
    after = objective.model.state_dict()
    assert all(torch.equal(after[n], value) for n, value in before.items())


def test_no_false_alarm_on_drawn_problems():
    outcomes = Counter()
    for seed in range(DRAWN):
        engine, objective, tasks = draw(seed)
        verdict = meta_gradient(engine, objective, tasks)
        assert verdict.status != "failed", f"problem {seed}: {engine} {objective.model}\n{verdict}"
        outcomes[verdict.status] += 1
    assert outcomes["inconclusive"] < 0.05 * DRAWN, outcomes
