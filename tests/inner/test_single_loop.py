"""Stochastic implicit gradients: inner variables and a linear system that go on from call to call, against plain torch.

AmIGO (arXiv 2111.14580) with one step each: z of a minibatch, then u of the next, then the hyper-gradient of both.
"""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from imaml import CG, GradientDescent, ImplicitMAML, Minibatches, Neumann, NewtonCG, Task, bilevel
from tests.oracles import relative_error

LR, ALPHA, BATCH = 0.3, 0.4, 5
F64 = torch.float64


def draw(examples, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 4, generator=generator, dtype=F64)
    return x, (x.sum(1) + torch.randn(examples, generator=generator, dtype=F64) > 0).to(F64)


TRAIN, VALID = draw(20, 0), draw(12, 1)


def outer_loss(inner, meta, batch):
    return F.binary_cross_entropy_with_logits(batch[0] @ inner["w"], batch[1])


def inner_loss(inner, meta, batch):
    x, (y, which) = batch
    losses = F.binary_cross_entropy_with_logits(x @ inner["w"], y, reduction="none")
    return (meta["weights"][which].sigmoid() * losses).mean() + (meta["decay"].exp() * inner["w"] ** 2).sum()


def setting(steps=1):
    """An engine, a problem, and its meta-parameters."""
    meta = {
        "weights": torch.linspace(-1, 1, 20, dtype=F64, requires_grad=True),
        "decay": torch.linspace(-3, -2, 4, dtype=F64, requires_grad=True),
    }
    problem = bilevel(inner_loss, outer_loss, inner={"w": torch.zeros(4, dtype=F64)}, meta=meta)
    inner = GradientDescent(lr=LR, steps=steps)
    solver = Neumann(max_steps=1, step_size=ALPHA)
    engine = ImplicitMAML(inner=inner, regularization=None, solver=solver, curvature_batches=1, warm_start=True)
    return engine, problem, meta


def minibatches():
    return (
        Minibatches.of(TRAIN, batch_size=BATCH, seed=3, indices=True),
        Minibatches.of(VALID, batch_size=BATCH, seed=4),
    )


def plain_call(z, u, meta, first, train, query, steps=1):
    """z and u after a call, and the hyper-gradient, by double backward."""
    for k in range(first, first + steps):
        z = z.detach().requires_grad_()
        z = z - LR * torch.autograd.grad(inner_loss({"w": z}, meta, train.at(k)), z)[0]
    z = z.detach().requires_grad_()
    gradient = torch.autograd.grad(inner_loss({"w": z}, meta, train.at(first + steps)), z, create_graph=True)[0]
    v = torch.autograd.grad(outer_loss({"w": z}, meta, query), z)[0]
    u = u + ALPHA * (v - torch.autograd.grad(gradient @ u, z, retain_graph=True)[0])
    mixed = torch.autograd.grad(gradient @ u, list(meta.values()))
    return z.detach(), u, {name: -g for name, g in zip(meta, mixed, strict=True)}


@pytest.mark.parametrize("steps", [1, 3])
def test_every_call_is_that_of_a_plain_loop(steps):
    engine, problem, meta = setting(steps)
    (train, valid), state = minibatches(), None
    z = u = torch.zeros(4, dtype=F64)
    optimizer = torch.optim.SGD(meta.values(), lr=0.5)
    for k in range(6):
        z, u, expected = plain_call(z, u, meta, k * steps, train, valid.at(k), steps)
        result = engine(problem, [Task(support=train, query=valid.at(k))], start=state, return_state=True)
        state = result.state
        optimizer.zero_grad()
        result.loss.backward()
        assert relative_error({n: p.grad for n, p in meta.items()}, expected) <= 1e-12
        assert relative_error({"z": state.parameters["w"][0], "u": state.solution[0]}, {"z": z, "u": u}) <= 1e-12
        optimizer.step()


def test_the_solution_of_a_state_is_the_start_whatever_its_residual():
    """On a minibatch the residual says little of it: a start at zero would be a step back."""
    engine, problem, meta = setting()
    train, valid = minibatches()
    task = Task(support=train, query=valid.at(0))
    state = engine(problem, [task], return_state=True).state
    far = replace(state, solution=torch.full_like(state.solution, 100.0))
    result = engine(problem, [task], start=far, return_state=True)
    _, u, _ = plain_call(state.parameters["w"][0], far.solution[0], meta, 1, train, task.query)
    assert relative_error({"u": result.state.solution[0]}, {"u": u}) <= 1e-12
    assert (result.report.gradients, result.report.hvps) == (3, 3)  # products: the start, the step, the mixed one


def test_a_solution_in_a_state_is_kept_there_alone():
    engine, problem, _ = setting()
    (train, valid), state = minibatches(), None
    for k in range(4):
        result = engine(problem, [Task(support=train, query=valid.at(k))], start=state, return_state=True)
        state = result.state
    assert len(engine._solutions.known) == 1  # that of the first call, which had no state


def test_many_steps_come_near_the_hyper_gradient():
    """With all examples in every batch nothing is left to chance."""
    engine, problem, meta = setting()
    whole = TRAIN[0], (TRAIN[1], torch.arange(20))
    solver = CG(max_steps=50, rtol=1e-14)
    exact = replace(engine, inner=NewtonCG(steps=20, solver=solver), solver=solver, warm_start=False)
    expected = exact.value_and_grad(problem, [Task(support=whole, query=VALID)])[1]
    train, state, errors = Minibatches(lambda step: whole), None, []
    for _ in range(300):
        result = engine(problem, [Task(support=train, query=VALID)], start=state, return_state=True)
        state = result.state
        if state.step in (1, 30, 300):
            found = torch.autograd.grad(result.loss, list(meta.values()))
            errors.append(relative_error(dict(zip(meta, found, strict=True)), {name: expected[name] for name in meta}))
    assert errors[0] > 0.5 > errors[1] > 10 * errors[2]
