"""What a reverse sweep carries from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imaml._engine.course import Resumable
from imaml._engine.journal import owned
from imaml._engine.problem import Problem
from imaml._losses.gradient import Gradient
from imaml._strategies.point import Point


class Adjoint(Resumable):
    """The cotangents of the state before a step, and sums of what depends on no state.

    Args:
        problem: A chunk.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.state: list[Tensor] = []
        """Cotangents of phi and of the optimiser's buffers, `(tasks, n)` each."""
        self.shared: Tensor | None = None
        """The gradient of the shared parameters, summed over tasks, `(m,)`; None: there are none."""
        self.by_pull: Tensor | None = None
        """The cotangent of theta in the proximal term; None: there is none."""
        self.norm = problem.snapshot.like
        """Norms of the cotangents of phi where the last step has left them, `(tasks,)`."""

    def begin(self, query: Gradient) -> None:
        """Be at the end of the inner loop, with the derivatives of the query loss there."""
        cotangent = query.adapted
        self.state = [cotangent, *[torch.zeros_like(cotangent)] * self._problem.optimizer.buffers]
        self.shared = query.shared
        self.by_pull = None if self._problem.damping is None else torch.zeros_like(cotangent)

    def pull_through(self, point: Point) -> None:
        """Come from the state after a step to that before it."""
        pulled = point.pull(self.state, mixed=self.shared is not None)
        self.state, self.norm = pulled.state, pulled.norm
        if self.by_pull is not None and pulled.by_pull is not None:
            self.by_pull -= pulled.by_pull
        if self.shared is not None and pulled.mixed is not None:
            self.shared.add_(pulled.mixed)
        self._problem.hyper.add(pulled.rates, self._problem.first + point.step)

    def theta(self, *, from_start: bool) -> Tensor:
        """The meta-gradient, where the sweep is at the first step that is differentiated.

        Args:
            from_start: Whether that is the first of all.

        Returns:
            That of each task, `(tasks, n)`.
        """
        cotangent = self._problem.pull_through_start(tuple(self.state)) if from_start else self.state[0]
        return cotangent if self.by_pull is None else cotangent + self.by_pull

    def saved(self) -> dict[str, Any]:
        """All that it carries."""
        return {"state": list(owned(tuple(self.state))), "shared": self.shared, "by_pull": self.by_pull}

    def resume(self, saved: dict[str, Any]) -> None:
        """Be where it was when that was saved."""
        self.state, self.shared, self.by_pull = saved["state"], saved["shared"], saved["by_pull"]
