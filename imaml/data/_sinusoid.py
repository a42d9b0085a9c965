"""Sinusoid regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from imaml._tasks import TaskBatch
from imaml.data._episodes import Episodes, Split


@dataclass(frozen=True, kw_only=True)
class Sinusoid(Episodes):
    """Draws regression tasks y = A sin(x - p), known by a few points.

    A task draws its amplitude A from U[0.1, 5] and its phase p from U[0, pi]; its support and query points draw x from
    U[-5, 5]. Inputs and targets are float32, `(tasks, examples, 1)`.

    The splits draw from the same distribution in separate streams, so no task occurs in two of them.

    Source: Finn et al. 2017, section 5.1.

    Args:
        shots: Support points of a task.
        queries: Query points of a task.
        seed: Names the stream of tasks.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of range.
    """

    shots: int = 10
    queries: int = 10

    def _draw(self, split: Split, generators: Sequence[np.random.Generator]) -> TaskBatch:
        unit = np.stack([generator.random((2 + self.shots + self.queries, 1)) for generator in generators])
        amplitude, phase, x = 0.1 + 4.9 * unit[:, :1], np.pi * unit[:, 1:2], 10 * unit[:, 2:] - 5
        pair = [torch.from_numpy(values.astype(np.float32)) for values in (x, amplitude * np.sin(x - phase))]
        support, query = zip(*(values.split((self.shots, self.queries), dim=1) for values in pair), strict=True)
        return TaskBatch(support=support, query=query)
