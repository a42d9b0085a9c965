"""What conjugate gradients and MINRES share: fields, and many systems that step together and stop one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml_solvers._lanczos import lower_ritz_value
from imaml_solvers._operator import LinearOperator
from imaml_solvers._preconditioner import Preconditioner, check_preconditioner, chosen
from imaml_solvers._solution import Solution, Status
from imaml_solvers._solver import LinearSolver
from imaml_solvers._start import RUNNING, Start, check_stopping, default_stopping, start
from imaml_solvers._vectors import choose, largest_entry, norm, power_of_two

ROUNDING = 10.0
"""What rounding makes of a sum, in units of eps and of the norms of its vectors: less is zero, on any processor.

p'Ap of an indefinite matrix may be 0 by one processor and 1e-17 by another, and a step of its inverse 1e17 long. No
regular matrix comes near: for condition c, p'Ap is at least 2 / sqrt(c) of |p| |Ap|."""
_CLAIMED = -2
"""The status of a system whose recursive residual met the tolerance, before b - A x is looked at."""


@dataclass(frozen=True, kw_only=True)
class KrylovSolver(LinearSolver):
    """A solver that iterates; see `CG` for its fields."""

    max_steps: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    preconditioner: Preconditioner | None = None
    _uses_x0: ClassVar[bool] = True
    _uses_preconditioner: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields; raises TypeError or ValueError."""
        check_stopping(self.max_steps, self.rtol, self.atol)
        check_preconditioner(self.preconditioner)

    @property
    @abstractmethod
    def _iteration(self) -> type[Iteration]:
        """The method."""

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        max_steps, rtol = default_stopping(self.max_steps, self.rtol, b)
        begun = start(op, b, x0, rtol, self.atol)
        inverse = chosen(self.preconditioner, preconditioner, op, begun)
        iteration = self._iteration(op, inverse, begun, max_steps, rtol == self.atol == 0)
        del begun  # its x and r would live as long as the iteration
        return iteration.run()


class Iteration(ABC):
    """The state of all systems. Everything is computed for all and kept for those that still run.

    Args:
        op: A.
        preconditioner: Approximate inverses of A, or None.
        begun: Where the systems start.
        max_steps: Most steps for a system.
        is_budget: Are the steps the budget, both tolerances being zero?
    """

    def __init__(
        self,
        op: LinearOperator,
        preconditioner: LinearOperator | None,
        begun: Start,
        max_steps: int,
        is_budget: bool,
    ) -> None:
        self._op, self._preconditioner = op, preconditioner
        self._b, self._unit, self._tolerance = begun.b, begun.unit, begun.tolerance
        self._max_steps = max_steps
        self._spent = Status.BUDGET_SPENT if is_budget else Status.MAX_STEPS
        self._met = Status.CONVERGED if is_budget else _CLAIMED
        self._eps = torch.finfo(begun.b.dtype).eps
        self._x, self._r, self._status = begun.x, begun.r, begun.status
        self._residual = norm(begun.r)
        self._claim = begun.tolerance if is_budget else self._credible()
        self._num_steps = torch.zeros_like(begun.status)
        self._checked = torch.full_like(self._residual, torch.inf)
        self._stalls = torch.zeros_like(begun.status)
        self._largest = torch.zeros_like(self._residual)
        self._lowest = torch.full_like(self._residual, torch.inf)
        self._fresh = self._status == RUNNING
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._prepare()
        self._begin(self._fresh)

    def _prepare(self) -> None:  # noqa: B027
        """Set what a method has besides."""

    def run(self) -> Solution:
        """Step until every system has stopped; the outcome in the units of b."""
        while self._any(RUNNING):
            self._step()
            if not self._any(RUNNING) and self._any(_CLAIMED):
                self._verify()
        residual = self._residual * self._unit.squeeze(-1)
        return Solution(self._x.mul_(self._unit), self._status, self._num_steps, residual, self._smallest_eigenvalue())

    @abstractmethod
    def _step(self) -> None:
        """One step of every running system."""

    @abstractmethod
    def _begin(self, systems: Tensor) -> None:
        """Begin anew from the residual, in these systems."""

    def _count(self, moved: Tensor, residual: Tensor) -> None:
        """Note the step, which led to residuals of these norms where a system `moved`, and look who is done."""
        self._residual = residual.where(moved, self._residual)
        self._num_steps = self._num_steps + moved
        self._end(moved & (residual <= self._claim), self._met)
        self._end((self._status == RUNNING) & (self._num_steps == self._max_steps), self._spent)

    def _verify(self) -> None:
        """Compare b - A x with the tolerance where the recursive residual met it; what fails runs on from there."""
        claimed = self._status == _CLAIMED
        r = self._b - self._op.mv(self._x.clone())  # the operator may keep it
        residual = norm(r)
        finite = torch.isfinite(residual)
        self._stalls = (self._stalls + 1).where(residual > self._checked / 2, 0)
        self._end(claimed, RUNNING)
        self._end(claimed & (self._num_steps == self._max_steps), Status.MAX_STEPS)
        self._end(claimed & (self._stalls == 2), Status.STAGNATED)
        self._end(claimed & (residual <= self._tolerance), Status.CONVERGED)
        self._end(claimed & ~finite, Status.NONFINITE)
        self._r = choose(claimed & finite, r, self._r)
        self._residual = residual.where(claimed & finite, self._residual)
        self._checked = self._residual.where(claimed, self._checked)
        if self._any(RUNNING):
            self._rescale()
            self._begin(claimed)

    def _rescale(self) -> None:
        """Measure what runs on in multiples of what is left of it."""
        peak = largest_entry(self._b).maximum(largest_entry(self._r))
        unit = power_of_two(peak.where(self._status == RUNNING, 1))
        if bool((unit == 1).all()):
            return
        self._b = self._b / unit.unsqueeze(-1)
        self._x = self._x / unit.unsqueeze(-1)
        self._r = self._r / unit.unsqueeze(-1)
        self._tolerance, self._residual, self._checked = (
            size / unit for size in (self._tolerance, self._residual, self._checked)
        )
        self._unit = self._unit * unit.unsqueeze(-1)
        self._claim = self._credible()

    def _credible(self) -> Tensor:
        """The tolerance, or more where a recursion that starts at this residual would carry nothing but rounding."""
        return self._tolerance.maximum(self._eps * self._residual.maximum(norm(self._b)))

    def _precondition(self, r: Tensor) -> Tensor:
        return r if self._preconditioner is None else self._preconditioner.mv(r.clone())  # it may keep it

    def _smallest_eigenvalue(self) -> Tensor | None:
        """From the rows of T; with a preconditioner they are those of another matrix."""
        if self._preconditioner is not None:
            return None
        if not self._rows:
            return self._lowest
        rows = [torch.stack(parts) for parts in zip(*self._rows, strict=True)]
        return lower_ritz_value(*rows).minimum(self._lowest)

    def _any(self, status: int) -> bool:
        return bool((self._status == status).any())

    def _end(self, systems: Tensor, status: int) -> None:
        self._status = self._status.masked_fill(systems, status)
