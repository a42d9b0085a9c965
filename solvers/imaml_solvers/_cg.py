"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml_solvers._lanczos import lower_ritz_value
from imaml_solvers._operator import LinearOperator
from imaml_solvers._solution import Solution, Status
from imaml_solvers._solver import LinearSolver
from imaml_solvers._start import RUNNING, Start, check_stopping, dot, largest_entry, norm, start

_CLAIMED = -2
"""The status of a system whose recursive residual met the tolerance, before b - A x is looked at."""


@dataclass(frozen=True, kw_only=True)
class CG(LinearSolver):
    """Conjugate gradients (Hestenes & Stiefel 1952) for symmetric positive definite A, with optional preconditioner M.

        alpha = r'Mr / p'Ap,  x += alpha p,  r -= alpha A p,  p <- M r + (new r'Mr / old r'Mr) p

    Without a preconditioner the error e after k steps obeys |e|_A <= 2 ((sqrt(c) - 1) / (sqrt(c) + 1))^k |e_0|_A for
    the condition number c, and is zero after as many steps as A has distinct eigenvalues, but for rounding.

    A system stops, each on its own and its x frozen bit for bit, when
    - |r| <= max(rtol |b|, atol). Once all have stopped, b - A x is computed (one product). CONVERGED if it meets the
      tolerance too; else the system goes on from it, and is STAGNATED if it was not halved twice in a row;
    - the tolerances are zero, and the steps are spent (BUDGET_SPENT; b - A x is not computed) or |r| <= eps |b|;
    - p'Ap or r'Mr is not positive, or p'Ap / p'M^-1 p is below eps times the largest so far (A is singular to working
      precision): BREAKDOWN, x before the step;
    - the step is not finite: NONFINITE, x before the step.

    Without a preconditioner alpha and beta are also the entries of the Lanczos matrix T of A, which gives
    `smallest_eigenvalue`: T_jj = 1 / alpha_j + beta_{j-1} / alpha_{j-1}, T_j,j+1 = sqrt(beta_j) / alpha_j.

    Cost: one product a step, of the whole batch, until the slowest system stops; so `max_steps` products for a
    budget. Memory: b, x, r and p, and besides what a product takes, or two more. Not for indefinite or unsymmetric A:
    see `ScipySolver`.

    Args:
        max_steps: Most steps for a system; None is 10 n.
        rtol: Relative tolerance. None is 0 if `max_steps` is given (the steps are the budget), else 1e-5.
        atol: Absolute tolerance, in the units of b.
    """

    max_steps: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    _uses_x0: ClassVar[bool] = True
    _uses_preconditioner: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_stopping(self.max_steps, self.rtol, self.atol)

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        max_steps = 10 * b.shape[-1] if self.max_steps is None else self.max_steps
        default = 1e-5 if self.max_steps is None else 0.0
        rtol = default if self.rtol is None else self.rtol
        run = _Run(op, preconditioner, start(op, b, x0, rtol, self.atol), max_steps, rtol == self.atol == 0)
        while run.any(RUNNING):
            run.step()
            if not run.any(RUNNING) and run.any(_CLAIMED):
                run.verify()
        return run.solution()


