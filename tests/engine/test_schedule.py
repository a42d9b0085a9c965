"""The binomial schedule: no other takes fewer steps again, and of those that take as few, none writes fewer states."""

from functools import cache
from math import comb

import pytest

from imaml._strategies.schedule import Do, moves, sweep

PAIRS = [(steps, checkpoints) for steps in range(1, 41) for checkpoints in range(steps)]


def replayed(steps, checkpoints):
    """Follow the moves as the sweep does: steps taken, states written, and the most of these held at a time."""
    at, kept, handed, taken, written, most = 0, set(), [], 0, 0, 0
    for what, step in moves(steps, checkpoints):
        match what:
            case Do.KEEP:
                assert step == at > 0 and step not in kept
                kept.add(step)
                written, most = written + 1, max(most, len(kept))
            case Do.STEP:
                assert step == at
                at, taken = step + 1, taken + 1
            case Do.END:
                assert step == at == steps - 1 and not handed
                taken += 1
            case Do.FETCH | Do.TAKE:
                assert step == 0 or step in kept
                at = step
                kept -= {step} if what is Do.TAKE else set()
            case Do.REVERSE:
                assert step == at
                handed.append(step)
    assert handed == [*reversed(range(steps))] and not kept
    return taken, written, most


@cache
def fewest(steps, states):
    """Steps taken on the way back and states written, at best, from a kept state on: every next one to keep is tried.

    `states` counts that at the start; the end of the steps was reached before, and is not looked for again.
    """
    if steps == 1:
        return 0, 0
    ways = [(steps - 1 + fewest(steps - 1, states)[0], fewest(steps - 1, states)[1])]
    if states > 1:
        for far in range(1, steps - 1):  # a state that is differentiated at once is not written
            beyond, here = fewest(steps - far, states - 1), fewest(far, states)
            ways.append((far + beyond[0] + here[0], 1 + beyond[1] + here[1]))
    return min(ways)


def test_steps_and_writes_are_the_fewest_of_all_schedules():
    for steps, checkpoints in PAIRS:
        taken, written, most = replayed(steps, checkpoints)
        assert (taken - 1, written) == fewest(steps, checkpoints + 1), (steps, checkpoints)
        assert most <= checkpoints and sweep(steps, checkpoints).steps == taken


@pytest.mark.parametrize("steps", [1, 2, 41, 100, 700])
@pytest.mark.parametrize("checkpoints", [0, 1, 2, 7, 50])
def test_the_steps_are_those_of_the_closed_form(steps, checkpoints):
    """Griewank & Walther 2000: r l - β(s + 1, r - 1), for the least r with β(s, r) = C(s + r, s) >= l."""
    states, times = checkpoints + 1, 0
    while comb(states + times, states) < steps:
        times += 1
    again = times * steps - (comb(states + times, states + 1) if times else 0)
    assert sweep(steps, checkpoints).steps == again + 1


def test_with_room_for_all_no_step_is_taken_again():
    for checkpoints in (None, 998, 5000):
        assert replayed(1000, checkpoints) == (1000, 998, 998)


def test_without_a_step_there_is_no_move():
    assert moves(0, None) == moves(0, 3) == ()
