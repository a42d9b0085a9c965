"""chunk_size="auto": as many tasks as fit into the memory that is free."""

import pytest
import torch

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML
from imaml.measure import peak_memory
from imaml.planning import _planner
from imaml.planning._bytes import free
from tests.oracles import relative_error
from tests.planning.models import TASKS, problem

INNER = GradientDescent(lr=0.01, steps=4)


@pytest.fixture
def left(monkeypatch):
    """Set what is free, for what a call may take; returns the chunks that were chosen since."""
    chosen = []
    decide = _planner.auto
    monkeypatch.setattr(_planner, "auto", lambda *args: chosen.append(decide(*args)) or chosen[-1])

    def left(size):
        chosen.clear()
        monkeypatch.setattr(_planner, "free", lambda _: None if size is None else int(size / _planner.SHARE) + 1)
        return chosen

    return left


@pytest.mark.parametrize("strategy", [MAML, FOMAML, ImplicitMAML])
def test_chunks_shrink_with_the_memory_and_the_numbers_stay(strategy, left):
    objective, tasks = problem("mlp")
    objective = objective.double()
    tasks = tasks.to(dtype=torch.float64)
    options = {"solver": CG(max_steps=2, rtol=0.0), "regularization": 50.0} if strategy is ImplicitMAML else {}
    expected = strategy(inner=INNER, chunk_size=1, **options).value_and_grad(objective, tasks)[1]
    forecast = strategy(inner=INNER, **options).plan(objective, tasks)
    sizes = {setting.options.get("chunk_size"): setting.peak_bytes for setting in forecast.settings}
    counts = []
    for limit in (None, (sizes[TASKS] + sizes[3]) // 2, (sizes[2] + sizes[3]) // 2):
        chosen, engine = left(limit), strategy(inner=INNER, chunk_size="auto", **options)
        assert relative_error(engine.value_and_grad(objective, tasks)[1], expected) <= 1e-12
        counts.append(chosen[0].tasks)
        if limit is not None:
            assert peak_memory(lambda engine=engine: engine.value_and_grad(objective, tasks)) <= 1.05 * limit
    assert counts[0] == TASKS and counts == sorted(counts, reverse=True) and counts[-1] < TASKS


def test_the_leanest_where_nothing_fits(left):
    objective, tasks = problem("mlp")
    chosen = left(1000)
    MAML(inner=INNER, chunk_size="auto").value_and_grad(objective, tasks)
    assert chosen[0].tasks == 1 and chosen[0].graphs <= 1  # that of the last step takes no more than a state and phi


def test_as_many_graphs_as_fit(left):
    objective, tasks = problem("mlp")
    forecast = MAML(inner=INNER, chunk_size=TASKS).plan(objective, tasks)
    sizes = {repr(setting.options.get("linearize")): setting.peak_bytes for setting in forecast.settings}
    every, half, last = sizes["True"], sizes["2"], sizes["1"]
    for limit, graphs in ((every, 4), ((every + half) // 2, 2), ((half + last) // 2, 1)):
        chosen = left(limit)
        MAML(inner=INNER, chunk_size="auto").value_and_grad(objective, tasks)
        assert (chosen[0].tasks, chosen[0].graphs) == (TASKS, graphs)


def test_shapes_are_looked_at_once(left, monkeypatch):
    objective, tasks = problem("mlp")
    looks, look = [], _planner.look
    monkeypatch.setattr(_planner, "look", lambda *args: looks.append(1) or look(*args))
    chosen, engine = left(None), FOMAML(inner=INNER, chunk_size="auto")
    for count in (6, 3, 5, 6):
        engine(objective, tasks[:count])
    assert len(looks) == 1 and [plan.tasks for plan in chosen] == [6, 3, 5, 6]
    engine(objective, tasks[:1])
    assert len(looks) == 2


def test_evaluation_and_random_numbers(left):
    """It may be looked at under no_grad; and no draw of the user's changes."""
    objective, tasks = problem("mlp")
    left(None)
    engine, state = FOMAML(inner=INNER, chunk_size="auto"), torch.get_rng_state()
    with torch.no_grad():
        loss = engine(objective, tasks).loss
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(loss, FOMAML(inner=INNER)(objective, tasks).loss.detach())


def test_it_is_a_number_or_auto():
    with pytest.raises(TypeError, match="`chunk_size`, unless None or 'auto', must be an integer. Got 'most'"):
        FOMAML(inner=INNER, chunk_size="most")


def test_what_is_free_is_less_than_there_is():
    assert 2**20 < free(torch.device("cpu")) < 2**60
    assert free(torch.device("meta")) is None
