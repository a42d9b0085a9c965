"""What a linear solver takes besides the products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml.planning._account import Account
from imaml_solvers import LinearOperator, LinearSolver

_SIZES = (256, 512, 1024)
_BALLOON, _DECADES = 64, 6


@dataclass(frozen=True, kw_only=True)
class Solve:
    """One system."""

    peak: float
    """Bytes held at once,"""
    at_product: float
    """and of these while a product with A runs."""
    products: int
    """The most that it needs."""
    has_eigenvalue: bool
    """Whether the solution comes with an estimate of the smallest eigenvalue."""


NO_SOLVE = Solve(peak=0.0, at_product=0.0, products=0, has_eigenvalue=False)


def solve(solver: LinearSolver, n: int, like: Tensor, *, starts: bool) -> Solve:
    """Let a solver solve small systems that are badly conditioned, and extrapolate to n entries.

    Args:
        solver: Any.
        n: Entries of its vectors.
        like: Their dtype and device.
        starts: Whether it is given a start.

    Returns:
        Its needs: exact for n up to 1024, and for a solver of a few vectors or a matrix beyond; at most a vector too
        much where it goes through long ones block by block.
    """
    found = [_of_size(solver, min(size, n), like, starts) for size in (_SIZES if n > _SIZES[-1] else _SIZES[-1:])]
    peaks, at_products, products = ([float(one[i]) for one in found] for i in range(3))
    return Solve(
        peak=_at(n, peaks),
        at_product=_at(n, at_products),
        products=round(_at(n, products)),
        has_eigenvalue=found[-1][3],
    )


def _at(n: int, values: list[float]) -> float:
    """The value at n of what was found at `_SIZES`: constant plus linear, or quadratic where it grows faster."""
    if len(values) == 1:
        return values[0]
    first, second = values[1] - values[0], values[2] - values[1]
    if second > 3 * first > 0:
        return values[2] * (n / _SIZES[2]) ** 2
    return values[2] + second * (n - _SIZES[2]) / (_SIZES[2] - _SIZES[1])


def _of_size(solver: LinearSolver, n: int, like: Tensor, starts: bool) -> tuple[int, int, int, bool]:
    """Bytes at most, bytes at a product, products, and whether there is an eigenvalue."""
    matrix = torch.logspace(0, -_DECADES, n, dtype=like.dtype, device=like.device)
    rhs = torch.ones(1, n, dtype=like.dtype, device=like.device)
    start = torch.zeros_like(rhs) if starts else None
    balloon = _BALLOON * rhs.numel() * rhs.element_size()
    products = 0

    def multiply(x: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return x * matrix

    def multiply_with_balloon(x: Tensor) -> Tensor:
        torch.empty(balloon, dtype=torch.uint8, device=x.device)
        return x * matrix

    def run(product: Callable[[Tensor], Tensor]) -> tuple[float, bool]:
        account = Account(rhs.device)
        with account.recording(), account.stage("solve"):
            solution = solver.solve(LinearOperator(product), rhs, x0=start)
        return account.uses["solve"].peak, solution.smallest_eigenvalue is not None

    peak, has_eigenvalue = run(multiply)
    inflated = run(multiply_with_balloon)[0]
    return round(peak), max(0, round(inflated) - balloon), products, has_eigenvalue
