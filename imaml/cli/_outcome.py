"""What is known of one strategy after a comparison."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from imaml import MAML, MetaGradient, TaskBatch
from imaml.cli._options import EngineOptions, Strategy
from imaml.cli._problem import Problem
from imaml.training import Evaluation

NAMES: dict[Strategy, str] = {"maml": "MAML", "fomaml": "FOMAML", "imaml": "iMAML"}
COLORS: dict[Strategy, str] = {"maml": "#3b7dd8", "fomaml": "#d9822b", "imaml": "#2f9e6e"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A validation on the way; `seconds` are those of the meta-steps alone."""

    step: int
    seconds: float
    value: Evaluation


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One strategy: how good, how fast, how large, how exact."""

    strategy: Strategy
    options: EngineOptions
    test: Evaluation
    steps: int
    milliseconds: float
    peak_bytes: int
    cosine_start: float
    cosine_end: float
    curve: tuple[Point, ...]


def cosine_to_exact(problem: Problem, model: nn.Module, engine: MetaGradient, tasks: TaskBatch) -> float:
    """Cosine of the angle between an engine's meta-gradient and the exact one.

    Exact is the derivative of the query loss through the inner loop which the engine runs (its proximal term
    and number of steps included), in float64. An implicit engine differentiates the stationary point of that
    loop instead: its cosine also shows how far the loop is from it.

    Args:
        problem: Gives the loss.
        model: Where the meta-gradients are taken.
        engine: The strategy.
        tasks: Mean over these.

    Returns:
        At most 1.
    """
    exact = MAML(inner=engine.inner, regularization=engine.regularization, chunk_size=engine.chunk_size)
    _, ours = engine.value_and_grad(problem.objective(model), tasks)
    _, true = exact.value_and_grad(problem.objective(deepcopy(model).double()), tasks.to(dtype=torch.float64))
    return F.cosine_similarity(_flat(ours), _flat(true), dim=0).item()


def _flat(named: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten().double() for tensor in named.values()])
