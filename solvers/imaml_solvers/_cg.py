"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._iteration import ROUNDING, Iteration, KrylovSolver
from imaml_solvers._solution import Status
from imaml_solvers._start import RUNNING
from imaml_solvers._vectors import add_where, choose, dot, largest_of_sum, norm, norm_of_sum

_SINGULAR = 4.0
"""A is singular where a Rayleigh quotient is below this many eps of the largest; at 1, some processors let matrices get
by that are singular to rounding, and x becomes 1 / eps long."""


@dataclass(frozen=True, kw_only=True)
class CG(KrylovSolver):
    r"""Solves symmetric positive definite systems by conjugate gradients, with an optional preconditioner M.

    $$\alpha = r^\top M r / p^\top A p, \quad x \leftarrow x + \alpha p, \quad r \leftarrow r - \alpha A p,$$

    $$\beta = (r^\top M r)_{new} / (r^\top M r)_{old}, \quad p \leftarrow M r + \beta p$$

    Without a preconditioner the error $e$ after k steps obeys $|e|_A \le 2 \, ((\sqrt{c} - 1) / (\sqrt{c} + 1))^k \,
    |e_0|_A$ for the condition number $c$, and is zero after as many steps as A has distinct eigenvalues, but for
    rounding.

    A system stops, each on its own and its x frozen bit for bit, when

    - |r| <= max(rtol |b|, atol). Once all have stopped, b - A x is computed (one product). CONVERGED if it meets the
      tolerance too; else the system goes on from it, and is STAGNATED if it was not halved twice in a row. This comes
      early where |r| <= eps |r_0|: beyond, from an x0 far away, the recursion would carry nothing but rounding;
    - the tolerances are zero, and the steps are spent (BUDGET_SPENT; b - A x is not computed) or |r| <= eps |b|;
    - p'Ap or r'Mr is not above 10 eps |p| |Ap| or 10 eps |r| |Mr|, where its sign is that of rounding, or p'Ap / p'M^-1
      p is below 4 eps times the largest so far (A is singular to working precision): BREAKDOWN, x before the step;
    - the step is not finite: NONFINITE, x before the step.

    Without a preconditioner $\alpha$ and $\beta$ are also the entries of the Lanczos matrix $T$ of A, which gives
    `smallest_eigenvalue`: $T_{jj} = 1 / \alpha_j + \beta_{j-1} / \alpha_{j-1}$, $T_{j,j+1} = \sqrt{\beta_j} /
    \alpha_j$.

    Cost: one product a step, of the whole batch, until the slowest system stops; so `max_steps` products for a budget;
    besides those that build a preconditioner. Without one, k steps end with the eigenvalues of T, work of min(k, 200)^3
    a system: for 200 rows 5 to 25 ms on one core of a CPU, more than all of the products where those are cheap.

    Memory: b, x, r and p, and besides what a product takes, or two more.

    Not for indefinite A: see `MINRES`; nor for unsymmetric A: see `ScipySolver`.

    Source: Hestenes & Stiefel 1952.

    Args:
        max_steps: Most steps for a system; None is 10 n.
        rtol: Relative tolerance. None is 0 if `max_steps` is given (the steps are the budget), else 1e-5.
        atol: Absolute tolerance, in the units of b.
        preconditioner: Built anew at the start of each solve, such as `Nystrom(rank=20)`; one given to `solve` takes
            its place.
    """

    @property
    def _iteration(self) -> type[Iteration]:
        return _Run


class _Run(Iteration):
    def _prepare(self) -> None:
        if self._r is self._b:  # r is written in place
            self._r = self._b.clone()
        self._p = torch.zeros_like(self._r)
        self._rho = torch.ones_like(self._residual)
        self._size = torch.zeros_like(self._residual)
        self._carried = torch.zeros_like(self._residual)

    def _step(self) -> None:
        running = self._status == RUNNING
        q = self._op.mv(self._p)
        curvature = dot(self._p, q)
        # For r orthogonal to the old p, p'M^-1 p is `_size`: the ratio is a Rayleigh quotient.
        largest = self._largest.maximum(curvature / self._size)
        length = self._size.sqrt() if self._preconditioner is None else norm(self._p)
        noise = (ROUNDING * length * norm(q)).maximum(_SINGULAR * largest * self._size) * self._eps
        broken = torch.isfinite(curvature) & (curvature <= noise)
        alpha = self._rho / curvature
        step = alpha.unsqueeze(-1)
        residual = norm_of_sum(self._r, -step, q)
        size = largest_of_sum(self._x, step, self._p) * self._unit.squeeze(-1)
        finite = torch.isfinite(curvature) & torch.isfinite(residual) & torch.isfinite(size)
        self._lowest = (curvature / self._size).where(running & broken, self._lowest)
        self._end(running & broken, Status.BREAKDOWN)
        self._end(running & ~broken & ~finite, Status.NONFINITE)
        moved = running & ~broken & finite
        self._note(alpha.where(moved, 0), residual)
        self._largest = largest.where(moved, self._largest)
        add_where(moved, self._r, -step, q)
        del q  # as many vectors at once as here are all that a step holds
        add_where(moved, self._x, step, self._p)
        self._count(moved, residual)
        self._begin(torch.zeros_like(moved))

    def _note(self, alpha: Tensor, residual: Tensor) -> None:
        """Keep the row of T that this step found; alpha is 0 for a system that did not move."""
        beta = residual.square() / self._rho
        self._rows.append((1 / alpha + self._carried, beta.sqrt() / alpha, self._fresh))
        self._carried = beta / alpha

    def _begin(self, systems: Tensor) -> None:
        """Choose the next direction of every running system: M r in these, else conjugate to the last."""
        running = self._status == RUNNING
        if not bool(running.any()):
            return
        z = self._precondition(self._r)
        rho = dot(self._r, z)
        noise = 0 if self._preconditioner is None else ROUNDING * self._eps * norm(self._r) * norm(z)
        self._end(running & (rho <= noise), Status.BREAKDOWN)
        running = self._status == RUNNING
        beta = (rho / self._rho).masked_fill(systems, 0)
        # a new vector, since the operator may have kept the last one
        self._p = choose(running, torch.addcmul(z, beta.unsqueeze(-1), self._p), self._p)
        self._fresh, self._carried = systems, self._carried.masked_fill(systems, 0)
        self._size = (rho + beta.square() * self._size).where(running, self._size)
        self._rho = rho.where(running, self._rho)
