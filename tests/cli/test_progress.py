"""What a training shows of a long inner loop."""

from io import StringIO

import pytest
import torch.nn.functional as F
from rich.console import Console

from imaml import MAML, GradientDescent, Objective
from imaml.cli._metric import Metric
from imaml.cli._progress import progress
from imaml.data import Sinusoid
from imaml.models import MLP
from imaml.training import Plan, Trainer


def shown(steps, *, terminal):
    model = MLP(hidden=(2,))
    objective = Objective(model, F.mse_loss, metric=F.mse_loss)
    trainer = Trainer(
        model=model,
        objective=objective,
        engine=MAML(inner=GradientDescent(lr=0.001, steps=steps)),
        episodes=Sinusoid(seed=0),
        plan=Plan(steps=1, meta_batch=1, val_tasks=1, eval_tasks=1),
    )
    stream = StringIO()
    console = Console(file=stream, force_terminal=terminal, width=140)
    with progress(console, trainer, Metric(name="error", function=F.mse_loss, percent=False), label="maml") as show:
        is_followed = trainer.follow is not None
        for record in trainer:
            show(record)
    assert trainer.follow is None
    return is_followed, stream.getvalue()


@pytest.mark.parametrize(("steps", "terminal", "expected"), [(120, True, True), (5, True, False), (120, False, False)])
def test_a_long_inner_loop_has_a_bar_of_its_own_on_a_terminal(steps, terminal, expected):
    is_followed, text = shown(steps, terminal=terminal)
    assert is_followed == expected == ("inner steps, backward" in text and "120 of 120" in text)
