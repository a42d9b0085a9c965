"""States that the sweep takes again, compared with those on the way to the end."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import MAML, Adam, DriftWarning, GradientDescent, Objective, Task
from imaml._strategies.drift import Drift

STEPS = 9
ENGINE = MAML(inner=Adam(lr=0.05, steps=STEPS), checkpoints=2, check_states=True)


class Unsteady(nn.Module):
    """Adds something else in each evaluation of a second run of steps."""

    def __init__(self, noise):
        super().__init__()
        self.linear, self.noise, self.calls = nn.Linear(3, 2).double(), noise, 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * (1 + self.noise * self.calls)


def _as(dtype, batch):
    return tuple(t.to(dtype) for t in batch)


def tasks(n=2):
    x = torch.randn(n, 5, 3, dtype=torch.float64)
    return [Task(support=(t, t[:, :2]), query=(t, t[:, :2])) for t in x]


@pytest.mark.parametrize(
    "options", [{}, {"checkpoints": None}, {"storage": "disk"}, {"truncate": 4}, {"chunk_size": 1}]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_computation_that_repeats_has_none(options, dtype):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2)).to(dtype)
    given = [Task(support=_as(dtype, one.support), query=_as(dtype, one.query)) for one in tasks()]
    result = replace(ENGINE, **options)(Objective(model, F.mse_loss), given)
    assert result.report.drift.tolist() == [0.0, 0.0]
    assert "states taken again differ by 0" in str(result.report)


def test_one_that_does_not_is_told_once_and_by_how_much():
    objective = Objective(Unsteady(1e-4), F.mse_loss)
    engine = replace(ENGINE, inner=GradientDescent(lr=0.1, steps=STEPS), chunk_size=1)
    with pytest.warns(DriftWarning, match=r"came to other states for 2 of 2 tasks: by .* for task [01]\."):
        drift = engine(objective, tasks()).report.drift
    assert drift.shape == (2,) and drift.dtype == torch.float64
    assert ((1e-7 < drift) & (drift < 0.1)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(objective, tasks())
        assert replace(engine, check_states=False)(objective, tasks()).report.drift is None


def test_small_differences_are_said_without_a_warning():
    objective = Objective(Unsteady(1e-13), F.mse_loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drift = replace(ENGINE, inner=GradientDescent(lr=0.1, steps=STEPS), chunk_size=1)(objective, tasks())
    assert (0 < drift.report.drift).all()


@pytest.mark.parametrize("n", [3, 64, 1000, 12345])
def test_sketches_estimate_the_difference_of_any_vectors(n):
    torch.manual_seed(0)
    drift, x = Drift(), torch.randn(4, n)
    apart = torch.tensor([[0.0], [1e-6], [1e-3], [1.0]]) * torch.randn(4, n)
    y = x + apart
    drift.note(3, (x, torch.ones(4, n)))
    drift.note(3, (y, torch.ones(4, n)))  # it is known
    drift.compare(3, (y, torch.ones(4, n)))
    drift.compare(3, (y, y))  # it is needed no more
    expected = (y - x).double().norm(dim=-1) / x.double().norm(dim=-1)
    assert drift.most[0] == 0
    assert torch.allclose(drift.most[1:], expected[1:], rtol=1e-6 if n <= 64 else 0.6)
