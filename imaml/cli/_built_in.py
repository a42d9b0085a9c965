"""Small problems of every kind, which `imaml verify` checks the library on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import Objective, TaskBatch
from imaml.cli._options import STRATEGIES, EngineOptions, Strategy
from imaml.models import MLP, Conv4

CLASSES, TASKS, EXAMPLES = 3, 2, 6

ENGINES: dict[Strategy, EngineOptions] = {
    "maml": EngineOptions(inner_lr=0.1, inner_steps=3),
    "fomaml": EngineOptions(inner_lr=0.1, inner_steps=3),
    "imaml": EngineOptions(inner_lr=0.05, inner_steps=100, regularization=10.0, cg_steps=50),
}
"""An inner loop and a solve that converge, for the implicit one."""


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


def problem(name: str, seed: int) -> tuple[Objective, TaskBatch]:
    """A model of `BUILT_IN` with random parameters, and random tasks for it; the global generator stays as it is."""
    kind = BUILT_IN[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.build()

        def batch() -> tuple[Tensor, Tensor]:
            return torch.randn(TASKS, EXAMPLES, *kind.shape), torch.randint(CLASSES, (TASKS, EXAMPLES))

        return Objective(model, F.cross_entropy), TaskBatch(support=batch(), query=batch())
