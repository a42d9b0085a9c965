"""What a reverse sweep from checkpoints takes, without taking it."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint_schedules import Copy, Forward, Move, MultistageCheckpointSchedule, Reverse

from imaml._strategies.states import most_states


@dataclass(frozen=True)
class Sweep:
    """Of K inner steps; states are counted besides the first."""

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


def sweep(steps: int, checkpoints: int | None) -> Sweep:
    """Follow the schedule of `states_backwards`.

    Args:
        steps: K.
        checkpoints: As `MAML.checkpoints`.

    Returns:
        Counts.
    """
    if steps == 0:
        return Sweep(0)
    kept: set[int] = set()
    taken, forward, again, point, reverse, reversing, before = 0, 0, None, 0, 0, False, 0

    def held(*at: int) -> int:
        return len(kept.union(at) - {0})

    for action in MultistageCheckpointSchedule(steps, most_states(steps, checkpoints) + 1, 0):
        match action:
            case Forward(n0=first, n1=last, write_ics=keep, write_adj_deps=to_reverse):
                if keep and first > 0:
                    kept.add(first)
                if to_reverse and reversing:
                    continue
                for step in range(first, last):
                    taken += 1
                    if reversing:
                        again = max(again or 0, held(step, before))
                    else:
                        forward = max(forward, held(step))
                reversing = reversing or to_reverse
            case Copy() | Move(n=0):
                pass
            case Move(n=step):
                kept.remove(step)
            case Reverse(n0=step):
                if step < steps - 1:
                    point, reverse = max(point, held(step, before)), max(reverse, held(step))
                before = step
                if step == 0:
                    break
    return Sweep(taken, forward, again, point, reverse)
