"""Small problems on which the specimens are wrong: a model, a loss, three tasks, and an inner loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import Objective, TaskBatch

TASKS, WIDTH = 3, 4
Problem = tuple[Objective, TaskBatch]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is to be computed: the exact gradient through `steps` inner steps, or the implicit one at their end."""

    against: str
    lr: float
    steps: int
    lam: float = 0.0


MAML = Setup(against="maml", lr=0.1, steps=3)
PROXIMAL = Setup(against="maml", lr=0.1, steps=3, lam=2.0)
IMPLICIT = Setup(against="implicit", lr=0.2, steps=150, lam=2.0)
"""Enough steps for a stationary point to 1e-12."""
BRIEF = replace(IMPLICIT, steps=5)
"""Far too few."""


class Unused(nn.Module):
    """Its first parameter is never used, and all are of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.first, self.second = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Quantised(nn.Module):
    """Rounds its weight where its input needs no gradient, as layers do that have a faster path for inference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        weight = self.second.weight
        return x @ (weight if x.requires_grad else (8 * weight).round() / 8).T + self.second.bias


def quantised() -> Problem:
    return _build(Quantised)


def mlp() -> Problem:
    return _build(_two_layers)


def layer_norm() -> Problem:
    """Normalisation soft enough for an inner loop that converges."""
    return _build(lambda: _two_layers(nn.LayerNorm(WIDTH, eps=1.0)))


def batch_norm() -> Problem:
    return _build(lambda: _two_layers(nn.BatchNorm1d(WIDTH, track_running_stats=False)))


def running_batch_norm() -> Problem:
    """BatchNorm by fixed statistics: in `eval` mode, as it must be."""
    return _build(lambda: _two_layers(nn.BatchNorm1d(WIDTH)).eval())


def dropout() -> Problem:
    """Dropout that is switched off: in `eval` mode."""
    return _build(lambda: _two_layers(nn.Dropout(0.5)).eval())


def unused() -> Problem:
    return _build(Unused)


def one_shot() -> Problem:
    """Linear regression on one example: the Hessian has rank 1, and conjugate gradients need two steps."""
    return _build(lambda: nn.Linear(WIDTH, 1, bias=False), outputs=1, support=1)


def one_parameter() -> Problem:
    return _build(lambda: nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh()), inputs=1, outputs=1)


def _two_layers(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *between, nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def _build(model: Callable[[], nn.Module], *, inputs: int = WIDTH, outputs: int = WIDTH, support: int = 5) -> Problem:
    """The model with its loss, and tasks whose support and query sets differ; in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = model().double()
        for parameter in module.parameters():  # away from the 1 and 0 of fresh normalisation layers
            parameter.data += 0.3 * torch.randn_like(parameter)

        def batch(examples: int) -> tuple[Tensor, Tensor]:
            shape = (TASKS, examples)
            return torch.randn(*shape, inputs).double(), 0.5 * torch.randn(*shape, outputs).double()

        return Objective(module, F.mse_loss), TaskBatch(support=batch(support), query=batch(6))
