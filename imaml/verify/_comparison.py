"""A gradient against directional finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from imaml.verify._argmin import NoMinimum
from imaml.verify._differences import EPS, derivative
from imaml.verify._reference import Values, flat, unflat
from imaml.verify._verification import RESOLVING

DIRECTIONS, ATTEMPTS = 4, 10
REOPEN = 16.0
"""A direction starts with a step this many times the best one of the direction before."""
ZERO = "finite differences see no derivative: it is zero to rounding, or the loss is not smooth at these parameters"
UNSETTLED = (
    "finite differences do not settle: the loss is not smooth near these parameters (kinks of ReLU or max pooling), or "
    "too noisy"
)


def compare(
    functions: Callable[[Values], Callable[[float], float]],
    got: Tensor,
    like: Values,
    tolerance: float,
    seed: int,
    eps: float = EPS,
) -> tuple[float, float, str | None]:
    """The relative error of `got` and the resolution of finite differences, over random directions.

    Directions on which finite differences resolve too little (kinks near theta) are replaced by others; `eps` is the
    relative rounding error of the functions, at least.

    Returns:
        Relative error, resolution, and the reason where the latter is too large for a verdict.
    """
    generator = torch.Generator().manual_seed(seed)
    largest = step = 1e-2 * max(flat(like).norm().item(), 1.0)
    found: list[tuple[float, float, float]] = []
    reason: str | None = None
    for _ in range(ATTEMPTS):
        d = torch.randn(len(got), generator=generator, dtype=torch.float64).to(got.device)
        d /= d.norm()
        try:
            slope = derivative(functions(unflat(d, like)), step, tolerance / 100, eps)
        except NoMinimum as unsolved:
            reason = str(unsolved)
            continue
        step = min(largest, REOPEN * slope.step)
        found.append((slope.value, slope.error, abs(torch.dot(got, d).item() - slope.value)))
        if sum(error <= max(tolerance, RESOLVING / 3) * abs(value) for value, error, _ in found) == DIRECTIONS:
            break
    best = sorted(found, key=lambda direction: direction[1] / max(abs(direction[0]), 1e-300))[:DIRECTIONS]
    if not best:
        return math.nan, math.inf, reason
    value, error, difference = (math.sqrt(sum(d[i] ** 2 for d in best) / len(best)) for i in range(3))
    size = value if value > 2 * error else got.norm().item() / math.sqrt(len(got))
    if max(size, error, difference) == 0 or size <= 2 * error and difference <= 2 * error:
        return math.nan, math.inf, ZERO
    relative, resolution = difference / max(size, 1e-300), error / max(size, 1e-300)
    if resolution > max(tolerance, RESOLVING) and reason is None:
        reason = UNSETTLED
    return relative, resolution, reason
