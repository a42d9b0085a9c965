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


class Accumulating(nn.Module):
    """Writes what differs by task into what does not, which a vectorised pass cannot."""

    def __init__(self, write) -> None:
        super().__init__()
        self.layer, self.write = nn.Linear(4, 3), write
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        return self.write(self, x)


def added(model, x):
    out = torch.zeros(len(x), 3)
    out.add_(model.layer.bias)
    return out + x @ model.layer.weight.T


def averaged(model, x):
    model.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return model.layer(x - model.mean)


def packed(model, x):
    lengths = (x[:, 0] > 0).long() + 1
    sequences = x.unsqueeze(1).expand(-1, 2, -1)
    return model.layer(nn.utils.rnn.pack_padded_sequence(sequences, lengths, True, False).data)[: len(x)]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: type(engine).__name__)
@pytest.mark.parametrize("write", [added, averaged, packed])
def test_whatever_stops_a_vectorised_pass(write, engine):
    objective, batch = Objective(Accumulating(write).double(), F.cross_entropy), tasks(3).to(dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        alone, together = (replace(engine, chunk_size=size).value_and_grad(objective, batch)[1] for size in (1, None))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(together, alone)


def test_an_error_of_the_model_is_that_of_a_task_alone():
    narrow = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes cannot be multiplied \(5x4 and 3x3\)") as found:
        FOMAML(inner=INNER, chunk_size=3)(Objective(narrow, F.cross_entropy), tasks(3))
    assert found.value.__context__ is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_lack_of_memory_is_not_taken_for_it(error):
    calls = []

    def loss(output, target):
        calls.append(1)
        raise error("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(error, match="allocate"):
        FOMAML(inner=INNER, chunk_size=3)(Objective(nn.Linear(4, 3), loss), tasks(3))
    assert len(calls) == 1


def test_a_vectorised_pass_that_fails_spends_no_random_numbers():
    """Its masks are those of the products and of the steps that are recomputed."""
    masks = []

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            mask = F.dropout(torch.ones_like(x))
            out = self.layer(mask * x)
            if bool(out.isfinite().all()):
                masks.append(mask)
            return out

    objective = Objective(Dropped(), F.cross_entropy)
    MAML(inner=GradientDescent(lr=0.1, steps=1), chunk_size=3, linearize=False)(objective, tasks(3))
    gradient, product = masks[:3], masks[-3:]
    assert len(masks) == 9
    for one, again in zip(gradient, product, strict=True):
        assert torch.equal(one, again)


@pytest.mark.parametrize("options", [{"chunk_size": 1, "microbatch_size": 2}, {"chunk_size": 1}], ids=str)
def test_a_loss_that_is_what_it_is_given_stays_as_it_is(options):
    """Gradients are added up in place, slice by slice: not in a parameter, nor in what the user has kept."""
    w, seen = torch.tensor(0.9, dtype=torch.float64), []

    def loss(params, batch):
        seen.append(params["w"].detach())
        return params["w"]

    x = torch.zeros(1, 4, 1, dtype=torch.float64)
    engine = FOMAML(inner=GradientDescent(lr=0.1, steps=1), **options)
    value, gradients = engine.value_and_grad(Objective.from_function(loss, {"w": w}), TaskBatch(support=x, query=x))
    assert value.item() == pytest.approx(0.8) and gradients["w"].item() == 1.0 and w.item() == 0.9
    assert {round(s.item(), 12) for s in seen} <= {0.9, 0.8}
