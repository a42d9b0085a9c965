"""The states of the inner loop in reverse order, from stored checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from checkpoint_schedules import Copy, Forward, Move, MultistageCheckpointSchedule, Reverse

from imaml._engine.problem import Problem
from imaml._strategies.storage import Store
from imaml.inner._inner_problem import State


def most_states(steps: int, checkpoints: int | None) -> int:
    """How many states are kept at a time for a reverse sweep over `steps` steps, besides the first."""
    most = max(steps - 1, 0)
    return most if checkpoints is None else min(checkpoints, most)


def states_backwards(
    problem: Problem, before: Callable[[], State], first_step: int, checkpoints: int | None, kept: Store
) -> Iterator[State]:
    """Yield the state after the last inner step, then those before each step, the last first, down to a given one.

    At most `checkpoints` states are kept, the given one aside (None: all), and the steps between them are recomputed
    on the binomial schedule of Griewank & Walther 2000 (Algorithm 799), which needs the fewest recomputations.

    Args:
        problem: A chunk.
        before: Gives the state before step `first_step`.
        first_step: Steps already taken.
        checkpoints: How many to keep.
        kept: Where.

    Yields:
        The states.
    """
    steps, state, reversing = problem.inner.steps - first_step, before(), False
    if steps == 0:
        yield state
        return
    for action in MultistageCheckpointSchedule(steps, most_states(steps, checkpoints) + 1, 0):
        match action:
            case Forward(n0=first, n1=last, write_ics=keep, write_adj_deps=to_reverse):
                if keep and first > 0:
                    kept[first] = state
                if not to_reverse:
                    for step in range(first, last):
                        state = problem.step(state, first_step + step)
                elif not reversing:
                    reversing = True
                    yield problem.step(state, first_step + first)
            case Copy(n=step):
                state = kept[step] if step > 0 else before()
            case Move(n=step):
                state = kept.pop(step) if step > 0 else before()
            case Reverse():
                yield state
                if action.n0 == 0:
                    return
