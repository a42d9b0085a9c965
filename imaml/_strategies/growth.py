"""How much the cotangent of a reverse sweep grows, and when rounding leaves nothing of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imaml._engine.course import Resumable

LIMIT = 1e-2
"""Growth times the rounding unit from which on a meta-gradient is lost: docs/numerics.md has the trial."""


class Growth(Resumable):
    """The largest norm of the cotangent of phi so far, relative to that with which it began.

    Inner steps that double a cotangent double what an earlier rounding error does to phi as well.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._norms: list[Tensor] = []

    def begin(self, cotangent: Tensor) -> None:
        """Take note of the cotangent where the derivatives of a query loss have been added to it."""
        norm = torch.linalg.vector_norm(cotangent, dim=-1)
        self._first = norm if self._first is None else torch.maximum(self._first, norm)
        self._norms.append(norm)

    def see(self, norm: Tensor) -> None:
        """Take note of the norms of the cotangents before a step, `(tasks,)`."""
        self._norms.append(norm)

    def figure(self) -> Tensor:
        """The growth, `(tasks,)`; 1 where all query gradients are zero."""
        assert self._first is not None
        return torch.where(self._first > 0, self._largest() / self._first, 1)

    def _largest(self) -> Tensor:
        return torch.stack(self._norms).amax(0)

    def saved(self) -> dict[str, Any]:
        """See `Resumable`."""
        return {"first": self._first, "largest": self._largest() if self._norms else None}

    def resume(self, saved: dict[str, Any]) -> None:
        """See `Resumable`."""
        self._first, self._norms = saved["first"], [] if saved["largest"] is None else [saved["largest"]]


def lost(growth: Tensor) -> Tensor:
    """Whether rounding leaves nothing of the meta-gradient, for every task."""
    return growth * (torch.finfo(growth.dtype).eps / 2) >= LIMIT
