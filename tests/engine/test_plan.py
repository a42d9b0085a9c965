"""What runs at once where the user leaves it open, and what that costs."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, FOMAML, MAML, Adam, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml._engine import chunking
from imaml._losses.replay import Role
from tests.engine.cases import classification, mlp, problem
from tests.losses import loss_of
from tests.oracles import relative_error

INNER = GradientDescent(lr=0.1, steps=3)
LAYER = 1000 * 8  # bytes of one activation below, for one example


def wide(queries=2):
    """A network that saves one activation of 1000 an example, and little else."""
    net = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 3)).double()
    return Objective(net, F.cross_entropy), classification((4,), tasks=6, support=5, query=queries)


def losses(objective, tasks):
    """Of the first task, on its support and its query set, and theta."""
    (support, theta), (query, _) = (
        loss_of(objective, batch, role=role)
        for batch, role in ((tasks[:1].support, Role.SUPPORT), (tasks[:1].query, Role.QUERY))
    )
    return theta, support, query


def test_saved_bytes_are_those_of_the_activations():
    """Of tanh the output alone, which the last layer shares; and little for the cross entropy."""
    theta, support, _ = losses(*wide())
    found = chunking.saved_bytes(support.whole, theta)
    assert 5 * LAYER <= found <= 5 * (LAYER + 200)


def test_nothing_is_left_behind():
    theta, support, _ = losses(*wide())
    chunking.saved_bytes(support.whole, theta)  # a slice keeps views of its batch
    gc.collect()
    before = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    chunking.saved_bytes(support.whole, theta)
    gc.collect()
    assert sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()) <= before


def footprint(**changes):
    found = {"support": 5 * LAYER, "query": 5 * LAYER, "vector": 0, "room": 110 * LAYER, "keeps": True}
    found["held"] = chunking.STORED * found["room"]
    return chunking.Footprint(**found | changes)


def test_the_look_is_that_of_both_losses(monkeypatch):
    theta, support, query = losses(*wide(queries=20))
    monkeypatch.setattr(chunking, "VECTORISED", {"cpu": 110 * LAYER})
    found = chunking.Footprint.of(support, query, theta, compiled=False)
    assert found.support == chunking.saved_bytes(support.whole, theta)
    assert found == footprint(support=found.support, query=found.query, vector=theta.nbytes)
    assert found.most(chunking.Needs()) == 21 and found.chunking(6, chunking.Needs()).query_tasks == 5


def test_chunks_of_equal_sizes_fill_the_room():
    for tasks, size in ((1, 1), (20, 20), (22, 22), (23, 12), (100, 20)):
        assert footprint().chunking(tasks, chunking.Needs()) == chunking.Chunking(size, 22, 0)
    assert footprint(support=200 * LAYER, query=200 * LAYER).chunking(9, chunking.Needs()) == chunking.ONE_BY_ONE


def test_graphs_are_kept_where_they_fit_and_calls_are_few(monkeypatch):
    """Those of three steps of ten tasks fit; the calls of two chunks cost more than they save, or less."""
    monkeypatch.setattr(chunking, "KEPT", chunking._AGAIN * 3 * 5 * LAYER * 10)
    open_, few = chunking.Needs(most=3), chunking.Needs(least=2, most=2)
    for call, expected in ((LAYER, (10, 3)), (1000 * LAYER, (20, 1))):
        monkeypatch.setattr(chunking, "CALL", call)
        found = footprint().chunking(20, open_)
        assert (found.tasks, found.graphs) == expected
        assert footprint(keeps=False).chunking(20, open_).graphs == 0
        assert footprint().chunking(20, few) == chunking.Chunking(10, 22, 2)  # 15 at most
        assert footprint().chunking(20, chunking.Needs()).tasks == 20


def test_one_graph_is_kept_where_a_product_takes_more(monkeypatch):
    """But not where the query set, whose gradient is taken beside it, is the larger one."""
    monkeypatch.setattr(chunking, "KEPT", 0)
    needs = chunking.Needs(most=4)
    assert footprint().chunking(6, needs).graphs == 1
    assert footprint(query=6 * LAYER).chunking(6, needs).graphs == 0
    assert footprint(keeps=False).chunking(6, needs).graphs == 0
    assert footprint().chunking(6, chunking.Needs(least=3, most=3)) == chunking.Chunking(1, 22, 3)


def test_compiled_tasks_that_fill_a_cache_run_one_by_one(monkeypatch):
    theta, support, query = losses(*wide())
    monkeypatch.setattr(chunking, "COMPILED", {"cpu": 14 * LAYER})
    found = chunking.Footprint.of(support, query, theta, compiled=True)
    assert found.room == 14 * LAYER and found.held > found.room
    assert found.chunking(6, chunking.Needs(least=3, most=3)).tasks == 2
    monkeypatch.setattr(chunking, "COMPILED", {"cpu": LAYER})
    found = chunking.Footprint.of(support, query, theta, compiled=True)
    assert found.chunking(6, chunking.Needs()) == chunking.ONE_BY_ONE


def test_the_states_of_many_steps_leave_room_for_fewer_tasks():
    found = footprint(vector=LAYER)
    states = found.held // LAYER
    for count, tasks in ((0, 22), (states // 22, 22), (states // 4, 4), (states, 1), (9 * states, 1)):
        assert found.chunking(22, chunking.Needs(count)).tasks == found.most(chunking.Needs(count)) == tasks


def test_only_states_that_a_task_holds_count():
    adam = Adam(lr=0.1, steps=4)
    assert MAML(inner=INNER)._needs.states == 2 and MAML(inner=INNER, truncate=2)._needs.states == 1
    assert MAML(inner=adam)._needs.states == 9 and MAML(inner=adam, checkpoints=1)._needs.states == 3
    assert MAML(inner=adam, storage="disk")._needs.states == FOMAML(inner=INNER)._needs.states == 0


def test_only_graphs_that_serve_count():
    def graphs(**options):
        needs = MAML(inner=INNER, **options)._needs
        return needs.least, needs.most

    assert graphs() == graphs(hvp="reverse-over-reverse") == (0, 3) and graphs(truncate=2) == (0, 2)
    assert graphs(linearize=True) == (3, 3) and graphs(linearize=1) == (1, 1)
    for options in ({"linearize": False}, {"checkpoints": 1}, {"storage": "disk"}, {"hvp": "forward-over-reverse"}):
        assert graphs(**options) == (0, 0)
    needs = FOMAML(inner=INNER)._needs
    assert needs == ImplicitMAML(inner=INNER)._needs == chunking.Needs()


def test_recomputed_blocks_keep_no_graph():
    objective, tasks = wide()
    theta, support, query = losses(Objective(objective.model, F.cross_entropy, recompute=["1"]), tasks)
    assert not chunking.Footprint.of(support, query, theta, compiled=False).keeps


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
def test_any_plan_gives_the_same_numbers(strategy, adapt, monkeypatch):
    options = {"solver": CG(max_steps=50, rtol=1e-12)} if strategy is ImplicitMAML else {}
    _, objective, tasks = problem(mlp, tasks=5, adapt=adapt)
    objective = Objective(
        objective.model, objective.loss, adapt=adapt, metric=lambda z, y: z.mean() + y.double().mean()
    )
    expected = strategy(inner=INNER, chunk_size=1, **options)
    right = expected.value_and_grad(objective, tasks)[1]
    for decided in (chunking.Chunking(5, 2, 3), chunking.Chunking(2, 1, 0), chunking.Chunking(3, 5, 2)):
        monkeypatch.setattr(chunking.Footprint, "chunking", lambda *_, decided=decided: decided)
        engine = strategy(inner=INNER, **options)
        assert relative_error(engine.value_and_grad(objective, tasks)[1], right) <= 1e-10
        report, same = engine(objective, tasks).report, expected(objective, tasks).report
        for name in ("query_loss", "support_loss", "metric"):
            torch.testing.assert_close(getattr(report, name), getattr(same, name))
        with torch.no_grad():
            torch.testing.assert_close(engine(objective, tasks).report.metric, same.metric)


def test_it_is_looked_at_once_for_each_shape(monkeypatch):
    looks, look = [], chunking.Footprint.of
    monkeypatch.setattr(chunking.Footprint, "of", lambda *args, **options: looks.append(1) or look(*args, **options))
    engine, (objective, tasks) = MAML(inner=INNER), wide()
    for batch in (tasks, tasks[:2], tasks):
        engine(objective, batch)
    assert len(looks) == 1
    engine(objective, TaskBatch(support=tasks.query, query=tasks.query))
    assert len(looks) == 2


def test_looking_draws_no_random_numbers():
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    tasks, found = classification((4,)), []
    for engine in (FOMAML(inner=INNER), FOMAML(inner=INNER, chunk_size=len(tasks))):
        torch.manual_seed(0)
        found += [engine.value_and_grad(Objective(net, F.cross_entropy), tasks)[1], {"next": torch.rand(1)}]
    assert relative_error(found[0], found[2]) == 0 and found[1] == found[3]


@pytest.mark.parametrize("hvp", ["auto", "reverse-over-reverse", "forward-over-reverse", "finite-difference"])
def test_kept_graphs_give_the_same_meta_gradient_for_fewer_passes(hvp):
    calls = []
    _, objective, tasks = problem(mlp, adapt=["2"])
    objective = Objective(objective.model, lambda z, y: calls.append(1) or F.cross_entropy(z, y), adapt=["2"])
    kept, anew = (MAML(inner=INNER, hvp=hvp, linearize=b, chunk_size=3) for b in (True, False))
    expected, before = anew.value_and_grad(objective, tasks)[1], len(calls)
    got = kept.value_and_grad(objective, tasks)[1]
    assert relative_error(got, expected) <= (1e-6 if hvp == "finite-difference" else 1e-12)
    saved = INNER.steps if hvp in ("auto", "reverse-over-reverse") else 0
    assert len(calls) - before == before - saved
    report = kept(objective, tasks).report
    assert (report.gradients, report.hvps) == (3 * 4, 3 * 3)


def test_kept_graphs_and_checkpoints_exclude_each_other():
    with pytest.raises(ValueError, match="Expected checkpoints=None. Got 2"):
        MAML(inner=INNER, linearize=True, checkpoints=2)


def by_autograd(layer, x):
    x = x.detach().requires_grad_()
    energy = layer(x).tanh().square().sum()
    return torch.autograd.grad(energy, x, create_graph=True)[0][:, :3]


def by_transform(layer, x):
    return torch.func.vmap(torch.func.grad(lambda one: layer(one).tanh().square().sum()))(x)[:, :3]


class Force(nn.Module):
    """Its output is the derivative of an energy."""

    def __init__(self, derivative):
        super().__init__()
        self.layer, self.derivative = nn.Linear(4, 5).double(), derivative

    def forward(self, x):
        return self.derivative(self.layer, x)


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
@pytest.mark.parametrize("derivative", [by_autograd, by_transform])
@pytest.mark.parametrize("chunk_size", [None, "auto"])
def test_a_model_may_differentiate_in_its_forward_pass(strategy, derivative, chunk_size):
    objective, tasks = Objective(Force(derivative), F.cross_entropy), classification((4,))
    options = {"solver": CG(max_steps=50, rtol=1e-12)} if strategy is ImplicitMAML else {}
    got, expected = (
        strategy(inner=INNER, chunk_size=size, **options).value_and_grad(objective, tasks)[1]
        for size in (chunk_size, 1)
    )
    assert relative_error(got, expected) <= 1e-10


def test_what_cannot_be_looked_at_runs_one_by_one():
    theta, support, query = losses(Objective(Force(by_transform), F.cross_entropy), classification((4,)))
    decided = chunking.Footprint.of(support, query, theta, compiled=False).chunking(9, chunking.Needs(most=3))
    assert decided == chunking.Chunking(1, 1, graphs=1)  # one that a product would build


def test_a_loss_with_forward_derivatives_of_its_own_is_looked_at():
    def loss(output, target):
        slope = torch.func.jvp(lambda z: z**3, (output,), (torch.ones_like(output),))[1]
        return F.cross_entropy(output, target) + slope.mean()

    model, _, tasks = problem()
    values = [MAML(inner=INNER, chunk_size=size)(Objective(model, loss), tasks).loss for size in (None, 1)]
    torch.testing.assert_close(values[0], values[1])
