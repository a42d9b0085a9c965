"""Warm starts: which tasks are recognised, and that they change what a solve costs rather than what it finds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, GradientDescent, ImplicitMAML, Objective, TaskBatch
from tests.inner.cases import close

INNER = GradientDescent(lr=0.1, steps=3)


def engine(**settings):
    return ImplicitMAML(**{"inner": INNER, "solver": CG(max_steps=50, rtol=1e-10)} | settings)


@pytest.fixture
def model():
    return nn.Linear(3, 2).double()


def tasks_of(x, y):
    return TaskBatch(support=(x, y), query=(x.flip(1) + 1, y))


X = torch.arange(24, dtype=torch.float64).sin().view(2, 4, 3)
Y = torch.arange(16, dtype=torch.float64).cos().view(2, 4, 2)
OTHERS = {
    "inputs": (X + 0.1, Y),
    "targets": (X, Y - 0.1),
    "order of the examples": (X.flip(1), Y),
    "order of the entries": (X.flip(2), Y),
    "two entries that cancel": (X + torch.tensor([0.1, -0.1, 0.0]), Y),
    "the last entry": (X.index_put((torch.tensor([0, 1]), torch.tensor(3), torch.tensor(2)), X.new_tensor(2.0)), Y),
}


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", OTHERS)
def test_a_task_with_other_numbers_starts_from_zero(model, name, chunk_size):
    objective, warm = Objective(model, F.mse_loss), engine(warm_start=True, chunk_size=chunk_size)
    warm(objective, tasks_of(X, Y))
    other = tasks_of(*OTHERS[name])
    expected = engine(chunk_size=chunk_size)(objective, other).report
    report = warm(objective, other).report
    assert torch.equal(report.solver_steps, expected.solver_steps)
    assert torch.equal(report.solver_residual, expected.solver_residual)  # to the last bit: the iterates are the same
    assert (expected.solver_steps > 0).all()


def test_known_and_unknown_tasks_of_one_chunk(model):
    objective, warm = Objective(model, F.mse_loss), engine(warm_start=True)
    both, others = tasks_of(X, Y), tasks_of(X + 0.1, Y)
    warm(objective, both)
    mixed = [others[1], both[1], others[0], both[0]]
    cold = engine()(objective, mixed).report
    report = warm(objective, mixed).report
    assert report.solver_steps.tolist() == [cold.solver_steps[0], 0, cold.solver_steps[2], 0]
    again = warm(objective, mixed[::-1])
    assert not again.report.solver_steps.any()
    close(warm.value_and_grad(objective, mixed)[1], engine().value_and_grad(objective, mixed)[1], rtol=1e-8)


def test_the_latest_solution_is_the_start(model):
    """After the parameters moved: a start that is near saves steps, and is then replaced."""
    model, tasks = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), tasks_of(X, Y)
    objective, warm = Objective(model, F.mse_loss), engine(warm_start=True)
    warm(objective, tasks)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.001)
    moved, stays = (warm(objective, tasks).report.solver_steps for _ in range(2))
    assert (moved > 0).all() and (stays == 0).all()


def test_one_engine_for_models_of_several_sizes_and_precisions(model):
    warm, tasks = (
        engine(warm_start=True, solver=CG(max_steps=50, rtol=1e-4), solver_dtype=torch.float64),
        tasks_of(X, Y),
    )
    narrow = TaskBatch(
        support=tuple(t.float().double() for t in tasks.support), query=tuple(t.float().double() for t in tasks.query)
    )
    single = TaskBatch(support=tuple(t.float() for t in tasks.support), query=tuple(t.float() for t in tasks.query))
    wide = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    rounded = Objective(nn.Linear(3, 2), F.mse_loss)
    for objective, batch in (
        (Objective(model, F.mse_loss), narrow),
        (Objective(wide, F.mse_loss), narrow),
        (rounded, single),
    ):
        first, second = (warm(objective, batch) for _ in range(2))
        assert (first.report.solver_steps > 0).all() and (second.report.solver_steps == 0).all()
        assert second.loss.dtype == next(iter(objective.parameters().values())).dtype
