"""Directional derivatives by extrapolated central differences, with an estimate of their error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

SHRINK = 4.0
LEVELS = 12
EPS = 1e-16
KINK = 10
"""Rounding, and the terms that the extrapolation leaves, look like a jump of some goals."""


@dataclass(frozen=True)
class Derivative:
    """f'(0), how far off it may be (a jump of f' at 0 included), and the step h that it comes from."""

    value: float
    error: float
    step: float


def derivative(f: Callable[[float], float], step: float, goal: float, eps: float = EPS) -> Derivative:
    """The derivative of f at 0 by central differences with steps h = step, step / 4, ..., extrapolated to h = 0.

    Ridders 1982: the table of Neville's scheme holds an estimate for every pair of orders and steps, and the best is
    the one that agrees most closely with its neighbours. Stops early once the estimated error is below `goal` times the
    value, so that a smooth function costs two or three levels, and one with kinks goes on until its steps are shorter
    than the way to the nearest.

    A kink at 0 itself leaves central differences consistent and wrong. There the one-sided differences disagree by
    a jump that does not shrink with h, as h f'' does for a smooth function: (4 jump(h / 4) - jump(h)) / 3 is that jump,
    and counts as error where it is more than 10 times the goal.

    Args:
        f: A function of a real number.
        step: The largest h.
        goal: The relative error to stop at.
        eps: The relative rounding error of f, at least.

    Returns:
        The best estimate. Cost: 2 evaluations a level, at most 12 levels, and f(0).
    """
    centre, h = f(0.0), step
    table: list[list[float]] = []
    jumps: list[float] = []
    best = Derivative(0.0, math.inf, step)
    for level in range(LEVELS):
        ahead, behind = f(h), f(-h)
        row = [(ahead - behind) / (2 * h)]
        jumps.append((ahead - 2 * centre + behind) / h)
        floor = max(EPS, eps) * (abs(ahead) + abs(behind)) / h
        jump = abs(SHRINK * jumps[-1] - jumps[-2]) / (SHRINK - 1) if level else 0.0
        for order in range(level):
            factor = SHRINK ** (2 * (order + 1))
            row.append((factor * row[order] - table[-1][order]) / (factor - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - table[-1][order]), floor)
            error = max(error, jump if jump > KINK * goal * abs(row[-1]) else 0.0)
            if error < best.error:
                best = Derivative(row[-1], error, h)
        table.append(row)
        if best.error <= goal * abs(best.value):
            break
        h /= SHRINK
    return best
