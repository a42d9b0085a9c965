"""How far an implicit meta-gradient is from that at the exact stationary point, at most."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imaml_solvers import LinearOperator, Solution, Status
from imaml_solvers._lanczos import smallest_eigenvalue

LANCZOS_STEPS, LANCZOS_VECTORS = 10, 3
"""Products of `smallest_eigenvalue` where the solver has no estimate, and vectors that it holds besides b."""
_SAFETY = 5.0
"""What stands for all that is not looked at. A rigorous bound would need the smallest eigenvalue itself, and third
derivatives in the whole neighbourhood; docs/numerics.md has the measurements that chose it."""
_ROUNDING = 10.0
"""What rounding makes of a sum, in units of eps."""


def careful_eigenvalue(solution: Solution, op: LinearOperator, rhs: Tensor, damping: float | Tensor = 0.0) -> Tensor:
    """A lower estimate mu of the smallest eigenvalue of A: that of the solver, or of Lanczos steps.

    Above 1 its square root is taken: outside the Krylov space there may be directions in which the support loss is flat
    and A is 1, unless that space is all of space. 1 for b = 0, which tells nothing.

    Args:
        solution: The solution of (A + delta I) x = b.
        op: A.
        rhs: b, `(tasks, n)`.
        damping: delta, one number or `(tasks,)`.

    Returns:
        `(tasks,)`. Costs a few products where the solver has no estimate.
    """
    n, found, steps = rhs.shape[-1], solution.smallest_eigenvalue, solution.num_steps
    if found is None:
        count = min(LANCZOS_STEPS, n)
        with torch.no_grad():
            found, steps = smallest_eigenvalue(op, rhs, count), torch.full_like(steps, count)
    else:
        found = found - damping
    found = found.masked_fill(is_zero(rhs), 1)
    return torch.where((steps >= n) | (found < 1), found, found.abs().sqrt())


def solution_error(
    mu: Tensor,
    rhs: Tensor,
    residual_norm: Tensor,
    gradient: Tensor,
    size: Tensor,
    look: Callable[[Tensor], tuple[Tensor, Callable[[], Tensor]]],
) -> Tensor:
    """A bound on |x - x*| where A x = b was solved at y, and A* x* = b* holds at the exact stationary point y*.

        x - x* = -A*^-1 R*, R = b - A x at fixed x;  bound = 5 (|R(y)| + |R(y')|) / mu

    for one y' as far from y as y* may be, |gradient| / mu: down the gradient, and partly along b, where the query's
    curvature is large. y = Lambda^1/2 phi are the coordinates in which A is the Hessian of the inner objective, so the
    change of its gradient to y' corrects mu. The factor 5 is for the direction of y*, and for what mu misses.

    Args:
        mu: See `careful_eigenvalue`.
        rhs: b at y, `(tasks, n)`.
        residual_norm: |R(y)|, `(tasks,)`.
        gradient: Gradient of the inner objective by y, `(tasks, n)`.
        size: |y|, `(tasks,)`, which rounding is in proportion to.
        look: From a displacement of y, whose memory it may use, to the gradient there and, once that is used, R.

    Returns:
        `(tasks,)`; inf or NaN where mu is not positive or something is not finite.
    """
    eps = torch.finfo(rhs.dtype).eps
    mu = mu.where(mu > 0, torch.nan)
    rounding = (_ROUNDING * eps * size).masked_fill(is_zero(rhs), 0)
    far = (gradient.norm(dim=-1) + rounding) / mu
    direction = _direction(gradient, rhs)
    there, residual = look(far.nan_to_num(posinf=0.0).unsqueeze(-1) * direction)
    secant = ((there - gradient) * direction).sum(-1) / far
    del there, direction
    # Nearer than sqrt(eps) the change of the gradient is rounding.
    mu = mu.minimum(secant.where(far > eps**0.5 * size, torch.inf))
    residuals: Tensor = residual_norm + residual().norm(dim=-1) + _ROUNDING * eps * rhs.norm(dim=-1)
    return _SAFETY * residuals / mu.where(mu > 0, torch.nan)


def relative_bound(error: Tensor, size: Tensor, status: Tensor) -> Tensor:
    """A bound on |u - u*| / |u*| from one on |u - u*|: inf where u* may be zero or the solve broke down.

    Args:
        error: The bound on |u - u*|, `(tasks,)`.
        size: |u|, `(tasks,)`.
        status: A `Status` per task.

    Returns:
        `(tasks,)`, without NaN.
    """
    broken = (status == Status.BREAKDOWN) | (status == Status.NONFINITE)
    bound = torch.where((error < size) & ~broken, error / (size - error), torch.inf)
    return bound.masked_fill(error == 0, 0)


def _direction(gradient: Tensor, rhs: Tensor) -> Tensor:
    """Unit vectors down the gradient and a third along b, whichever way is the nearer to it."""
    down, along = _unit(-gradient), _unit(rhs)
    same = (down * along).sum(-1, keepdim=True) >= 0
    return _unit(3 * down + torch.where(same, along, -along))


def _unit(x: Tensor) -> Tensor:
    size: Tensor = x.norm(dim=-1, keepdim=True)
    return x / size.where(size > 0, 1)


def is_zero(x: Tensor) -> Tensor:
    """Which vectors are zero, `(tasks,)`."""
    zero: Tensor = (x == 0).all(-1)
    return zero
