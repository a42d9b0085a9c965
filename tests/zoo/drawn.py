"""Problems drawn at random, with a strategy that computes their meta-gradient rightly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import (
    CG,
    FOMAML,
    MAML,
    Dense,
    GradientDescent,
    ImplicitMAML,
    MetaGradient,
    Objective,
    ScipySolver,
    Status,
    TaskBatch,
)

Drawn = tuple[MetaGradient, Objective, TaskBatch]
OUTPUTS = 2
ACTIVATIONS = [nn.Tanh, nn.GELU, nn.Softplus, nn.ReLU]
NORMALISATIONS = [
    lambda width: nn.Identity(),
    lambda width: nn.LayerNorm(width),
    lambda width: nn.BatchNorm1d(width, track_running_stats=False),
    lambda width: nn.BatchNorm1d(width).eval(),
    lambda width: nn.GroupNorm(2, width),
]
EXACT_MODES = ["auto", "reverse-over-reverse", "forward-over-reverse"]


class Network(nn.Module):
    """A multi-layer perceptron, of which parameters may be tied, frozen or unused."""

    def __init__(self, width: int, depth: int, activation: Any, normalisation: Any, *, tied: bool, spare: bool) -> None:
        super().__init__()
        self.spare = nn.Linear(width, width) if spare else None
        hidden = [nn.Linear(width, width) for _ in range(depth)]
        if tied:
            hidden[-1].weight = hidden[0].weight
        layers = [(layer, normalisation(width), activation()) for layer in hidden]
        self.body = nn.Sequential(*(module for layer in layers for module in layer))
        self.head = nn.Linear(width, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def draw(seed: int) -> Drawn:
    """One problem; a problem whose implicit gradient its engine does not reach is drawn again."""
    rng = np.random.default_rng(seed)
    while True:
        engine, (objective, tasks) = _engine(rng), _problem(rng)
        if not isinstance(engine, ImplicitMAML) or _is_solved(engine, objective, tasks):
            return engine, objective, tasks


def _problem(rng: np.random.Generator) -> tuple[Objective, TaskBatch]:
    width, number = 2 * int(rng.integers(1, 3)), int(rng.integers(1, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        network = Network(
            width,
            int(rng.integers(1, 3)),
            ACTIVATIONS[rng.integers(4)],
            NORMALISATIONS[rng.integers(5)],
            tied=bool(rng.integers(2)),
            spare=rng.integers(4) == 0,
        ).double()
        for parameter in network.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        if rng.integers(3) == 0:
            network.body[0].bias.requires_grad_(False)
        classify = bool(rng.integers(2))

        def batch(examples: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(number, examples, width, dtype=torch.float64)
            if classify:
                return x, torch.randint(OUTPUTS, (number, examples))
            return x, torch.randn(number, examples, OUTPUTS, dtype=torch.float64)

        adapt = ["head"] if rng.integers(4) == 0 else None
        objective = Objective(network, F.cross_entropy if classify else F.mse_loss, adapt=adapt)
        return objective, TaskBatch(support=batch(int(rng.integers(4, 8))), query=batch(int(rng.integers(3, 8))))


def _engine(rng: np.random.Generator) -> MetaGradient:
    chunk_size = [None, 1, 2][rng.integers(3)]
    if rng.integers(8) == 0:
        return ImplicitMAML(
            inner=GradientDescent(lr=0.2, steps=60),
            regularization=float(rng.uniform(3, 5)),
            chunk_size=chunk_size,
            solver=[CG(rtol=1e-10), Dense(), ScipySolver(rtol=1e-10)][rng.integers(3)],
            hvp=EXACT_MODES[rng.integers(3)],
            linearize=bool(rng.integers(2)),
            on_failure="ignore",
        )
    inner = GradientDescent(lr=float(rng.uniform(0.02, 0.3)), steps=int(rng.integers(4)))
    regularization = float(rng.choice([0.0, rng.uniform(0, 3)]))
    if rng.integers(4) == 0:
        return FOMAML(inner=inner, regularization=regularization, chunk_size=chunk_size)
    return MAML(
        inner=inner,
        regularization=regularization,
        chunk_size=chunk_size,
        checkpoints=[None, 0, 1, 2][rng.integers(4)],
        hvp=[*EXACT_MODES, "finite-difference"][rng.integers(4)],
    )


def _is_solved(engine: ImplicitMAML, objective: Objective, tasks: TaskBatch) -> bool:
    report = engine(objective, tasks).report
    return bool((report.stationarity < 1e-9).all() and (report.solver_status == Status.CONVERGED).all())
