"""The smallest eigenvalue of a symmetric map, as the Krylov space of a vector knows it."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._vectors import dot, norm

_MOST_ROWS = 200
"""Rows of T whose eigenvalues are computed."""


def smallest_eigenvalue(op: LinearOperator, b: Tensor, steps: int) -> Tensor:
    """The estimate of `lower_ritz_value` after steps of the Lanczos process (1950) from b.

    The three-term recurrence, without reorthogonalisation: copies of Ritz values do no harm to the smallest. Memory:
    three vectors.

    Args:
        op: Symmetric A.
        b: Where to start, `(*batch, n)`.
        steps: Products with A, at least 1; at most n are of use.

    Returns:
        `(*batch,)`; inf for b = 0.
    """
    eps = torch.finfo(b.dtype).eps
    coupling = norm(b)
    v, before = b, torch.zeros_like(b)
    going, size = coupling > 0, torch.zeros_like(coupling)
    rows: list[tuple[Tensor, Tensor]] = []
    for row in range(steps):
        v = v / coupling.where(going, 1).unsqueeze(-1)
        w = op.mv(v)
        diagonal = dot(v, w)
        size = size.maximum(norm(w))
        w = w - diagonal.unsqueeze(-1) * v
        if row:
            w = w - coupling.unsqueeze(-1) * before
        coupling = norm(w)
        rows.append((diagonal.masked_fill(~going, torch.inf), coupling))
        going = going & (coupling > 10 * eps * size)  # else the Krylov space is exhausted
        v, before = w, v
    diagonals, couplings = (torch.stack(parts) for parts in zip(*rows, strict=True))
    return lower_ritz_value(diagonals, couplings, torch.zeros_like(diagonals, dtype=torch.bool))


def lower_ritz_value(diagonal: Tensor, coupling: Tensor, fresh: Tensor) -> Tensor:
    """The smallest eigenvalue theta of T less the norm of A w - theta w for its Ritz vector w, `(*batch,)`.

    An eigenvalue of A is at or above it, within twice that norm; whether it is the smallest one, the Krylov space
    cannot know.

    Args:
        diagonal: T_jj, `(steps, *batch)`; not finite where a system took no step j.
        coupling: From the direction of row j to the next, `(steps, *batch)`.
        fresh: Does row j begin a new Krylov space? bool `(steps, *batch)`.

    Returns:
        In the dtype of `diagonal`; inf for a system without a step.
    """
    given = diagonal.dtype
    dtype = torch.promote_types(given, torch.float32)
    diagonal, coupling = diagonal[:_MOST_ROWS].to(dtype), coupling[:_MOST_ROWS].to(dtype)
    fresh = fresh[:_MOST_ROWS]
    taken = torch.isfinite(diagonal) & torch.isfinite(coupling)
    linked = torch.zeros_like(taken)
    linked[:-1] = taken[1:] & ~fresh[1:]
    # Rows without a step get the largest entry, which is not below the smallest eigenvalue.
    filled = torch.where(taken, diagonal, diagonal.masked_fill(~taken, -torch.inf).amax(0)).nan_to_num(neginf=0.0)
    beside = torch.where(linked, coupling, 0)[:-1].movedim(0, -1)
    matrix = torch.diag_embed(filled.movedim(0, -1)) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    values, vectors = torch.linalg.eigh(matrix)
    left = torch.where(taken & ~linked, coupling, 0).movedim(0, -1)
    estimate: Tensor = values[..., 0] - norm(left * vectors[..., 0])
    return estimate.where(taken.any(0), torch.inf).to(given)
