"""Meta-gradients through trainings on minibatches: right ones pass, and wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from imaml import (
    CG,
    FOMAML,
    MAML,
    AdamW,
    GradientDescent,
    ImplicitMAML,
    MetaGradient,
    Minibatches,
    Objective,
    Task,
    TaskBatch,
)
from imaml.verify import meta_gradient
from tests.engine.unrolled_training import make_data, make_model, make_weights, weighted

INNER = GradientDescent(lr=0.3, steps=4)
SOLVER = CG(max_steps=100, rtol=1e-12)
ENDED = GradientDescent(lr=0.4, steps=40)
LAMBDA = 2.0
ENGINES = {
    "maml": MAML(inner=INNER),
    "maml, proximal": MAML(inner=INNER, regularization=0.5, checkpoints=1),
    "adamw": MAML(inner=AdamW(lr=0.1, steps=4, eps=1e-3), microbatch_size=2),
    "fomaml": FOMAML(inner=INNER),
}


def _source(**options: Any) -> Minibatches:
    return Minibatches.of(make_data(), batch_size=4, seed=3, **options)


def _tasks(**options: Any) -> list[Task]:
    return [Task(support=_source(**options), query=make_data(5, seed=s)) for s in (3, 4)]


def _whole() -> list[Task]:
    """Of which a step sees all examples: the minimum of their mean is where its steps end."""
    return [replace(task, support=Minibatches.of(make_data(), batch_size=11)) for task in _tasks()]


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("stacks", [False, True])
def test_a_right_one_passes(engine: MetaGradient, stacks: bool) -> None:
    tasks: Any = TaskBatch.stack(_tasks()) if stacks else _tasks()
    verified = meta_gradient(engine, Objective(make_model().float(), F.cross_entropy), tasks)
    assert verified.status == "passed", verified


def test_a_right_one_by_example_weights_passes() -> None:
    objective = Objective(make_model(), weighted, outer_loss=F.cross_entropy, meta={"w": make_weights()})
    assert meta_gradient(ENGINES["maml"], objective, _tasks(indices=True)).status == "passed"


@pytest.mark.parametrize("curvature_batches", [None, 2])
def test_an_implicit_one_is_of_the_minimum_of_the_mean(curvature_batches: int | None) -> None:
    """An inner loop on minibatches does not get there: one that starts at the minimum, on whole batches, does."""
    objective = Objective(make_model(), F.cross_entropy, adapt=["2"])
    engine = ImplicitMAML(
        inner=ENDED, regularization=LAMBDA, solver=SOLVER, error_bound=False, curvature_batches=curvature_batches
    )
    assert meta_gradient(engine, objective, _whole()).status == "passed"
    if curvature_batches is None:
        return
    moving = meta_gradient(replace(engine, inner=INNER), objective, _tasks())
    assert moving.status == "failed" and "unconverged inner solution" in str(moving.cause)


def test_the_curvature_of_the_last_minibatch_is_named() -> None:
    objective = Objective(make_model(), F.cross_entropy, adapt=["2"])
    sizes = [5, 6]
    x, y = make_data()
    parts = list(zip(x.split(sizes), y.split(sizes), strict=True))
    tasks = [Task(support=Minibatches(parts), query=make_data(5, seed=3))]
    whole = Task(support=(x, y), query=tasks[0].query)

    def wrong(objective: Objective, tasks: list[Task]) -> dict[str, Tensor]:
        at_minimum = ImplicitMAML(inner=ENDED, regularization=LAMBDA, solver=SOLVER)
        with torch.no_grad():
            state = at_minimum(objective, [whole], return_state=True).state
        assert state is not None
        there = ImplicitMAML(inner=replace(INNER, steps=0), regularization=LAMBDA, solver=SOLVER, on_failure="ignore")
        return there.value_and_grad(objective, [replace(whole, support=parts[1])], start=state)[1]

    verified = meta_gradient(
        wrong, objective, tasks, against="implicit", inner=replace(INNER, steps=2), regularization=LAMBDA
    )
    assert verified.status == "failed" and "that of the last minibatch" in str(verified.cause), verified


def _other_batches(other: Callable[[int], int], *, in_the_sweep_alone: bool) -> Callable[..., Any]:
    """MAML by hand, whose Hessians, or all of whose steps, are those of another step's minibatch."""

    def function(objective: Objective, tasks: list[Task]) -> Tensor:
        model, parts = objective.model, []
        assert model is not None
        theta = dict(model.named_parameters())

        def loss(phi: dict[str, Tensor], batch: Any) -> Tensor:
            return F.cross_entropy(torch.func.functional_call(model, phi, (batch[0],)), batch[1])

        for task in tasks:
            phi = {n: p.detach().requires_grad_() for n, p in theta.items()}
            states = []
            for k in range(INNER.steps):
                states.append(phi)
                batch = task.support.at(k if in_the_sweep_alone else other(k))
                grads = torch.autograd.grad(loss(phi, batch), list(phi.values()))
                phi = {n: (p - 0.3 * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads, strict=True)}
            a = torch.autograd.grad(loss(phi, task.query), list(phi.values()))
            for k in reversed(range(INNER.steps)):
                leaves = list(states[k].values())
                grads = torch.autograd.grad(loss(states[k], task.support.at(other(k))), leaves, create_graph=True)
                product = torch.autograd.grad(grads, leaves, a)
                a = tuple(one - 0.3 * two for one, two in zip(a, product, strict=True))
            parts.append(torch.cat([t.flatten() for t in a]))
        return torch.stack(parts).mean(0)

    return function


