"""The states of the inner loop in reverse order, from stored checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

from checkpoint_schedules import Copy, Forward, Move, MultistageCheckpointSchedule, Reverse

from imaml._problem import Problem
from imaml.inner._base import State


def states_backwards(problem: Problem, state: State, first_step: int, checkpoints: int | None) -> Iterator[State]:
    """Yield the state after the last inner step, then those before each step, the last first, down to a given one.

    At most `checkpoints` states are kept besides the given one (None: all), and the steps between them are recomputed
    on the binomial schedule of Griewank & Walther 2000 (Algorithm 799), which needs the fewest recomputations.

    Args:
        problem: A chunk.
        state: That before step `first_step`.
        first_step: Steps already taken.
        checkpoints: How many to keep.

    Yields:
        The states.
    """
    steps = problem.inner.steps - first_step
    if steps == 0:
        yield state
        return
    slots = steps if checkpoints is None else min(checkpoints + 1, steps)  # the first state fills one, and is there
    kept: dict[int, State] = {}
    reversing = False
    for action in MultistageCheckpointSchedule(steps, slots, 0):
        match action:
            case Forward(n0=first, n1=last, write_ics=keep, write_adj_deps=to_reverse):
                if keep:
                    kept[first] = state
                if not to_reverse:
                    for step in range(first, last):
                        state = problem.step(state, first_step + step)
                elif not reversing:
                    reversing = True
                    yield problem.step(state, first_step + first)
            case Copy(n=step):
                state = kept[step]
            case Move(n=step):
                state = kept.pop(step)
            case Reverse():
                yield state
                if action.n0 == 0:
                    return
