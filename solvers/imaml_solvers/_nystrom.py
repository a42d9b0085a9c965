"""The Nystrom approximation, as a preconditioner and as an inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._preconditioner import Preconditioner
from imaml_solvers._sketch import sketch
from imaml_solvers._solution import Solution, Status
from imaml_solvers._solver import LinearSolver
from imaml_solvers._start import RUNNING, check_stopping, start
from imaml_solvers._vectors import largest_entry, norm


@dataclass(frozen=True, kw_only=True)
class Nystrom(Preconditioner):
    r"""Preconditions A = H + mu I, H of fast decay, by a randomised low-rank approximation of H.

    $$M = (l_k + \mu) \, U (L + \mu I)^{-1} U^\top + I - U U^\top$$

    $U$ and $L$, with smallest entry $l_k$, are the eigenvectors and -values of a rank-k Nystrom approximation of H,
    from products with k random vectors. $M A$ has a condition number of about $(l_k + \mu) / \mu$, so that CG takes few
    steps where H has about k large eigenvalues. What cannot come from a positive semi-definite H is left out: M is
    positive definite whatever A is.

    Cost: k products in every solve, which neither `num_steps` nor `max_steps` counts, and O(n k^2) work. Memory: k
    vectors per system during the solve, and three times that to build them.

    CG alone meets k separate eigenvalues in about k steps: this pays where it needs many more, because they lie close
    together or rounding makes it meet them again.

    Source: Frangella, Tropp & Udell 2021, eq. 5.3.

    Args:
        rank: k; n if that is less.
        shift: mu >= 0, such as 1.0 for I + H / lambda. None estimates it as the smallest eigenvalue of A in the space
            of the random vectors: an upper bound on that of A, near mu where the eigenvalues of H beyond k are small.
        seed: Seed of the random vectors.
    """

    rank: int
    shift: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        _check(self.rank, self.shift)

    def build(self, op: LinearOperator, like: Tensor) -> LinearOperator:
        """See `Preconditioner`."""
        seen = sketch(op, like, self.rank, self.shift, self.seed)
        mu, is_seen = seen.shift.unsqueeze(-1), seen.values > 0
        least = seen.values.where(is_seen, torch.inf).amin(-1, keepdim=True)
        weights = ((least + mu) / (seen.values + mu) - 1).where(is_seen, 0)
        return LinearOperator(lambda r: r + seen.combine(weights, r))


@dataclass(frozen=True, kw_only=True)
class NystromInverse(LinearSolver):
    r"""Solves A = H + mu I, H of rank about k, by inverting a Nystrom approximation, without any iteration.

    $$x = (b - U L (L + \mu I)^{-1} U^\top b) / \mu, \quad H \approx U L U^\top \text{ as for Nystrom}$$

    There is nothing to tune but the rank: exact for positive semi-definite H of rank below k, and off by about $|H - U
    L U^\top| / \mu$ else. The authors multiply H by k unit vectors; the random ones here see H whatever its basis.

    The residual b - A x, from one more product, has the last word: CONVERGED if |b - A x| <= max(rtol |b|, atol), else
    MAX_STEPS, or BUDGET_SPENT if both tolerances are zero; BREAKDOWN, with x = 0, if it is above |b| or mu is zero;
    NONFINITE, with x = 0, if it is not finite.

    Cost: k + 1 products (`num_steps` is k) and O(n k^2) work. Memory: 3 k vectors per system.

    `CG` of k steps is as a rule nearer to the solution; this one is a fixed linear map of b.

    Source: Hataya & Yamada 2023.

    Args:
        rank: k; n if that is less.
        shift: As for `Nystrom`.
        seed: Seed of the random vectors.
        rtol: Relative tolerance; 0 (and `atol` 0) makes the rank the budget.
        atol: Absolute tolerance, in the units of b.
    """

    rank: int
    shift: float | None = None
    seed: int = 0
    rtol: float = 0.0
    atol: float = 0.0

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        _check(self.rank, self.shift)
        check_stopping(None, self.rtol, self.atol)

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        begun = start(op, b, x0, self.rtol, self.atol)
        x, residual, status = begun.x, norm(begun.r), begun.status
        num_steps = torch.zeros_like(status)
        running = status == RUNNING
        if bool(running.any()):
            seen = sketch(op, begun.b, self.rank, self.shift, self.seed)
            mu = seen.shift.unsqueeze(-1)
            rest = begun.b - seen.combine(seen.values / (seen.values + mu), begun.b)
            new = rest / (mu * seen.unit.unsqueeze(-1)).to(b.dtype)
            new = torch.where(running.unsqueeze(-1) & (mu > 0), new, 0)
            left = norm(begun.b - op.mv(new))
            finite = torch.isfinite(left) & torch.isfinite(largest_entry(new) * begun.unit.squeeze(-1))
            moved = running & finite & (left <= residual) & (seen.shift > 0)
            x, residual = new.where(moved.unsqueeze(-1), x), left.where(moved, residual)
            num_steps = num_steps.masked_fill(running, seen.values.shape[-1])
            spent = Status.BUDGET_SPENT if self.rtol == self.atol == 0 else Status.MAX_STEPS
            status = status.masked_fill(running, Status.BREAKDOWN).masked_fill(running & ~finite, Status.NONFINITE)
            status = status.masked_fill(moved, spent)
            status = status.masked_fill(moved & (residual <= begun.tolerance), Status.CONVERGED)
        return Solution(x * begun.unit, status, num_steps, residual * begun.unit.squeeze(-1))


def _check(rank: int, shift: float | None) -> None:
    if rank < 1:
        raise ValueError(f"`rank` must be >= 1. Got {rank}.")
    if shift is not None and not 0 <= shift < float("inf"):
        raise ValueError(f"`shift` must be finite and >= 0, or None to estimate it. Got {shift}.")
