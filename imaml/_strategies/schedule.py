"""The moves of a reverse sweep that keeps few states, and what it holds at once: for the sweep and for its costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import lru_cache
from math import comb


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

    This is the binomial schedule of Griewank & Walther 2000 (Algorithm 799, revolve): no other with as many states
    takes fewer steps again, and none of those that take as few puts states away less often.

    Args:
        steps: K.
        checkpoints: States kept at most, besides the first, which is never put away; None: all.

    Returns:
        The moves.
    """
    return tuple(_moves(steps, checkpoints))


def _moves(steps: int, checkpoints: int | None) -> Iterator[tuple[Do, int]]:
    most = steps if checkpoints is None else checkpoints
    at, kept = 0, [0]  # the state at hand, and those to come back to
    for last in reversed(range(steps)):
        while at < last:
            free = most + 1 - len(kept)
            stop = at + _distance(last + 1 - at, free + 1) if free else last
            yield from ((Do.STEP, step) for step in range(at, stop))
            at = stop
            if at < last:
                kept.append(at)
                yield Do.KEEP, at
        if last == steps - 1:
            yield Do.END, last
        yield Do.REVERSE, last
        if last > 0:
            at = kept[-1]
            if at == last - 1:
                yield Do.TAKE, kept.pop()
            else:
                yield Do.FETCH, at


def _distance(steps: int, states: int) -> int:
    """How far to go from a state that is kept to the next to keep.

    With s states, that at the start among them, and no step taken more than r times before it is differentiated,
    β(s, r) = (s + r)! / (s! r!) steps can be reversed. Take the least such r. The m steps up to the next state have s
    states and r - 1 times left, the l - m from there on s - 1 states and r times. No m takes fewer steps than one with
    β(s, r - 2) <= m <= β(s, r - 1) and β(s - 1, r - 1) <= l - m <= β(s - 1, r). Of these, some write the fewest states;
    of those, this is the largest, so that the fewest are held when the sweep goes back.

    Args:
        steps: l, those to reverse, at least 2.
        states: s, at least 2.

    Returns:
        m, from 1 to l - 1.
    """
    times = 1
    while comb(states + times, states) < steps:
        times += 1
    here, beyond, further = (comb(s + times - 1, s) for s in (states, states - 1, states - 2))  # β(s, r - 1) and so on
    return max(min(steps - beyond, here - further), min(steps - beyond - further, here), 1)


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
