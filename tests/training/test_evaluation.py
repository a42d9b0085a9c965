import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from imaml import FOMAML, GradientDescent, Objective
from imaml.data import Sinusoid
from imaml.models import MLP
from imaml.training import evaluate

ENGINE = FOMAML(inner=GradientDescent(lr=0.02, steps=2))
EPISODES = Sinusoid(shots=5, queries=7, seed=3)


def test_mean_and_interval_are_those_of_tasks_adapted_one_by_one():
    model = MLP(hidden=(8,))
    objective = Objective(model, F.mse_loss, metric=F.l1_loss)
    found = evaluate(ENGINE, objective, EPISODES, "test", tasks=25)
    values = []
    for task in [*EPISODES.batch("test", 0, 20), *EPISODES.batch("test", 1, 20)][:25]:
        adapted = ENGINE.adapt(objective, task.support)
        x, y = task.query
        values.append((functional_call(model, adapted, (x,)) - y).abs().mean().item())
    assert found.tasks == 25
    assert found.mean == pytest.approx(np.mean(values), rel=1e-5)
    assert found.interval == pytest.approx(1.96 * np.std(values, ddof=1) / 5, rel=1e-4)


def test_a_metric_is_required():
    objective = Objective(MLP(hidden=(8,)), F.mse_loss)
    with pytest.raises(ValueError, match=r"`metric`.*Got None"):
        evaluate(ENGINE, objective, EPISODES, "val", tasks=2)


def test_evaluation_leaves_no_gradient_and_no_change():
    model = MLP(hidden=(8,))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(ENGINE, Objective(model, F.mse_loss, metric=F.mse_loss), EPISODES, "val", tasks=3)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
