"""Damping that adapts: how large a multiple of the identity makes linear systems positive definite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from imaml._strategies.error_bound import LANCZOS_STEPS, is_zero
from imaml_solvers import CG, LinearOperator, LinearSolver, Solution, Status
from imaml_solvers._lanczos import smallest_eigenvalue

_LEAST, _RAISE, _LOWER = 0.1, 4.0, 0.9
"""What a raise leads to at least, what it multiplies by, and what a call without one does. A raise costs a solve, so it
goes far, and what it went too far is given back in 13 calls."""
_MOST_RAISES = 16
"""A billion times the least one: what is left then is no negative curvature."""


@dataclass
class AdaptiveDamping:
    """The delta of `damping="auto"`: a number per task in a call, and one number from call to call.

    A task never sees what the others of its call needed, so that chunks change nothing.
    """

    delta: float = 0.0
    """Where the next call begins."""

    def solve(
        self, solver: LinearSolver, run: Callable[[LinearOperator, Tensor], Solution], op: LinearOperator, rhs: Tensor
    ) -> tuple[Solution, Tensor]:
        """Solve (A + delta I) x = b with the first delta at which no negative curvature is seen.

        Args:
            solver: What `run` solves with.
            run: A solve.
            op: A.
            rhs: b, `(tasks, n)`.

        Returns:
            The solution, and delta of every task, `(tasks,)`.
        """
        delta = torch.full_like(rhs[..., 0], self.delta)
        solution = run(op.shifted(delta.unsqueeze(-1)) if self.delta else op, rhs)
        lowest = _lowest(solver, solution, op, rhs)
        for _ in range(_MOST_RAISES):
            again = _sees_negative_curvature(solver, solution, lowest, delta)
            if not bool(again.any()):
                break
            delta = torch.where(again, (_RAISE * delta).clamp(min=_LEAST), delta)
            # b = 0 ends a solve at once
            found = run(op.shifted(delta.unsqueeze(-1)), rhs.where(again.unsqueeze(-1), 0))
            solution = _where(again, found, solution)
        return solution, delta

    def learn(self, used: Tensor) -> None:
        """Choose where the next call begins, from the delta of every task of this one; NaN for those left out."""
        used = used[used.isfinite()]
        if len(used):
            largest = used.max().item()
            raised = largest > 2 * self.delta  # by less it is rounding of the tensor's dtype
            self.delta = largest if raised else _LOWER * self.delta


def _lowest(solver: LinearSolver, solution: Solution, op: LinearOperator, rhs: Tensor) -> Tensor | None:
    """The smallest eigenvalue of A by Lanczos steps, for solvers that neither stop at a negative one nor know it."""
    if isinstance(solver, CG) or solution.smallest_eigenvalue is not None:
        return None
    found = smallest_eigenvalue(op, rhs, min(LANCZOS_STEPS, rhs.shape[-1]))
    return found.masked_fill(is_zero(rhs), 1)


def _sees_negative_curvature(solver: LinearSolver, solution: Solution, lowest: Tensor | None, delta: Tensor) -> Tensor:
    broken = solution.status == Status.BREAKDOWN
    if isinstance(solver, CG):  # it stops there, and its careful estimate may be negative for a definite matrix
        return broken
    found = solution.smallest_eigenvalue if lowest is None else lowest + delta
    return broken if found is None else broken | (found <= 0)


def _where(systems: Tensor, found: Solution, before: Solution) -> Solution:
    """`found` in these systems, `before` in the others."""
    parts: dict[str, Any] = {}
    for field in fields(Solution):
        new, old = getattr(found, field.name), getattr(before, field.name)
        wide = systems.unsqueeze(-1) if field.name == "x" else systems
        parts[field.name] = None if new is None else torch.where(wide, new, old)
    return Solution(**parts)
