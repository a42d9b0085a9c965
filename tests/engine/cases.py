"""Small models and tasks in float64, of the kinds that people train."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from imaml import MetaGradient, Objective, TaskBatch
from tests.oracles import Setting, model_loss, setting

CLASSES = 3


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def conv() -> nn.Module:
    layers: list[nn.Module] = []
    for channels in (1, 4, 4):
        layers += [nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, CLASSES)).double()


class Transformer(nn.Module):
    """One pre-norm encoder layer between two linear ones; dropout where asked."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class Attention(nn.Module):
    """`scaled_dot_product_attention` called as it is, for whose default kernels torch has no second derivative."""

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.qkv, self.head, self.is_causal = nn.Linear(4, 24), nn.Linear(8, 3), is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).movedim(-3, 0).transpose(-2, -3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal)
        return self.head(mixed.transpose(-2, -3).flatten(-2).mean(-2))


def transformer() -> nn.Module:
    return Transformer().double()


MODELS: dict[Callable[[], nn.Module], tuple[int, ...]] = {mlp: (4,), conv: (1, 16, 16), transformer: (5, 4)}
"""How each is built, and the shape of an input."""


def classification(shape: Sequence[int], *, tasks: int = 3, support: int = 5, query: int = 6) -> TaskBatch:
    """Random inputs with random labels."""

    def batch(examples: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(tasks, examples, *shape, dtype=torch.float64)
        return inputs, torch.randint(CLASSES, (tasks, examples))

    return TaskBatch(support=batch(support), query=batch(query))


def problem(
    build: Callable[[], nn.Module] = mlp, *, adapt: Sequence[str] | None = None, tasks: int = 3
) -> tuple[nn.Module, Objective, TaskBatch]:
    """A model, its objective, and tasks that fit."""
    model = build()
    return model, Objective(model, F.cross_entropy, adapt=adapt), classification(MODELS[build], tasks=tasks)


def oracle_setting(engine: MetaGradient, model: nn.Module, objective: Objective, tasks: TaskBatch) -> Setting:
    """The oracle's view of a model objective with the cross-entropy loss."""
    theta = dict(model.named_parameters())
    return setting(engine, tasks, model_loss(model, F.cross_entropy), theta, objective.adapted)