class _Run:
    """The state of all systems. Everything is computed for all and kept for those that still run."""

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
        self._claim = begun.tolerance.maximum(self._eps * norm(begun.b))
        self._x, self._r, self._status = begun.x, begun.r, begun.status
        self._residual = norm(begun.r)
        self._num_steps = torch.zeros_like(begun.status)
        self._checked = torch.full_like(self._residual, torch.inf)
        self._stalls = torch.zeros_like(begun.status)
        self._p = torch.zeros_like(begun.r)
        self._rho = torch.ones_like(self._residual)
        self._size = torch.zeros_like(self._residual)
        self._largest = torch.zeros_like(self._residual)
        self._lowest = torch.full_like(self._residual, torch.inf)
        self._carried = torch.zeros_like(self._residual)
        self._fresh = self._status == RUNNING
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self._turn(self._fresh)

    def any(self, status: int) -> bool:
        """Is there a system in this status?"""
        return bool((self._status == status).any())

    def step(self) -> None:
        """One step of every running system."""
        running = self._status == RUNNING
        q = self._op.mv(self._p)
        curvature = dot(self._p, q)
        # For r orthogonal to the old p, p'M^-1 p is `_size`: the ratio is a Rayleigh quotient, and noise below eps.
        largest = self._largest.maximum(curvature / self._size)
        broken = torch.isfinite(curvature) & (curvature <= self._eps * largest * self._size)
        alpha = self._rho / curvature
        r = torch.addcmul(self._r, alpha.unsqueeze(-1), q, value=-1)
        del q  # as many vectors at once as here are all that a step holds
        x = torch.addcmul(self._x, alpha.unsqueeze(-1), self._p)
        residual, size = norm(r), largest_entry(x) * self._unit.squeeze(-1)
        finite = torch.isfinite(curvature) & torch.isfinite(residual) & torch.isfinite(size)
        self._lowest = (curvature / self._size).where(running & broken, self._lowest)
        self._end(running & broken, Status.BREAKDOWN)
        self._end(running & ~broken & ~finite, Status.NONFINITE)
        moved = running & ~broken & finite
        self._note(alpha.where(moved, 0), residual)

        self._x, self._r = _choose(moved, x, self._x), _choose(moved, r, self._r)
        self._residual = residual.where(moved, self._residual)
        self._largest = largest.where(moved, self._largest)
        self._num_steps = self._num_steps + moved
        self._end(moved & (residual <= self._claim), self._met)
        self._end((self._status == RUNNING) & (self._num_steps == self._max_steps), self._spent)
        self._turn(torch.zeros_like(moved))

    def verify(self) -> None:
        """Compare b - A x with the tolerance where the recursive residual met it; what fails runs on from there."""
        claimed = self._status == _CLAIMED
        r = self._b - self._op.mv(self._x)
        residual = norm(r)
        finite = torch.isfinite(residual)
        self._stalls = (self._stalls + 1).where(residual > self._checked / 2, 0)
        self._end(claimed, RUNNING)
        self._end(claimed & (self._num_steps == self._max_steps), Status.MAX_STEPS)
        self._end(claimed & (self._stalls == 2), Status.STAGNATED)
        self._end(claimed & (residual <= self._tolerance), Status.CONVERGED)
        self._end(claimed & ~finite, Status.NONFINITE)
        self._r = _choose(claimed & finite, r, self._r)
        self._residual = residual.where(claimed & finite, self._residual)
        self._checked = self._residual.where(claimed, self._checked)
        self._turn(claimed)

    def solution(self) -> Solution:
        """The outcome in the units of b."""
        residual = self._residual * self._unit.squeeze(-1)
        return Solution(self._x * self._unit, self._status, self._num_steps, residual, self._smallest_eigenvalue())

    def _note(self, alpha: Tensor, residual: Tensor) -> None:
        """Keep the row of T that this step found; alpha is 0 for a system that did not move."""
        beta = residual.square() / self._rho
        self._rows.append((1 / alpha + self._carried, beta.sqrt() / alpha, self._fresh))
        self._carried = beta / alpha

    def _smallest_eigenvalue(self) -> Tensor | None:
        if self._preconditioner is not None:
            return None
        if not self._rows:
            return self._lowest
        rows = [torch.stack(parts) for parts in zip(*self._rows, strict=True)]
        return lower_ritz_value(*rows).minimum(self._lowest)

    def _turn(self, fresh: Tensor) -> None:
        """Choose the next direction of every running system: M r where `fresh`, else conjugate to the last."""
        running = self._status == RUNNING
        if not bool(running.any()):
            return
        z = self._r if self._preconditioner is None else self._preconditioner.mv(self._r)
        rho = dot(self._r, z)
        self._end(running & (rho <= 0), Status.BREAKDOWN)
        running = self._status == RUNNING
        beta = (rho / self._rho).masked_fill(fresh, 0)
        self._p = _choose(running, torch.addcmul(z, beta.unsqueeze(-1), self._p), self._p)
        self._fresh, self._carried = fresh, self._carried.masked_fill(fresh, 0)
        self._size = (rho + beta.square() * self._size).where(running, self._size)
        self._rho = rho.where(running, self._rho)

    def _end(self, systems: Tensor, status: int) -> None:
        self._status = self._status.masked_fill(systems, status)


def _choose(systems: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where chosen, else `old`; written into `new`."""
    return torch.where(systems.unsqueeze(-1), new, old, out=new)
