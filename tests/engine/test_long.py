"""A thousand inner steps: what is done is what the schedule implies, and no step costs more for those before it."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import MAML, AdamW, GradientDescent, Minibatches, Objective, Task
from imaml._strategies.schedule import sweep
from imaml.measure import peak_memory

STEPS = 1000


def problem(width=4):
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)).double()
    data = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    fetched = []

    def batch(step):
        fetched.append(step)
        rows = torch.arange(step, step + 5) % 20
        return tuple(t[rows] for t in data)

    return Objective(model, F.mse_loss), [Task(support=Minibatches(batch), query=data)], fetched


def test_a_thousand_steps_take_what_the_schedule_implies(tmp_path):
    objective, tasks, fetched = problem()
    engine = MAML(inner=GradientDescent(lr=1e-3, steps=STEPS), checkpoints=31, check_states=True)
    told = []
    report = engine(objective, tasks, folder=tmp_path, progress=lambda *step: told.append(step)).report
    taken = sweep(STEPS, 31).steps
    assert taken < 3 * STEPS
    assert (report.gradients, report.hvps) == (taken + 1, STEPS)
    assert len(told) == 2 * STEPS
    assert len(fetched) <= taken + STEPS + 3, "a batch for each step that is taken or differentiated"
    assert report.support_loss.shape == (STEPS, 1) and report.drift.tolist() == [0.0]


def calls(steps, folder=None, **options):
    """How many functions of Python and C are called."""
    objective, tasks, _ = problem()
    inner = AdamW(lr=lambda meta: meta["lr"].exp().expand(steps), steps=steps)
    objective = Objective(objective.model, F.mse_loss, meta={"lr": torch.tensor(-7.0).double().requires_grad_()})
    engine, count = MAML(inner=inner, linearize=False, **options), 0
    engine.value_and_grad(objective, tasks)

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        engine.value_and_grad(objective, tasks, folder=folder)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("storage", ["device", "disk"])
def test_no_step_calls_more_functions_for_those_before_it(storage):
    few, more, most = (calls(steps, storage=storage) for steps in (40, 80, 160))
    assert most - more == pytest.approx(2 * (more - few), rel=0.02)


def test_memory_is_flat_in_the_number_of_steps_for_states_that_are_as_many():
    objective, tasks, _ = problem(width=300)

    def peak(steps):
        engine = MAML(inner=AdamW(lr=1e-4, steps=steps), checkpoints=7)
        return peak_memory(lambda: engine.value_and_grad(objective, tasks))

    peak(9)  # what torch sets up once
    assert peak(120) == pytest.approx(peak(30), rel=0.05)
