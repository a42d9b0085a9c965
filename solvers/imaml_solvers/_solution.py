"""What a solve returns."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor


class Status(IntEnum):
    """Says how a solve ended; its `message` says what to change."""

    message: str

    CONVERGED = 0, "The residual met the tolerance."
    BUDGET_SPENT = 1, "The tolerances are zero and the steps were the budget: `residual_norm` says what is left."
    MAX_STEPS = (
        2,
        "The tolerance was not met within `max_steps`. Allow more steps (or a higher `rank`), loosen `rtol`, give a "
        "preconditioner, or add damping (a multiple of the identity) to the matrix.",
    )
    BREAKDOWN = (
        3,
        "The matrix (or the preconditioner) is singular or not positive definite, or the step of an iteration is too "
        "long for it. Add damping (a multiple of the identity; for I + H / lambda a larger lambda), take a positive "
        "semi-definite H (curvature='ggn'), use MINRES for a symmetric indefinite matrix and "
        "ScipySolver(method='gmres') for an unsymmetric one, or shorten the step.",
    )
    NONFINITE = (
        4,
        "The right-hand side, the start or a product was NaN or infinite. Find the overflow in what computes the "
        "product, use float64, or add damping (a multiple of the identity).",
    )
    STAGNATED = (
        5,
        "Rounding keeps the residual above the tolerance. Loosen `rtol`, use float64, give a preconditioner, or add "
        "damping (a multiple of the identity).",
    )

    def __new__(cls, value: int, message: str = "") -> Status:
        """An integer with a message."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.message = message
        return member


@dataclass(frozen=True)
class Solution:
    """Holds the solutions of a batch of systems A x = b; nothing here carries gradients."""

    x: Tensor
    """The solutions, or the last good iterates, `(*batch, n)`; finite whatever happened."""
    status: Tensor
    """A `Status` per system, int64 `(*batch,)`: `status == Status.CONVERGED` compares elementwise."""
    num_steps: Tensor
    """Steps taken per system, int64 `(*batch,)`."""
    residual_norm: Tensor
    """|b - A x| per system, `(*batch,)`, in the units of b: recomputed from x where the solver checked it, else the one
    that its recursion carries."""
    smallest_eigenvalue: Tensor | None = None
    """A careful estimate of the smallest eigenvalue of symmetric A, `(*batch,)`: that of the Krylov space, the smallest
    Ritz value less the norm of its residual (exact but for rounding after n steps), or that of the assembled matrix.
    None from solvers that have none."""

    @property
    def success(self) -> Tensor:
        """Per system, bool `(*batch,)`: did the solve end as asked, CONVERGED or BUDGET_SPENT?"""
        return (self.status == Status.CONVERGED) | (self.status == Status.BUDGET_SPENT)
