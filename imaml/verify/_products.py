"""Hessian-vector products by extrapolated central differences of the plain gradient, and their order of convergence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml.verify._differences import EPS, LEVELS, SHRINK

START = 1e-2
"""The largest step, relative to the norm of the parameters (or to 1)."""
ORDERS = 4
VISIBLE = 0.1
"""A relative error of differences beyond which a step shows no order of convergence."""


@dataclass(frozen=True)
class Differences:
    """The derivative of a gradient along some directions, `(directions, n)`; norms are of all entries together."""

    products: Tensor
    error: float
    """How far off the products may be."""
    jump: float
    """How far the derivatives ahead and behind differ at zero distance: not zero where the gradient has a kink."""
    gradient: float
    """Norm of the gradient."""
    steps: tuple[float, ...]
    errors: tuple[float, ...]
    """Errors of the plain central differences with these steps, against the products."""

    @property
    def order(self) -> float | None:
        """The p of error = O(h^p), from the last two steps with an error above rounding; None where there are none."""
        most = VISIBLE * self.products.norm().item()
        pairs = [(a, b) for a, b in itertools.pairwise(self.errors) if a < most and 30 * self.error < b]
        return math.log(pairs[-1][0] / pairs[-1][1], SHRINK) if pairs else None


def differences(
    gradient: Callable[[Tensor], Tensor], phi: Tensor, directions: Tensor, goal: float, eps: float = EPS
) -> Differences:
    """(g(phi + h u) - g(phi - h u)) / 2h for every direction u and h = h0, h0 / 4, ..., extrapolated to h = 0.

    The scheme is that of `_differences.derivative`, for vectors. It stops when the estimated error is below `goal`
    times the size of the products.

    Args:
        gradient: First derivatives `(m,)` at a vector `(n,)`.
        phi: Where, `(n,)`.
        directions: Unit vectors `(directions, n)`.
        goal: The relative error to stop at.
        eps: The relative rounding error of the gradient, at least.

    Returns:
        The products `(directions, m)`. Cost: 2 gradients per level and direction, at most 9 levels, and 1; memory: 6
        vectors per direction, and one per level.
    """
    centre, h = gradient(phi), START * max(phi.norm().item(), 1.0)
    steps: list[float] = []
    rows: list[Tensor] = []
    previous: list[Tensor] = []
    products, least, jump = torch.zeros(len(directions), len(centre)).to(centre), math.inf, 0.0
    bends: list[Tensor] = []
    for _ in range(LEVELS):
        ahead, behind = (torch.stack([gradient(phi + sign * h * u) for u in directions]) for sign in (1, -1))
        row = [(ahead - behind) / (2 * h)]
        bends = [*bends[-1:], (ahead + behind - 2 * centre) / h]
        floor = max(EPS, eps) * (ahead.norm() + behind.norm()).item() / h
        for order in range(min(len(previous), ORDERS)):
            factor = SHRINK ** (2 * (order + 1))
            row.append((factor * row[order] - previous[order]) / (factor - 1))
            near = max((row[-1] - row[-2]).norm().item(), (row[-1] - previous[order]).norm().item(), floor)
            if near < least:
                products, least = row[-1], near
                jump = ((SHRINK * bends[1] - bends[0]).norm() / (SHRINK - 1)).item()
        steps.append(h)
        rows.append(row[0])
        previous = row
        if least <= goal * products.norm().item():
            break
        h /= SHRINK
    errors = tuple((d - products).norm().item() for d in rows)
    return Differences(products, least, jump, centre.norm().item(), tuple(steps), errors)
