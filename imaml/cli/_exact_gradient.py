"""What the meta-gradient of an engine is measured by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from imaml import MAML, MetaGradient, Objective, Task, TaskBatch
from imaml.verify._subject import in_double


def exact_gradient(
    engine: MetaGradient,
    objective: Objective,
    tasks: TaskBatch | Sequence[Task],
    *,
    chunk_size: int | Literal["auto"] | None,
) -> Tensor:
    """The derivative of the query loss through the inner loop that an engine runs, in float64.

    Args:
        engine: Its inner loop and proximal term are used.
        objective: A copy is used.
        tasks: The tasks.
        chunk_size: As that of an engine.

    Returns:
        One vector.
    """
    exact = MAML(inner=engine.inner, regularization=engine.regularization, chunk_size=chunk_size)
    return flat(exact.value_and_grad(objective.double(), in_double(tasks))[1])


def flat(named: Mapping[str, Tensor]) -> Tensor:
    """All gradients as one vector in float64."""
    return torch.cat([tensor.flatten().double() for tensor in named.values()])
