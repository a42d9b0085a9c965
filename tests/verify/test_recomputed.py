"""`verify` with recomputed blocks: right ones pass, and one that is another function the second time is named."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import imaml
from imaml import FOMAML, MAML, GradientDescent, Objective, TaskBatch, verify

LOOP = GradientDescent(lr=0.1, steps=2)
ENGINES = [MAML(inner=LOOP), FOMAML(inner=LOOP)]


def tasks():
    x, y = torch.randn(2, 2, 5, 4).double(), torch.randint(3, (2, 2, 5))
    return TaskBatch(support=(x[0], y[0]), query=(x[1], y[1]))


def both(engine, objective):
    batch = tasks()
    yield verify.meta_gradient(engine, objective, batch)
    yield verify.hvp(objective, None, tuple(t[0] for t in batch.support))


class Counts(nn.Module):
    """Scales by an attribute that it finds changed when it is called again."""

    def __init__(self, call):
        super().__init__()
        self.enter, self.leave, self.call, self.factor = nn.Linear(4, 4), nn.Linear(4, 3), call, 1.0

    def scaled(self, h):
        return self.enter(h).tanh() * self.factor

    def forward(self, x):
        self.factor = 2.0
        h = self.call(self.scaled, x)
        self.factor = 1.0
        return self.leave(h)


class Right(Counts):
    def forward(self, x):
        return self.leave(self.call(self.scaled, x))


def checkpointed(function, x):
    return checkpoint(function, x, use_reentrant=False)


@pytest.mark.parametrize("call", [checkpointed, imaml.recompute])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_blocks_that_are_functions_pass(engine, call):
    model = Right(call)
    for objective in (Objective(model, F.cross_entropy), Objective(model, F.cross_entropy, recompute=[nn.Linear])):
        assert [found.status for found in both(engine, objective)] == ["passed"] * 2
        assert objective.model.factor == 1.0


@pytest.mark.parametrize("call", [checkpointed, imaml.recompute])
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_a_block_that_is_another_function_the_second_time_is_named(engine, call):
    for found in both(engine, Objective(Counts(call), F.cross_entropy)):
        assert found.status == "failed" and found.relative_error > 1e-3
        assert found.cause.startswith("Counts.scaled is recomputed, and is another function then")
        assert "Look for what changes between its calls" in found.cause


def test_a_function_that_recomputes_nothing_is_not_blamed_for_a_block():
    def plainly(objective, batch):
        objective.model.call = lambda function, x: function(x)
        return MAML(inner=LOOP).value_and_grad(objective, batch)[1]

    objective = Objective(Counts(checkpointed), F.cross_entropy)
    assert verify.meta_gradient(plainly, objective, tasks(), against="maml", inner=LOOP).status == "passed"


def test_pythons_random_numbers_in_a_block_are_refused():
    class Draws(nn.Linear):
        def forward(self, x):
            return super().forward(x) * random.random()

    objective = Objective(nn.Sequential(Draws(4, 3), nn.Tanh()), F.cross_entropy, recompute=["0"])
    with pytest.raises(ValueError, match=r"is not deterministic.*torch's global generators"):
        next(both(ENGINES[0], objective))


class Keeps(nn.Module):
    """A model that reads what a hook has taken out of a block."""

    def __init__(self):
        super().__init__()
        self.block, self.leave = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3)
        self.block[0].register_forward_hook(lambda module, args, output: setattr(module, "kept", output))

    def forward(self, x):
        h = self.block(x)
        return self.leave(h) + self.block[0].kept.square().mean()


def test_an_activation_that_a_hook_takes_out_of_a_block_is_refused():
    objective = Objective(Keeps(), F.cross_entropy, recompute=["block"])
    with pytest.raises(ValueError, match=r"an activation inside Sequential.forward, which is recomputed"):
        next(both(ENGINES[0], objective))
