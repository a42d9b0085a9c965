"""Graphs of the last inner steps, and states of those before: from none to all, the same meta-gradient."""

from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import MAML, Adam, GradientDescent, Objective, TaskBatch
from imaml.measure import peak_memory
from tests.engine.cases import classification
from tests.inner import cases, unrolled
from tests.oracles import relative_error

MOST = 5


def learned(steps):
    """Every parameter and step with a step size of its own, which is learned."""
    return GradientDescent(lr=lambda meta: list(meta["log_lr"][:steps].exp()), steps=steps)


INNERS = {
    "gradient descent": lambda steps: GradientDescent(lr=0.1, steps=steps),
    "momentum": lambda steps: GradientDescent(lr=0.1, steps=steps, momentum=0.8),
    "adam": lambda steps: Adam(lr=0.05, steps=steps),
    "learned": learned,
}
CASES = [
    ("gradient descent", {"checkpoints": 0, "chunk_size": 1}),
    ("gradient descent", {"checkpoints": 2, "storage": "disk"}),
    ("momentum", {}),
    ("momentum", {"truncate": 3, "checkpoints": 1, "storage": "disk"}),
    ("adam", {"checkpoints": 1, "regularization": 0.3}),
    ("adam", {"storage": "disk"}),
    ("learned", {}),
    ("learned", {"checkpoints": 1, "chunk_size": 1}),
]
"""Inner loops, and what is kept of the other steps; with tasks vectorised and not."""


def result(engine, objective, tasks):
    """The meta-gradient and the report of one call."""
    found, parameters = engine(objective, tasks), objective.parameters()
    return dict(zip(parameters, torch.autograd.grad(found.loss, parameters.values()), strict=True)), found.report


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_any_number_of_graphs_gives_the_same_meta_gradient(name, options):
    model, tasks = cases.make_model(), cases.make_tasks()
    for steps in range(1 if name == "learned" else 0, MOST + 1):
        meta = {"log_lr": cases.random(MOST)} if name == "learned" else {}
        objective, inner = Objective(model, F.mse_loss, meta=meta), INNERS[name](steps)
        gradient, expected = result(MAML(inner=inner, linearize=False, **options), objective, tasks)
        for graphs in range(1, steps + 1):
            found, report = result(MAML(inner=inner, linearize=graphs, **options), objective, tasks)
            assert relative_error(found, gradient) <= 1e-12
            torch.testing.assert_close(report.support_loss, expected.support_loss, rtol=1e-12, atol=0)
            assert report.hvps == expected.hvps


@pytest.mark.parametrize("graphs", [1, 2, 3])
@pytest.mark.parametrize("truncate", [None, 3])
def test_it_is_that_of_an_unrolled_loop(graphs, truncate):
    model, tasks = cases.make_model(), cases.make_tasks()
    loss, rate = cases.plain_loss(model), lambda meta, name, k: 0.05
    expected = unrolled.meta_gradient(
        loss, loss, dict(model.named_parameters()), {}, tasks, unrolled.adam(), MOST, lr=rate, truncate=truncate
    )
    engine = MAML(inner=Adam(lr=0.05, steps=MOST), linearize=graphs, checkpoints=1, truncate=truncate)
    assert relative_error(engine.value_and_grad(Objective(model, F.mse_loss), tasks)[1], expected) <= 1e-12


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("hvp", ["auto", "forward-over-reverse"])
def test_random_masks_are_those_of_the_step(chunk_size, hvp):
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    tasks, inner = classification((4,)), GradientDescent(lr=0.2, steps=4)

    def found(graphs, **options):
        torch.manual_seed(3)
        engine = MAML(inner=inner, linearize=graphs, chunk_size=chunk_size, hvp=hvp, **options)
        return engine.value_and_grad(Objective(net, F.cross_entropy), tasks)[1]

    expected = found(False)
    assert all(relative_error(found(graphs, checkpoints=1), expected) <= 1e-12 for graphs in range(1, 5))


def test_one_is_a_step_and_true_is_all():
    """Though Python says that they are equal, as 0 and False, which mean the same."""
    inner = GradientDescent(lr=0.1, steps=MOST)
    tapes = {each: [MAML(inner=inner, linearize=n)._tape(graphs=2) for n in each] for each in [(1, True), (0, False)]}
    assert [tape.graphs for tape in tapes[1, True]] == [1, MOST]
    assert [tape.graphs for tape in tapes[0, False]] == [0, 0]
    assert MAML(inner=inner, linearize=99)._tape(graphs=2).graphs == MOST
    assert MAML(inner=inner)._tape(graphs=2).graphs == 2
    assert MAML(inner=inner, truncate=3, linearize=True)._tape(graphs=0).graphs == 3


@pytest.mark.parametrize(("storage", "checkpoints"), [("disk", None), ("cpu", None), ("device", 2)])
def test_only_a_number_leaves_steps_to_checkpoints_and_storage(storage, checkpoints):
    options = {"inner": GradientDescent(lr=0.1, steps=MOST), "storage": storage, "checkpoints": checkpoints}
    for graphs in (0, 1, 3, MOST, 99):
        assert MAML(linearize=graphs, **options)._tape(graphs=0).graphs == min(graphs, MOST)
    with pytest.raises(ValueError, match="linearize=True keeps the graphs of inner steps, all of them, where a number"):
        MAML(linearize=True, **options)
    assert MAML(**options)._tape(graphs=2).graphs == 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (-1, ValueError, "`linearize`, unless None, True or False, must be >= 0. Got -1"),
        (1.5, TypeError, "`linearize`, unless None, True or False, must be an integer. Got 1.5"),
        ("all", TypeError, "must be an integer. Got 'all'"),
    ],
)
def test_it_is_a_number_or_true_or_false(given, error, message):
    with pytest.raises(error, match=message):
        MAML(inner=GradientDescent(lr=0.1, steps=2), linearize=given)


def test_a_graph_is_of_the_whole_support_set():
    options = {"inner": GradientDescent(lr=0.1, steps=2), "microbatch_size": 2}
    with pytest.raises(ValueError, match="linearize=1 keeps .*whole support set. Expected microbatch_size=None. Got 2"):
        MAML(linearize=1, **options)
    assert MAML(linearize=0, **options)._tape(graphs=2).graphs == 0


@cache
def deep():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh()) for _ in range(6)]
    x = torch.randn(1, 100, 16)
    return nn.Sequential(*layers), TaskBatch(support=(x, x), query=(x, x))


def peak(graphs, recompute=(), **options):
    model, tasks = deep()
    objective = Objective(model, F.mse_loss, recompute=recompute)
    engine = MAML(inner=GradientDescent(lr=0.1, steps=4), linearize=graphs, **options)
    engine.value_and_grad(objective, tasks)
    return peak_memory(lambda: engine.value_and_grad(objective, tasks))


def test_each_graph_is_as_much_memory_between_none_and_all():
    sizes = [peak(graphs) for graphs in (False, 1, 2, 3, True)]
    growth = [b - a for a, b in pairwise(sizes[1:])]
    assert min(growth) > 0.2 * sizes[0] and max(growth) <= 1.2 * min(growth)
    assert peak(1, checkpoints=0) < sizes[1]


def test_graphs_of_recomputed_blocks_are_their_inputs():
    plain, blocks = ([peak(graphs, recompute) for graphs in (1, 3)] for recompute in ((), ["?"]))
    assert blocks[1] - blocks[0] < 0.3 * (plain[1] - plain[0])
