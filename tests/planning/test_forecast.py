"""Predicted peaks against measured ones, predicted counts against the report's, and what is recommended."""

import pytest
import torch

from imaml import (
    CG,
    FOMAML,
    MAML,
    Adam,
    GradientDescent,
    ImplicitMAML,
    Neumann,
    TorchOptimizer,
)
from imaml.measure import peak_memory
from tests.planning.models import problem

STEPS = 4


def descent(**options):
    return GradientDescent(lr=0.01, steps=options.pop("steps", STEPS), **options)


def implicit(**options):
    budget = {"solver": CG(max_steps=3, rtol=0.0), "inner": descent(), "on_failure": "ignore"}
    return ImplicitMAML(**(budget | options))


ENGINES = {
    "MAML": MAML(inner=descent()),
    "one step": MAML(inner=descent(steps=1)),
    "no step": MAML(inner=descent(steps=0)),
    "momentum": MAML(inner=descent(momentum=0.9), regularization=0.1),
    "Adam": MAML(inner=Adam(lr=0.01, steps=STEPS)),
    "truncated": MAML(inner=descent(), truncate=2),
    "finite differences": MAML(inner=descent(), hvp="finite-difference", chunk_size=2),
    "slices": MAML(inner=descent(), microbatch_size=2),
    "FOMAML": FOMAML(inner=descent()),
    "LBFGS": FOMAML(inner=TorchOptimizer(torch.optim.SGD, steps=3, lr=0.01)),
    "implicit": implicit(),
    "implicit, float64 solves": implicit(solver_dtype=torch.float64, error_bound=False),
    "Gauss-Newton": implicit(curvature="ggn"),
    "Neumann": implicit(solver=Neumann(max_steps=3)),
}


def predictions(engine, objective, tasks, **options):
    """Every setting, with its measured peak over the predicted one."""
    found = []
    for setting in engine.plan(objective, tasks, **options).settings:

        def call(setting=setting):
            setting.engine.value_and_grad(objective, tasks)

        call()
        found.append((setting, peak_memory(call) / setting.peak_bytes))
    return found


@pytest.mark.parametrize("name", ENGINES)
def test_peaks_are_within_a_fifth(name):
    model = "conv" if name in ("slices", "Gauss-Newton") else "mlp"
    objective, tasks = problem(model if name != "slices" else "tokens")
    for setting, ratio in predictions(ENGINES[name], objective, tasks):
        assert 1 / 1.2 <= ratio <= 1.2, (setting.name, ratio)
