"""Gauss-Newton products that accumulate over slices of the support set."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from imaml import CG, GradientDescent, ImplicitMAML, Objective, TaskBatch

SETTINGS = {"inner": GradientDescent(lr=0.1, steps=3), "solver": CG(max_steps=30, rtol=1e-13), "curvature": "ggn"}


def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(2, 14, 4, dtype=torch.float64), torch.randint(3, (2, 14))
    return model, TaskBatch(support=(x[:, :7], y[:, :7]), query=(x[:, 7:], y[:, 7:]))


@pytest.mark.parametrize("adapt", [None, ["2"]])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_slices_give_the_same_meta_gradient(size, adapt):
    model, tasks = problem()
    objective = Objective(model, F.cross_entropy, adapt=adapt)
    _, expected = ImplicitMAML(**SETTINGS).value_and_grad(objective, tasks)
    _, got = ImplicitMAML(**SETTINGS, microbatch_size=size).value_and_grad(objective, tasks)
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= 1e-12 * value.abs().max()


def test_slices_count_as_one_product():
    model, tasks = problem()
    reports = [
        ImplicitMAML(**SETTINGS, microbatch_size=size)(Objective(model, F.cross_entropy), tasks).report
        for size in (None, 3)
    ]
    assert reports[0].hvps == reports[1].hvps > 0 and reports[0].gradients == reports[1].gradients
    assert {report.hvp_mode for report in reports} == {"gauss-newton"}
