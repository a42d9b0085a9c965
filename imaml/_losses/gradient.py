"""What first derivatives of a chunk's losses are handed on as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Gradient:
    """Losses `(tasks,)` and their gradients `(tasks, n)`; if asked, that `(m,)` for the shared parameters, summed."""

    losses: Tensor
    adapted: Tensor
    shared: Tensor | None
    metric: Tensor | None = None

    def mul_(self, factor: float) -> Gradient:
        """Scale all of it."""
        for tensor in (self.losses, self.adapted, self.shared):
            if tensor is not None:
                tensor.mul_(factor)
        if self.metric is not None:
            self.metric = self.metric * factor  # of any dtype
        return self

    def add_(self, other: Gradient) -> Gradient:
        """Add another of the same tasks."""
        for mine, its in ((self.shared, other.shared), (self.metric, other.metric)):
            if mine is not None and its is not None:
                mine.add_(its)
        self.losses.add_(other.losses)
        self.adapted.add_(other.adapted)
        return self

    @classmethod
    def join(cls, parts: Sequence[Gradient]) -> Gradient:
        """Join the gradients of several groups of tasks."""
        shared = [p.shared for p in parts if p.shared is not None]
        metrics = [p.metric for p in parts if p.metric is not None]
        return cls(
            torch.cat([p.losses for p in parts]),
            torch.cat([p.adapted for p in parts]),
            torch.stack(shared).sum(0) if shared else None,
            torch.cat(metrics) if metrics else None,
        )
