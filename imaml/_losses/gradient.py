"""What first derivatives of a chunk's losses are handed on as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Gradient:
    """Losses `(tasks,)` and their gradients `(tasks, n)`; if asked, that `(m,)` for the shared parameters, summed.

    So is that `(n,)` by the adapted parameters before the inner loop, where a query loss takes them.
    """

    losses: Tensor
    adapted: Tensor
    shared: Tensor | None
    metric: Tensor | None = None
    initial: Tensor | None = None

    def times(self, weight: float) -> Gradient:
        """All but the gradient by the adapted parameters times a number."""
        others = (None if t is None else t * weight for t in (self.shared, self.metric, self.initial))
        return Gradient(self.losses * weight, self.adapted, *others)

    def weighted(self, weight: float | Tensor) -> Gradient:
        """The gradients, which are overwritten, times a number; losses and metric as they are."""
        for gradient in (self.adapted, self.shared, self.initial):
            if gradient is not None:
                gradient.mul_(weight)
        return self

    @classmethod
    def sum(cls, adapted: Tensor, parts: Sequence[Gradient]) -> Gradient:
        """Add up those of several slices of the same tasks, whose gradients by the adapted parameters are one sum."""
        losses, *others = ([getattr(p, name) for p in parts] for name in ("losses", "shared", "metric", "initial"))
        shared, metric, initial = (None if any(t is None for t in own) else torch.stack(own).sum(0) for own in others)
        return cls(torch.stack(losses).sum(0), adapted, shared, metric, initial)

    @classmethod
    def join(cls, parts: Sequence[Gradient]) -> Gradient:
        """Join the gradients of several groups of tasks."""
        shared = [p.shared for p in parts if p.shared is not None]
        metrics = [p.metric for p in parts if p.metric is not None]
        initial = [p.initial for p in parts if p.initial is not None]
        return cls(
            torch.cat([p.losses for p in parts]),
            torch.cat([p.adapted for p in parts]),
            torch.stack(shared).sum(0) if shared else None,
            torch.cat(metrics) if metrics else None,
            torch.stack(initial).sum(0) if initial else None,
        )
