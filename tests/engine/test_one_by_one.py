"""Models that `vmap` refuses: the tasks of a chunk run one after the other, at the cost of as many single ones."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch

INNER = GradientDescent(lr=0.1, steps=3)
ENGINES = (FOMAML(inner=INNER), MAML(inner=INNER), ImplicitMAML(inner=INNER, solver=CG(max_steps=3)))


class Branching(nn.Module):
    """Control flow that depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))

    def forward(self, x):
        return self.layers(x if bool(x.sum() > 0) else -x)


class Written(TorchDispatchMode):
    """Counts the entries that operations write into new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if not any(r.alias_info for r in func._schema.returns):
            self.entries += sum(t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor))
        return found


def tasks(count):
    generator = torch.Generator().manual_seed(0)

    def batch():
        return torch.randn(count, 5, 4, generator=generator), torch.randint(3, (count, 5), generator=generator)

    return TaskBatch(support=batch(), query=batch())


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_the_cost_is_linear_in_the_tasks(engine):
    objective, written = Objective(Branching(), F.cross_entropy), {}
    for count in (2, 16):
        batch = tasks(count)
        engine(objective, batch)  # looks at the shapes
        with Written() as written[count]:
            engine(objective, batch)
    assert written[16].entries <= 8 * 1.05 * written[2].entries


class Clamped(Branching):
    """Writes to its own parameters."""

    def forward(self, x):
        sign = 1 if bool(x.sum() > 0) else -1
        with torch.no_grad():
            self.layers[0].weight.clamp_(-1, 1)
        return self.layers(sign * x)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
def test_a_model_that_writes_to_its_parameters_is_refused_rather_than_written_to_in_part(engine):
    objective = Objective(Clamped(), F.cross_entropy)
    with pytest.raises(RuntimeError, match="writes to its parameters in place .* use chunk_size=1"):
        engine(objective, tasks(3))
    replace(engine, chunk_size=1)(objective, tasks(3))


def test_a_loss_may_write_into_the_output():
    def loss(out, y):
        out.sub_(F.one_hot(y, 3))
        return out.square().mean()

    objective = Objective(Branching(), loss)
    engines = [ImplicitMAML(inner=INNER, curvature="ggn", chunk_size=size) for size in (1, 3)]
    alone, together = (engine.value_and_grad(objective, tasks(3))[0] for engine in engines)
    torch.testing.assert_close(alone, together)
