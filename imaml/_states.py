"""The states of the inner loop in reverse order, from stored checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from checkpoint_schedules import Copy, Forward, Move, MultistageCheckpointSchedule, Reverse
from torch import Tensor

from imaml._problem import Problem


def states_backwards(problem: Problem, checkpoints: int | None) -> Iterator[Tensor]:
    """Yield phi_K, then phi_{K-1} down to phi_0 = theta, each `(tasks, n)`.

    At most `checkpoints` states are kept besides theta (None: all), and the steps between them are recomputed on the
    binomial schedule of Griewank & Walther 2000 (Algorithm 799), which needs the fewest recomputations.
    """
    steps = problem.inner.steps
    phi = problem.theta
    if steps == 0:
        yield phi
        return
    slots = steps if checkpoints is None else min(checkpoints + 1, steps)  # phi_0 = theta fills one and costs nothing
    kept: dict[int, Tensor] = {}
    reversing = False
    for action in MultistageCheckpointSchedule(steps, slots, 0):
        match action:
            case Forward(n0=first, n1=last, write_ics=keep, write_adj_deps=to_reverse):
                if keep:
                    kept[first] = phi
                if not to_reverse:
                    for step in range(first, last):
                        phi = problem.step(phi, step)
                elif not reversing:
                    reversing = True
                    yield problem.step(phi, first)
            case Copy(n=step):
                phi = kept[step]
            case Move(n=step):
                phi = kept.pop(step)
            case Reverse():
                yield phi
                if action.n0 == 0:
                    return
