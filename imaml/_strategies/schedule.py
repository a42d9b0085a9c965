"""The moves of a reverse sweep that keeps few states, and what it holds at once: for the sweep and for its costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache

from checkpoint_schedules import Copy, Forward, Move, MultistageCheckpointSchedule, Reverse


class Do(Enum):
    """What to do with the state at hand, which is that before some step."""

    HOLD = auto()
    """Keep it at hand to the end: the steps that are differentiated begin with it."""
    KEEP = auto()
    """Put a copy away."""
    STEP = auto()
    """Take the step."""
    END = auto()
    """Take the last step, hand its result out, and go on with the state before it."""
    FETCH = auto()
    """Take the state that was put away."""
    TAKE = auto()
    """Take the state that was put away, and give its room back."""
    REVERSE = auto()
    """Hand it out: the step is differentiated."""


@lru_cache(maxsize=16)  # the same for every call of an engine, and Python that a short step would feel
def moves(steps: int, checkpoints: int | None) -> Sequence[tuple[Do, int]]:
    """What to do in order, each with the step that it is about.

    The binomial schedule of Griewank & Walther 2000 (Algorithm 799) needs the fewest recomputations. The package
    `checkpoint-schedules` provides it; it is licensed under the LGPL-3.0 and used as an unmodified dependency.

    Args:
        steps: K.
        checkpoints: States kept at most, besides the first, which is never put away; None: all.

    Returns:
        The moves.
    """
    return tuple(_moves(steps, checkpoints))


def _moves(steps: int, checkpoints: int | None) -> Iterator[tuple[Do, int]]:
    if steps == 0:
        return
    is_at_the_end = False
    for action in MultistageCheckpointSchedule(steps, steps if checkpoints is None else checkpoints + 1, 0):
        match action:
            case Forward(n0=first, n1=last, write_ics=keep, write_adj_deps=to_reverse):
                if keep and first > 0:
                    yield Do.KEEP, first
                if not to_reverse:
                    yield from ((Do.STEP, step) for step in range(first, last))
                elif not is_at_the_end:
                    is_at_the_end = True
                    yield Do.END, first
            case Copy(n=step):
                yield Do.FETCH, step
            case Move(n=step):
                yield Do.TAKE, step
            case Reverse(n0=step):
                yield Do.REVERSE, step
                if step == 0:
                    return


@dataclass(frozen=True)
class Sweep:
    """What a sweep over K inner steps takes; states are counted besides the first."""

    steps: int
    """Inner steps taken, recomputed ones among them."""
    forward: int = 0
    """The most stored states when one is taken on the way to the end, and when the last step is differentiated,"""
    again: int | None = None
    """when one is recomputed, with that of the step that was differentiated before (None: none is),"""
    point: int = 0
    """when the next to differentiate is looked at, with that of the step before likewise,"""
    reverse: int = 0
    """and when it is differentiated, after the last."""
    at: Mapping[int, int] = field(default_factory=dict)
    """Stored states when each of the steps has been differentiated, with its own."""


def sweep(steps: int, checkpoints: int | None) -> Sweep:
    """Count along the moves, without taking any.

    Args:
        steps: K.
        checkpoints: As `MAML.checkpoints`.

    Returns:
        The counts.
    """
    kept: set[int] = set()
    at: dict[int, int] = {}
    taken, forward, again, point, reverse, before = 0, 0, None, 0, 0, None

    def held(*at: int) -> int:
        return len(kept.union(at) - {0})

    for what, step in moves(steps, checkpoints):
        match what:
            case Do.KEEP:
                kept.add(step)
            case Do.TAKE:
                kept.discard(step)
            case Do.STEP | Do.END:
                taken += 1
                if before is None:
                    forward = max(forward, held(step))
                else:
                    again = max(again or 0, held(step, before))
            case Do.REVERSE:
                if before is not None:
                    point, reverse = max(point, held(step, before)), max(reverse, held(step))
                at[step] = held(step)
                before = step
    return Sweep(taken, forward, again, point, reverse, at)
