"""What trainings on minibatches take, by prediction and as measured."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import FOMAML, MAML, GradientDescent, ImplicitMAML, Minibatches, Objective, Task, TaskBatch
from imaml.measure import peak_memory
from imaml.planning import _planner

INNER = GradientDescent(lr=0.01, steps=6)
WIDTH, HIDDEN, EXAMPLES = 64, 128, 96


def problem(kind):
    """Batches that are large beside the model: fetched anew, stacked, or kept by the source."""
    torch.manual_seed(0)
    objective = Objective(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)), F.mse_loss)
    data = torch.randn(4 * EXAMPLES, WIDTH), torch.randn(4 * EXAMPLES, 1)
    query = data[0][:4], data[1][:4]
    source = Minibatches.of(data, batch_size=EXAMPLES)
    if kind == "fetched":
        return objective, [Task(support=source, query=query)]
    if kind == "stacked":
        return objective, TaskBatch.stack([Task(support=source, query=query)] * 3)
    kept = [tuple(t.unsqueeze(0) for t in source.at(k)) for k in range(INNER.steps)]
    return objective, TaskBatch(support=Minibatches(kept), query=tuple(t.unsqueeze(0) for t in query))


@pytest.mark.parametrize("kind", ["fetched", "stacked", "kept"])
@pytest.mark.parametrize(
    "engine",
    [
        MAML(inner=INNER, linearize=True),
        MAML(inner=INNER, linearize=2),
        MAML(inner=INNER, linearize=False),
        MAML(inner=INNER, checkpoints=1, linearize=False),
        FOMAML(inner=INNER),
    ],
    ids=lambda e: f"{type(e).__name__}, {getattr(e, 'linearize', None)}, {getattr(e, 'checkpoints', None)}",
)
def test_the_batches_that_a_call_holds_are_counted(kind, engine):
    objective, tasks = problem(kind)
    engine = replace(engine, chunk_size=3)
    [setting] = [s for s in engine.plan(objective, tasks).settings if not s.options]
    engine.value_and_grad(objective, tasks)
    measured = peak_memory(lambda: engine.value_and_grad(objective, tasks))
    assert setting.peak_bytes == pytest.approx(measured, rel=0.055)  # two batches are more
    assert setting.gradients == engine(objective, tasks).report.gradients


@pytest.mark.parametrize("curvature_batches", [None, 1])
def test_an_implicit_call_takes_no_more_than_is_said(curvature_batches):
    objective, tasks = problem("fetched")
    engine = ImplicitMAML(inner=INNER, chunk_size=1, curvature_batches=curvature_batches, on_failure="ignore")
    [setting] = [s for s in engine.plan(objective, tasks).settings if not s.options]
    engine.value_and_grad(objective, tasks)
    assert peak_memory(lambda: engine.value_and_grad(objective, tasks)) <= 1.1 * setting.peak_bytes


def test_chunks_and_graphs_go_by_the_memory_that_is_left_beside_the_batches(monkeypatch):
    objective, tasks = problem("stacked")
    sizes = {}
    for graphs in (0, INNER.steps):
        engine = MAML(inner=INNER, chunk_size=3, linearize=graphs)
        [setting] = [s for s in engine.plan(objective, tasks).settings if not s.options]
        sizes[graphs] = setting.peak_bytes
    chosen, decide = [], _planner.auto
    monkeypatch.setattr(_planner, "auto", lambda *args: chosen.append(decide(*args)) or chosen[-1])
    for limit, most in ((None, INNER.steps), (sum(sizes.values()) // 2, INNER.steps // 2)):
        monkeypatch.setattr(_planner, "free", lambda _, limit=limit: limit and int(limit / _planner.SHARE) + 1)
        engine = MAML(inner=INNER, chunk_size="auto")
        engine.value_and_grad(objective, tasks)
        assert chosen[-1].graphs <= most
        if limit is not None:
            assert peak_memory(lambda engine=engine: engine.value_and_grad(objective, tasks)) <= 1.05 * limit


def test_a_call_that_goes_on_chooses_by_its_own_batches():
    objective, tasks = problem("fetched")
    engine = MAML(inner=INNER, chunk_size="auto")
    state = engine(objective, tasks, return_state=True).state
    engine.value_and_grad(objective, tasks, start=state)
    assert len(engine.plan(objective, tasks).settings) > 1


def test_a_call_that_goes_on_is_looked_at_with_the_step_sizes_of_its_own_steps():
    objective, tasks = problem("fetched")
    state = MAML(inner=INNER)(objective, tasks, return_state=True).state
    inner = replace(INNER, lr=[0.1] * 2 * INNER.steps)  # one for each step of the whole training
    MAML(inner=inner, chunk_size="auto").value_and_grad(objective, tasks, start=state)
