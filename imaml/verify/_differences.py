"""Directional derivatives by extrapolated central differences, with an estimate of their error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SHRINK = 4.0
LEVELS = 9


@dataclass(frozen=True)
class Derivative:
    """f'(0), how far off it may be, and the jump of f' at 0 if that is not zero (a kink), all in the units of f'."""

    value: float
    error: float
    kink: float


def derivative(f: Callable[[float], float], step: float, goal: float) -> Derivative:
    """The derivative of f at 0 by central differences with steps h = step, step / 4, ..., extrapolated to h = 0.

    Ridders 1982: the table of Neville's scheme holds an estimate for every pair of orders and steps, and the best is
    the one that agrees most closely with its neighbours. Stops early once the estimated error is below `goal` times the
    value, so that a smooth function costs two or three levels, and one with kinks goes on until its steps are shorter
    than the way to the nearest.

    A kink at 0 itself leaves central differences consistent and wrong. There the one-sided differences disagree by
    a jump that does not shrink with h, as h f'' does for a smooth function: (4 jump(h / 4) - jump(h)) / 3 is that jump.

    Args:
        f: A function of a real number.
        step: The largest h.
        goal: The relative error to stop at.

    Returns:
        The best estimate. Cost: 2 evaluations a level, at most 9 levels, and f(0).
    """
    centre, h = f(0.0), step
    table: list[list[float]] = []
    jumps: list[float] = []
    best = Derivative(0.0, float("inf"), 0.0)
    for level in range(LEVELS):
        ahead, behind = f(h), f(-h)
        row = [(ahead - behind) / (2 * h)]
        jumps.append((ahead - 2 * centre + behind) / h)
        floor = 1e-16 * (abs(ahead) + abs(behind)) / h
        jump = abs(SHRINK * jumps[-1] - jumps[-2]) / (SHRINK - 1) if level else 0.0
        for order in range(level):
            factor = SHRINK ** (2 * (order + 1))
            row.append((factor * row[order] - table[-1][order]) / (factor - 1))
            error = max(abs(row[-1] - row[-2]), abs(row[-1] - table[-1][order]), floor)
            if error < best.error:
                best = Derivative(row[-1], error, jump)
        table.append(row)
        if best.error <= goal * abs(best.value):
            break
        h /= SHRINK
    return best
