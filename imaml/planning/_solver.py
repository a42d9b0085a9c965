"""What a linear solver takes besides the products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml.planning._account import Account
from imaml_solvers import LinearOperator, LinearSolver

_ENTRIES, _BALLOON, _CONDITION, _MOST_PRODUCTS = 1024, 64, 1e6, 10_000


@dataclass(frozen=True, kw_only=True)
class Solve:
    """One system."""

    vectors: float
    """Held at once, of n entries,"""
    at_product: float
    """and of these while a product with A runs."""
    products: int
    """The most that it needs."""
    has_eigenvalue: bool
    """Whether the solution comes with an estimate of the smallest eigenvalue."""


def solve(solver: LinearSolver, n: int, like: Tensor) -> Solve:
    """Let a solver solve small systems that are badly conditioned, and extrapolate to n.

    Args:
        solver: Any.
        n: Entries of its vectors.
        like: Their dtype and device.

    Returns:
        Its needs, exact for n up to 1024.
    """
    if n <= _ENTRIES:
        return _of_size(solver, n, like)
    half, full = _of_size(solver, _ENTRIES // 2, like), _of_size(solver, _ENTRIES, like)

    def at_n(small: float, large: float) -> float:
        return large + (large - small) * (n - _ENTRIES) / (_ENTRIES // 2)

    return Solve(
        vectors=at_n(half.vectors, full.vectors),
        at_product=at_n(half.at_product, full.at_product),
        products=round(at_n(half.products, full.products)),
        has_eigenvalue=full.has_eigenvalue,
    )


def _of_size(solver: LinearSolver, n: int, like: Tensor) -> Solve:
    matrix = torch.logspace(0, -torch.tensor(_CONDITION).log10().item(), n, dtype=like.dtype, device=like.device)
    rhs = torch.ones(1, n, dtype=like.dtype, device=like.device)
    products = 0

    def multiply(x: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return x * matrix

    def multiply_with_balloon(x: Tensor) -> Tensor:
        torch.empty(_BALLOON, *x.shape, dtype=x.dtype, device=x.device)
        return x * matrix

    vector = rhs.numel() * rhs.element_size()
    plain, found = _peak(solver, multiply, rhs)
    with_balloon, _ = _peak(solver, multiply_with_balloon, rhs)
    return Solve(
        vectors=plain / vector,
        at_product=max(0.0, with_balloon / vector - _BALLOON),
        products=products,
        has_eigenvalue=found,
    )


def _peak(solver: LinearSolver, multiply: Callable[[Tensor], Tensor], rhs: Tensor) -> tuple[float, bool]:
    account = Account(rhs.device)
    with account.recording(), account.stage("solve"):
        solution = solver.solve(LinearOperator(multiply), rhs)
    return account.uses["solve"].peak, solution.smallest_eigenvalue is not None
