"""Models and losses that write to their input: the user's tasks stay as they are, and the numbers are right."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective
from tests.engine.cases import classification, mlp
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.1, steps=2)
ENGINES = [
    MAML(inner=INNER),
    MAML(inner=INNER, hvp="forward-over-reverse"),
    MAML(inner=INNER, microbatch_size=2),
    FOMAML(inner=INNER),
    ImplicitMAML(inner=INNER, solver=CG(max_steps=20)),
    ImplicitMAML(inner=INNER, solver=CG(max_steps=20), curvature="ggn"),
]


class Applied(nn.Module):
    """A network after a function of the network and the input."""

    def __init__(self, net, first):
        super().__init__()
        self.net, self.first = net, first

    def forward(self, x):
        return self.net(self.first(self.net, x))


def written(output, target):
    return F.cross_entropy(output, target.neg_().add_(2))


WRITING = {  # in place, and as it should be
    "input": (lambda net, x: x.sub_(1), lambda net, x: x - 1, F.cross_entropy, F.cross_entropy),
    "parameter into input": (
        lambda net, x: x.add_(net[0].weight[0]),
        lambda net, x: x + net[0].weight[0],
        F.cross_entropy,
        F.cross_entropy,
    ),
    "target": (
        lambda net, x: x,
        lambda net, x: x,
        written,
        lambda output, target: F.cross_entropy(output, 2 - target),
    ),
    "one by one": (
        lambda net, x: x.mul_(2) if bool(x.sum() > -100) else x,
        lambda net, x: 2 * x,
        F.cross_entropy,
        F.cross_entropy,
    ),
}


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("engine", ENGINES, ids=range(len(ENGINES)))
@pytest.mark.parametrize("name", WRITING)
def test_tasks_are_never_changed(name, engine, chunk_size):
    first, pure, loss, pure_loss = WRITING[name]
    net, tasks = mlp(), classification((4,))
    given = copy.deepcopy(tasks)
    engine = replace(engine, chunk_size=chunk_size)
    got = engine.value_and_grad(Objective(Applied(net, first), loss), given)[1]
    for mine, theirs in ((given.support, tasks.support), (given.query, tasks.query)):
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(mine, theirs, strict=True))
    expected = engine.value_and_grad(Objective(Applied(net, pure), pure_loss), tasks)[1]
    assert relative_error(got, expected) <= 1e-10


def test_an_error_after_a_write_leaves_the_tasks_alone():
    def fails(net, x):
        x.zero_()
        raise ArithmeticError

    tasks = classification((4,))
    given = copy.deepcopy(tasks)
    with pytest.raises(ArithmeticError):
        FOMAML(inner=INNER)(Objective(Applied(mlp(), fails), F.cross_entropy), given)
    assert torch.equal(given.support[0], tasks.support[0])


def test_a_write_that_comes_late_is_refused():
    calls = []

    def late(net, x):
        calls.append(1)
        return x.mul_(2) if len(calls) == 2 else x

    with pytest.raises(ValueError, match="writes to its batch in place, which it did not at first"):
        FOMAML(inner=INNER, chunk_size=3)(Objective(Applied(mlp(), late), F.cross_entropy), classification((4,)))


def test_a_batch_is_copied_once(monkeypatch):
    copied, clone = [], torch.Tensor.clone
    tasks = classification((4,))

    def counted(tensor, *args, **kwargs):
        copied.append(tensor.shape)
        return clone(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "clone", counted)
    MAML(inner=GradientDescent(lr=0.1, steps=5), chunk_size=3)(Objective(mlp(), F.cross_entropy), tasks)
    assert copied.count(tasks.support[0].shape) == copied.count(tasks.query[0].shape) == 1
