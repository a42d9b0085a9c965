"""Blocks that are recomputed otherwise than they were computed: their gradient is not that without recomputation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from imaml.verify._modes import ratio
from imaml.verify._reference import Reference, draws, flat


def recomputed_wrongly(reference: Reference, seed: int, tolerance: float) -> tuple[float, str] | None:
    """The block whose recomputation makes a gradient another one; None where each is a function of what it is given.

    Args:
        reference: The problem; its first task is looked at, at its parameters.
        seed: Seed of the random draws, which are the same with and without recomputation.
        tolerance: The largest relative difference between two gradients of a loss.

    Returns:
        The difference, and a cause. Cost: a gradient of either loss, and two for each block.
    """
    task = reference.tasks[0]
    for kind, batch, outer in (("support", task.support, False), ("query", task.query, True)):

        def gradient(only: frozenset[str] | None, batch: Any = batch, outer: bool = outer) -> tuple[Tensor, set[str]]:
            survey = replace(reference.objective.survey(), only=only)
            with draws(seed):
                loss = partial(reference.loss, batch=batch, step=0, outer=outer, survey=survey)
                found = flat(reference.gradient(loss, reference.values()))
            return found, survey.recomputed

        for name in sorted(gradient(None)[1]):
            (found, _), (plain, _) = gradient(frozenset({name})), gradient(frozenset())
            error = ratio(found - plain, plain)
            if not error <= tolerance:
                return error, (
                    f"{name} is recomputed, and is another function then: with it recomputed the gradient of the "
                    f"{kind} loss differs by {error:.2g} from that without. Look for what changes between its calls: a "
                    "number or an attribute (a counter, the variable of a loop in a lambda), a buffer that it writes "
                    "to, a generator of random numbers of its own"
                )
    return None
