"""Small problems of every kind, which `imaml verify` checks the library on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import LAMB, Adam, GradientDescent, InnerOptimizer, Muon, NormalizedDescent, Objective, RMSprop, TaskBatch
from imaml.cli._options import STRATEGIES, EngineOptions, Strategy
from imaml.models import MLP, Conv4

CLASSES, TASKS, EXAMPLES = 3, 2, 6

ENGINES: dict[Strategy, EngineOptions] = {
    "maml": EngineOptions(inner_lr=0.1, inner_steps=3),
    "fomaml": EngineOptions(inner_lr=0.1, inner_steps=3),
    "imaml": EngineOptions(inner_lr=0.05, inner_steps=100, regularization=10.0, cg_steps=50),
}
"""An inner loop and a solve that converge, for the implicit one."""

DAMPING = 1.0
"""What damps the implicit one, where it is damped."""


class BuiltIn(NamedTuple):
    """How a model is built, the shape of its inputs, and the strategies it is for."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    strategies: tuple[Strategy, ...] = STRATEGIES


class Transformer(nn.Module):
    """One pre-norm encoder layer between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, nn.GELU(), batch_first=True, norm_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of sequences `(examples, length, 4)`."""
        logits: Tensor = self.head(self.layer(self.embed(x)).mean(1))
        return logits


class Tied(nn.Module):
    """A frozen layer, an unused one, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 6).requires_grad_(False)
        self.unused, self.first, self.second = (nn.Linear(6, 6) for _ in range(3))
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of `(examples, 4)`."""
        for layer in (self.frozen, self.first, self.second):
            x = torch.tanh(layer(x))
        logits: Tensor = self.head(x)
        return logits


def _normalised(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), norm, nn.Tanh(), nn.Linear(8, CLASSES))


# A stationary point may lie on a kink of ReLU, where the implicit gradient does not exist.
_WITH_KINKS: tuple[Strategy, ...] = ("maml", "fomaml")
BUILT_IN: dict[str, BuiltIn] = {
    "MLP": BuiltIn(lambda: MLP(4, CLASSES, (16, 16)), (4,), _WITH_KINKS),
    "MLP, tanh": BuiltIn(lambda: MLP(4, CLASSES, (8, 8), nn.Tanh), (4,)),
    "Conv4": BuiltIn(lambda: Conv4(CLASSES, channels=4, image_size=16), (1, 16, 16), _WITH_KINKS),
    "LayerNorm": BuiltIn(lambda: _normalised(nn.LayerNorm(8)), (4,)),
    "BatchNorm": BuiltIn(lambda: _normalised(nn.BatchNorm1d(8, track_running_stats=False)), (4,)),
    "transformer": BuiltIn(Transformer, (5, 4)),
    "tied, unused, frozen": BuiltIn(Tied, (4,)),
}


INNER: dict[str, InnerOptimizer] = {
    "momentum, learned lr": GradientDescent(lr=lambda meta: meta["log_lr"].exp(), steps=3, momentum=0.9),
    "Adam, learned lr": Adam(lr=lambda meta: meta["log_lr"].exp(), steps=3),
    "RMSprop, learned lr": RMSprop(lr=lambda meta: meta["log_lr"].exp(), steps=3),
    "LAMB, clipped, learned lr": LAMB(lr=lambda meta: meta["log_lr"].exp(), steps=3, max_grad_norm=0.5),
    "Muon, learned lr": Muon(lr=lambda meta: meta["log_lr"].exp(), steps=3),
    "normalised, a learned schedule": NormalizedDescent(lr=lambda meta, step: meta["log_lr"][step].exp(), steps=3),
}
"""Inner optimisers with a step size for each step, all learned, from `LOG_LR`."""
LOG_LR = (-3.0, -3.5, -4.0)


def problem(name: str, seed: int, *, log_lr: Sequence[float] | None = None) -> tuple[Objective, TaskBatch]:
    """A model of `BUILT_IN` with random parameters, and random tasks for it; the global generator stays as it is.

    Args:
        name: Name of the model.
        seed: Seed of parameters and tasks.
        log_lr: A meta-parameter with these values, if any.

    Returns:
        The objective and the tasks.
    """
    meta = None if log_lr is None else {"log_lr": torch.tensor(log_lr, requires_grad=True)}
    kind = BUILT_IN[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.build()

        def batch() -> tuple[Tensor, Tensor]:
            return torch.randn(TASKS, EXAMPLES, *kind.shape), torch.randint(CLASSES, (TASKS, EXAMPLES))

        return Objective(model, F.cross_entropy, meta=meta), TaskBatch(support=batch(), query=batch())
