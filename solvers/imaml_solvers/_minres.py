"""The minimum residual method."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._iteration import ROUNDING, Iteration, KrylovSolver
from imaml_solvers._solution import Status
from imaml_solvers._start import RUNNING
from imaml_solvers._vectors import choose, dot, largest_entry, norm, power_of_two

_SINGULAR = 0.75
"""A is singular to this power of eps: worse conditioned, its least squares are dominated by rounding."""


@dataclass(frozen=True, kw_only=True)
class MINRES(KrylovSolver):
    r"""Solves symmetric systems, definite or not, by the minimum residual method, with an optional preconditioner M.

    The k-th iterate has the least |b - A x| of all x0 + z, z in the Krylov space of b - A x0 (with a preconditioner M,
    symmetric positive definite, the least r'Mr). It comes from the Lanczos process, whose tridiagonal T is brought to
    triangular form by one rotation a step.

    Where A has eigenvalues of both signs, the residual falls by $(\sqrt{c c'} - 1) / (\sqrt{c c'} + 1)$ every two
    steps, for the condition numbers $c$ and $c'$ of its two parts: about the square of CG's steps for a matrix as
    ill-conditioned. A singular A is solved where b is in its range.

    A system stops, each on its own and its x frozen bit for bit, when

    - |r| <= max(rtol |b|, atol), with CONVERGED, STAGNATED and zero tolerances (BUDGET_SPENT) as for `CG`: b - A x has
      the last word;
    - the step's direction w has |A w| <= eps^(3/4) |A| |w|, with the largest |A v| / |v| met for |A| (BREAKDOWN): A is
      singular and b outside of its range, to working precision. |b - A x| is then about the least that there is;
    - r'Mr is not above 10 eps |r| |Mr|: BREAKDOWN, x before the step;
    - the step is not finite: NONFINITE, x before the step.

    Without a preconditioner T also gives `smallest_eigenvalue`, below zero for indefinite A.

    Cost: one product a step, of the whole batch, until the slowest system stops; besides those that build a
    preconditioner, and the eigenvalues of T as for `CG`.

    Memory: b, x and seven vectors, one more with M, besides what a product takes.

    For definite A `CG` takes about as many steps with less memory, and sees that A is definite. Not for unsymmetric A:
    see `ScipySolver`.

    Source: Paige & Saunders 1975.

    Args:
        max_steps: Most steps for a system; None is 10 n.
        rtol: Relative tolerance. None is 0 if `max_steps` is given (the steps are the budget), else 1e-5.
        atol: Absolute tolerance, in the units of b.
        preconditioner: As for `CG`.
    """

    @property
    def _iteration(self) -> type[Iteration]:
        return _Run


class _Run(Iteration):
    """Names after Paige & Saunders: T has alpha on its diagonal and beta beside it; Q T = R has gamma, delta, epsilon.

    y is the next Lanczos vector times beta, z = M y. A and M together act as M^1/2 A M^1/2.
    """

    def _begin(self, systems: Tensor) -> None:
        # called when no other system runs
        z = self._precondition(self._r)
        beta = self._size(self._r, z)
        going = (self._status == RUNNING).unsqueeze(-1)
        self._y, self._z = self._r.where(going, 0), z.where(going, 0)
        self._before = self._w = self._w_before = torch.zeros_like(self._r)
        self._beta, self._beta_before = beta.where(beta != 0, 1), torch.ones_like(beta)
        self._phi_bar, self._cosine = beta, -torch.ones_like(beta)
        self._sine = self._delta_bar = self._epsilon = torch.zeros_like(beta)
        self._fresh = systems

    def _step(self) -> None:
        running = self._status == RUNNING
        v = self._z / self._beta.unsqueeze(-1)
        y = self._op.mv(v)
        product = norm(y)
        largest = self._largest.maximum(product / norm(v))
        y = torch.addcmul(y, (self._beta / self._beta_before).unsqueeze(-1), self._before, value=-1)
        alpha = dot(v, y)
        y = torch.addcmul(y, (alpha / self._beta).unsqueeze(-1), self._y, value=-1)
        z = self._precondition(y)
        beta = self._size(y, z)

        delta = self._cosine * self._delta_bar + self._sine * alpha
        gamma_bar = self._sine * self._delta_bar - self._cosine * alpha
        delta_bar = -self._cosine * beta
        gamma = torch.hypot(gamma_bar, beta)
        cosine, sine = gamma_bar / gamma, beta / gamma
        phi = cosine * self._phi_bar
        w = torch.addcmul(v, self._epsilon.unsqueeze(-1), self._w_before, value=-1)
        w = torch.addcmul(w, delta.unsqueeze(-1), self._w, value=-1).div_(gamma.unsqueeze(-1))
        # A w, of norm 1 with M: the last rotation makes r = sine^2 (r before) - phi / gamma y, and A w is its change
        image = torch.addcmul(y / gamma.unsqueeze(-1), (cosine / self._phi_bar).unsqueeze(-1), self._r)
        x = torch.addcmul(self._x, phi.unsqueeze(-1), w)
        r = torch.addcmul(self._r, phi.unsqueeze(-1), image, value=-1)

        residual, size = norm(r), largest_entry(x) * self._unit.squeeze(-1)
        known = torch.isfinite(alpha) & torch.isfinite(beta)
        singular = ~(norm(image) > self._eps**_SINGULAR * largest * norm(w))
        broken = known & (singular | ((beta == 0) & (norm(y) > ROUNDING * self._eps * product)))
        moved = running & ~broken & known & torch.isfinite(residual) & torch.isfinite(size)
        self._end(running & broken, Status.BREAKDOWN)
        self._end(running & ~broken & ~moved, Status.NONFINITE)
        self._rows.append((alpha.where(running & known, torch.inf), beta, self._fresh))
        self._largest = largest.where(moved, self._largest)
        self._x, self._r = choose(moved, x, self._x), choose(moved, r, self._r)
        self._count(moved, residual)

        going = (self._status == RUNNING).unsqueeze(-1)
        self._before, self._y = self._y.where(going, 0), y.where(going, 0)
        self._z = self._y if self._preconditioner is None else z.where(going, 0)
        self._w_before, self._w = self._w, w
        self._beta_before, self._beta = self._beta, beta.where(going.squeeze(-1), 1)
        self._epsilon, self._phi_bar = self._sine * beta, sine * self._phi_bar
        self._cosine, self._sine, self._delta_bar = cosine, sine, delta_bar
        self._fresh = torch.zeros_like(running)

    def _size(self, y: Tensor, z: Tensor) -> Tensor:
        """The norm (y'My)^1/2 of y, from z = M y; 0 where M is not positive, but for rounding."""
        if self._preconditioner is None:
            return norm(y)
        unit = power_of_two(largest_entry(y).unsqueeze(-1))
        y, z = y / unit, z / unit
        square = dot(y, z)
        noise = ROUNDING * self._eps * norm(y) * norm(z)
        return square.masked_fill(square <= noise, 0).sqrt() * unit.squeeze(-1)
