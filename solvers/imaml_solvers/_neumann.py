"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._solution import Solution, Status
from imaml_solvers._solver import LinearSolver
from imaml_solvers._start import RUNNING, check_stopping, start
from imaml_solvers._vectors import norm

_POWER_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Neumann(LinearSolver):
    r"""Solves symmetric positive definite systems by a Neumann series (Richardson iteration), a fixed polynomial of A.

    $$x \leftarrow x + \alpha (b - A x); \quad \text{from 0, K steps give} \quad x = \alpha \sum_{k<K} (I - \alpha A)^k
    b$$

    A step shrinks the residual by $q = \max |1 - \alpha \lambda|$ over the eigenvalues $\lambda$; $q < 1$ needs $\alpha
    < 2 / \lambda_{max}$.

    Without `step_size`, $\alpha = 1 / l$ with $l$ the estimate of $\lambda_{max}$ from 10 steps of the power method
    started at the residual. $l \le \lambda_{max}$, and $l > \lambda_{max} / 2$ (so $q < 1$) if more than $2^{-10}$ of
    the norm of the start is in the leading eigenvector; then $q$ is about $1 - 1 / c$ for the condition number $c$.

    A system stops

    - when |b - A x| <= max(rtol |b|, atol): CONVERGED;
    - when the steps are spent: BUDGET_SPENT if both tolerances are zero, else MAX_STEPS;
    - when the residual exceeds that of the start, which for symmetric A means that the series diverges: BREAKDOWN;
    - or on a product that is not finite: NONFINITE.

    Its x is the iterate of least residual.

    Cost: one product a step, and 10 for the power method; residuals are the true ones. Memory: five vectors.

    CG needs about the square root of the steps: prefer it, unless a fixed polynomial of A is wanted. Not for indefinite
    A: see `MINRES`; nor for unsymmetric A: see `ScipySolver`.

    Args:
        max_steps: Most steps for a system.
        step_size: alpha > 0 for every system; None scales it to the spectrum of each.
        rtol: Relative tolerance; 0 (and `atol` 0) makes the steps the budget.
        atol: Absolute tolerance, in the units of b.
    """

    max_steps: int
    step_size: float | None = None
    rtol: float = 0.0
    atol: float = 0.0
    _uses_x0: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        check_stopping(self.max_steps, self.rtol, self.atol)
        if self.step_size is not None and not 0 < self.step_size < float("inf"):
            raise ValueError(f"`step_size` must be finite and > 0, or None. Got {self.step_size}.")

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        begun = start(op, b, x0, self.rtol, self.atol)
        b, status, x, r = begun.b, begun.status, begun.x, begun.r
        best, least = x, norm(r)
        # Rounding moves the residual even where it no longer falls.
        most = least + torch.finfo(b.dtype).eps ** 0.5 * norm(b)
        num_steps = torch.zeros_like(status)
        alpha = self._step_size(op, r) if bool((status == RUNNING).any()) else least
        for _ in range(self.max_steps):
            running = status == RUNNING
            if not bool(running.any()):
                break
            x = torch.where(running.unsqueeze(-1), x + alpha.unsqueeze(-1) * r, x)
            r = torch.where(running.unsqueeze(-1), b - op.mv(x), r)
            residual = norm(r)
            finite = torch.isfinite(residual) & torch.isfinite(x * begun.unit).all(-1)
            better = running & finite & (residual < least)
            best, least = torch.where(better.unsqueeze(-1), x, best), residual.where(better, least)
            num_steps = num_steps + (running & finite)
            status = status.masked_fill(running & (residual <= begun.tolerance), Status.CONVERGED)
            status = status.masked_fill(running & (residual > most), Status.BREAKDOWN)
            status = status.masked_fill(running & ~finite, Status.NONFINITE)
        spent = Status.BUDGET_SPENT if self.rtol == self.atol == 0 else Status.MAX_STEPS
        status = status.masked_fill(status == RUNNING, spent)
        return Solution(best * begun.unit, status, num_steps, least * begun.unit.squeeze(-1))

    def _step_size(self, op: LinearOperator, v: Tensor) -> Tensor:
        """The alpha of every system, `(*batch,)`."""
        if self.step_size is not None:
            return torch.full_like(v[..., 0], self.step_size)
        # The series stays in the Krylov space of the residual, and so does the estimate: it needs no random start.
        size = norm(v)
        for _ in range(_POWER_STEPS):
            v = op.mv(v / size.where(size > 0, 1).unsqueeze(-1))
            size = norm(v)
        return 1 / size.where(size > 0, 1)