@pytest.mark.parametrize(
    ("other", "in_the_sweep_alone", "words"),
    [
        (lambda k: 0, False, "the first minibatch serves in every inner step"),
        (lambda k: min(k + 1, 3), True, "minibatch of the step after it"),
        (lambda k: max(k - 1, 0), True, "minibatch of the step before it"),
        (lambda k: 3, True, "minibatch of the last step"),
        (lambda k: 0, True, "minibatch of the first step"),
        (lambda k: k, True, None),
    ],
)
def test_another_minibatch_than_that_of_the_step_is_named(
    other: Callable[[int], int], in_the_sweep_alone: bool, words: str | None
) -> None:
    function = _other_batches(other, in_the_sweep_alone=in_the_sweep_alone)
    model = make_model()
    verified = meta_gradient(function, Objective(model, F.cross_entropy), _tasks(), against="maml", inner=INNER)
    assert verified.status == ("failed" if words else "passed")
    assert words is None or words in str(verified.cause), verified


@pytest.mark.parametrize(
    "known", [MAML(inner=replace(INNER, steps=3)), MAML(inner=INNER, truncate=2), FOMAML(inner=INNER)]
)
def test_mistakes_that_are_known_without_minibatches_are_named_with_them(known: MetaGradient) -> None:
    def function(objective: Objective, tasks: Any) -> Any:
        return known.value_and_grad(objective, tasks)[1]

    tasks = [replace(task, support=Minibatches([task.support.at(k) for k in range(4)])) for task in _tasks()]
    verified = meta_gradient(function, Objective(make_model(), F.cross_entropy), tasks, against="maml", inner=INNER)
    assert verified.status == "failed"
    assert any(words in str(verified.cause) for words in ("one inner step too few", "truncated", "first-order"))


def test_a_data_set_is_verified_in_float64() -> None:
    x, y = make_data()
    task = Task(support=Minibatches.of(TensorDataset(x.float(), y), batch_size=4), query=(x.float(), y))
    verified = meta_gradient(ENGINES["maml"], Objective(make_model().float(), F.cross_entropy), [task])
    assert verified.status == "passed"


def test_a_source_without_an_end_has_no_mean() -> None:
    task = Task(support=Minibatches(lambda step: make_data(4, seed=step)), query=make_data(5))
    objective = Objective(make_model(), F.cross_entropy, adapt=["2"])
    assert meta_gradient(MAML(inner=INNER), objective, [task]).status == "passed"

    def function(objective: Objective, tasks: Any) -> Any:
        return FOMAML(inner=INNER).value_and_grad(objective, tasks)[1]

    with pytest.raises(ValueError, match="without an end"):
        meta_gradient(function, objective, [task], against="implicit", inner=INNER, regularization=LAMBDA)
