"""The part of a symmetric matrix that a few products with random vectors see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._preconditioner import probe
from imaml_solvers._vectors import largest_entry, power_of_two

_ROUNDING = 10.0
"""What rounding makes of a sum, in units of eps."""


@dataclass(frozen=True)
class Sketch:
    """A is about mu I + U diag(values) U'; mu and the values are in multiples of a unit per system."""

    basis: Tensor
    """Orthonormal U, `(*batch, n, rank)`, at least float32."""
    values: Tensor
    """Positive, in descending order, then zeros: `(*batch, rank)`."""
    shift: Tensor
    """mu >= 0, `(*batch,)`."""
    unit: Tensor
    """`(*batch,)`."""

    def combine(self, weights: Tensor, x: Tensor) -> Tensor:
        """U diag(weights) U' x, in the dtype of x."""
        inside = weights * (self.basis.mT @ x.to(self.basis.dtype).unsqueeze(-1)).squeeze(-1)
        return (self.basis @ inside.unsqueeze(-1)).squeeze(-1).to(x.dtype)


def sketch(op: LinearOperator, like: Tensor, rank: int, shift: float | None, seed: int) -> Sketch:
    """The randomised Nystrom approximation of A - mu I (Frangella, Tropp & Udell 2021, algorithm 2.1), and mu.

        A - mu I is about Y (Omega'Y)^+ Y',  Y = (A - mu I) Omega,  Omega random with orthonormal columns

    The paper shifts Omega'Y a little for its Cholesky factorisation. Here its eigenvectors stand in, as A - mu I may be
    indefinite: those whose eigenvalue is negative or rounding are left out. The estimated mu makes the least one zero,
    which would show an eigenvalue of A as large as rounding lets it be.

    Args:
        op: Symmetric A.
        like: A vector `(*batch, n)`.
        rank: Products to take, n at most.
        shift: mu; None is the smallest eigenvalue of Omega'A Omega, an upper bound on that of A, or 0 if negative.
        seed: Seed of Omega, the same for all systems.

    Returns:
        In at least float32. Nothing is seen of a matrix that is not finite.
    """
    omega = torch.linalg.qr(probe(like, seed, min(rank, like.shape[-1]))).Q
    products = [op.mv(column.to(like.dtype).expand_as(like)) for column in omega.unbind(-1)]
    y = torch.stack(products, -1).to(omega.dtype)
    del products
    unit = power_of_two(largest_entry(y.flatten(-2)))
    y = (y / unit[..., None, None]).masked_fill(~torch.isfinite(y).all(-1).all(-1)[..., None, None], 0)
    core = omega.mT @ y
    core = (core + core.mT) / 2
    mu = torch.linalg.eigvalsh(core)[..., 0].clamp(min=0) if shift is None else shift / unit
    y -= mu[..., None, None] * omega
    s, w = torch.linalg.eigh(core - torch.diag_embed(mu.unsqueeze(-1).expand_as(core[..., 0])))
    y = y @ w
    floor = _ROUNDING * torch.finfo(y.dtype).eps * core.abs().amax((-2, -1)).unsqueeze(-1)
    believed = s > floor
    y = y * (believed / s.where(believed, 1).sqrt()).unsqueeze(-2)
    basis, roots, _ = torch.linalg.svd(y, full_matrices=False)
    seen = torch.arange(roots.shape[-1], device=y.device) < believed.sum(-1, keepdim=True)
    return Sketch(basis, roots.square().where(seen, 0), mu, unit)
