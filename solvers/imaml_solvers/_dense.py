"""The direct solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._solution import Solution, Status
from imaml_solvers._solver import LinearSolver
from imaml_solvers._vectors import largest_entry, norm, power_of_two


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """Solves any regular system directly: for small n, and as a reference.

    A, symmetric or not, is assembled from its products with the unit vectors, and solved by LU with partial pivoting,
    in float32 at least; its rows are scaled alike first.

    CONVERGED means solved to rounding: |b - A x| is of the order of eps | |A| |x| |, with absolute values of every
    entry. BREAKDOWN, with x = 0, is said where that is not below 0.01 |b|, so that A is singular to working precision,
    or where x overflows. NONFINITE, with x = 0, is said where b or A is not finite.

    `smallest_eigenvalue` is that of (A + A') / 2.

    Cost: n products of the whole batch (`num_steps` is n), and O(n^3) work a system. Memory: O(n^2) a system.
    """

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        n, dtype = b.shape[-1], torch.promote_types(b.dtype, torch.float32)
        matrix, rhs = assemble(op, b).to(dtype), b.to(dtype)
        unit = power_of_two(largest_entry(rhs).unsqueeze(-1))
        rhs = rhs / unit
        zero = (b == 0).all(-1)
        finite = torch.isfinite(matrix).flatten(-2).all(-1) & torch.isfinite(b).all(-1)
        usable = finite & ~zero
        identity = torch.eye(n, dtype=matrix.dtype, device=b.device)
        matrix = torch.where(usable[..., None, None], matrix, identity)
        rows = power_of_two(largest_entry(matrix))
        balanced, target = matrix / rows.unsqueeze(-1), rhs / rows
        factors, pivots, _ = torch.linalg.lu_factor_ex(balanced)
        x = torch.linalg.lu_solve(factors, pivots, target.unsqueeze(-1)).squeeze(-1)
        rounding = torch.finfo(dtype).eps * (balanced.abs() @ x.abs().unsqueeze(-1)).squeeze(-1)
        regular = largest_entry(rounding) < 0.01 * largest_entry(target)
        x = (x * unit).to(b.dtype)
        solved = (usable & regular & torch.isfinite(x).all(-1)) | zero
        x = torch.where(solved.unsqueeze(-1), x, 0)
        residual = norm(rhs - (matrix @ (x / unit).unsqueeze(-1)).squeeze(-1)) * unit.squeeze(-1)
        status = torch.full(b.shape[:-1], Status.BREAKDOWN, device=b.device)
        status = status.masked_fill(~finite, Status.NONFINITE).masked_fill(solved, Status.CONVERGED)
        num_steps = torch.full_like(status, n).masked_fill(zero, 0)
        lowest = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[..., 0].to(b.dtype)
        return Solution(x, status, num_steps, residual.to(b.dtype), lowest)


def assemble(op: LinearOperator, like: Tensor) -> Tensor:
    """The matrices `(*batch, n, n)` of an operator on vectors shaped like `like`, column by column: n products."""
    columns = []
    for i in range(like.shape[-1]):
        unit = torch.zeros_like(like)
        unit[..., i] = 1
        columns.append(op.mv(unit))
    return torch.stack(columns, dim=-1)
