"""The direct solve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._solution import Solution, Status
from imaml_solvers._solver import LinearSolver


@dataclass(frozen=True, kw_only=True)
class Dense(LinearSolver):
    """Assembles A from its products with the unit vectors, and solves by LU with partial pivoting.

    For any regular A, symmetric or not. CONVERGED means solved to rounding: |b - A x| is of the order of eps |A| |x|.
    BREAKDOWN, with x = 0, where that is not below 0.01 |b|: A is singular to working precision. NONFINITE, with x = 0,
    where b or A is not finite. `smallest_eigenvalue` is that of (A + A') / 2.

    Cost: n products of the whole batch (`num_steps` is n), O(n^3) work and O(n^2) memory a system: for small n, and as
    a reference.
    """

    def _solve(
        self, op: LinearOperator, b: Tensor, x0: Tensor | None, preconditioner: LinearOperator | None
    ) -> Solution:
        n, eps = b.shape[-1], torch.finfo(b.dtype).eps
        matrix = assemble(op, b).to(torch.promote_types(b.dtype, torch.float32))
        rhs = b.to(matrix.dtype)
        zero = (b == 0).all(-1)
        finite = torch.isfinite(matrix).flatten(-2).all(-1) & torch.isfinite(b).all(-1)
        usable = finite & ~zero
        identity = torch.eye(n, dtype=matrix.dtype, device=b.device)
        matrix = torch.where(usable[..., None, None], matrix, identity)
        factors, pivots, _ = torch.linalg.lu_factor_ex(matrix)
        x = torch.linalg.lu_solve(factors, pivots, rhs.unsqueeze(-1)).squeeze(-1).to(b.dtype)
        rounding = eps * matrix.abs().sum(-1).amax(-1) * x.abs().amax(-1)
        solved = (usable & (rounding < 0.01 * b.abs().amax(-1))) | zero
        x = torch.where(solved.unsqueeze(-1), x, 0)
        residual = rhs - (matrix @ x.to(matrix.dtype).unsqueeze(-1)).squeeze(-1)
        status = torch.full(b.shape[:-1], Status.BREAKDOWN, device=b.device)
        status = status.masked_fill(~finite, Status.NONFINITE).masked_fill(solved, Status.CONVERGED)
        num_steps = torch.full_like(status, n).masked_fill(zero, 0)
        lowest = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)[..., 0].to(b.dtype)
        return Solution(x, status, num_steps, torch.linalg.vector_norm(residual, dim=-1).to(b.dtype), lowest)


def assemble(op: LinearOperator, like: Tensor) -> Tensor:
    """The matrices `(*batch, n, n)` of an operator on vectors shaped like `like`, column by column: n products."""
    columns = []
    for i in range(like.shape[-1]):
        unit = torch.zeros_like(like)
        unit[..., i] = 1
        columns.append(op.mv(unit))
    return torch.stack(columns, dim=-1)
