"""What a reverse sweep over inner steps keeps on the way to their end, and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

from torch import Tensor

from imaml._curvature.product import HvpMode
from imaml._engine.problem import Problem
from imaml._objective.attention import MathAttention
from imaml._strategies.drift import Drift
from imaml._strategies.point import Point
from imaml._strategies.schedule import Do, moves
from imaml._strategies.storage import Storage, Store, store
from imaml.inner._inner_problem import State


@dataclass(frozen=True, kw_only=True)
class Tape:
    """Graphs of the last of the steps to differentiate, and states of those before: all of these, or some.

    `MAML` records it and plays it backwards; the costs of `MAML` read off it what that takes.
    """

    first: int
    """The first step that is differentiated."""
    steps: int
    """How many are."""
    graphs: int
    """How many of the last of these have the graph of their gradient kept, which serves the product too."""
    checkpoints: int | None
    """How many states of the others are put away at most, besides the first; None: all."""
    storage: Storage
    """Where they are put."""

    @property
    def by_states(self) -> int:
        """How many steps are evaluated anew, from their states: those before the steps with graphs."""
        return self.steps - self.graphs

    @property
    def most_states(self) -> int:
        """How many states are put away at a time, at most."""
        most = max(self.by_states - 1, 0)
        return most if self.checkpoints is None else min(self.checkpoints, most)

    @contextmanager
    def recorded(
        self, problem: Problem, mode: HvpMode, drift: Drift | None = None
    ) -> Iterator[tuple[Tensor | None, Iterator[Point]]]:
        """Take the whole inner loop, or what is left of it after an interruption.

        Args:
            problem: A chunk.
            mode: How Hessian-vector products are computed.
            drift: Compares states that are taken again; None: they are not compared.

        Yields:
            phi, None where the interruption was after it; and the steps to differentiate, the last first.
        """
        course = problem.course
        left = [what for what, _ in islice(self._moves(), course.move, None)]
        last = self.first + left.count(Do.REVERSE)
        with store(self.storage, problem.snapshot.like.device, self.most_states, course.journal) as kept:
            states = self._states_backwards(problem, kept, drift)
            # Neither phi nor a state has a name here, which would keep it through the sweep.
            points = (Point(problem, next(states), step, mode) for step in reversed(range(self.first, last)))
            if self.by_states and Do.END not in left:
                problem.final = course.kept(problem.inner.steps)
                yield None, points
            else:
                yield self._with_graphs(problem, next(states), mode, points)

    def _with_graphs(
        self, problem: Problem, state: State, mode: HvpMode, earlier: Iterator[Point]
    ) -> tuple[Tensor, Iterator[Point]]:
        """Take the steps with graphs; phi, and these backwards, followed by the earlier ones."""
        points = []
        with MathAttention():  # every graph needs it: switched once, not step by step
            for step in range(self.first + self.by_states, self.first + self.steps):
                point, state = Point.taken(problem, state, step, mode)
                points.append(point)
        if problem.keeps_final:
            problem.course.keep(problem.inner.steps, state)
        return problem.keep(state), chain((points.pop() for _ in range(self.graphs)), earlier)

    def _moves(self) -> Iterator[tuple[Do, int]]:
        """The moves of all steps before the ones with graphs."""
        yield from ((Do.STEP, step) for step in range(self.first))
        if self.first:
            yield Do.HOLD, self.first
        yield from ((what, self.first + step) for what, step in moves(self.by_states, self.checkpoints))

    def _states_backwards(self, problem: Problem, kept: Store, drift: Drift | None) -> Iterator[State]:
        """Yield the state after these steps, then that before each that is differentiated, the last first."""
        course = problem.course
        at, held = course.at, course.kept(self.first)
        state = course.state(problem.begin)

        def first() -> State:  # that before the first of all is gathered when it is asked for, and held by none
            return problem.begin() if held is None else held

        for move, (what, step) in islice(enumerate(self._moves()), course.move, None):
            course.reach(move, at, None if what in (Do.FETCH, Do.TAKE) else state)
            match what:
                case Do.HOLD:
                    held = state
                    course.keep(step, state)
                case Do.KEEP:
                    kept[step] = state
                case Do.STEP:
                    state, at = problem.step(state, step), step + 1
                    if drift is not None:
                        drift.note(at, state)
                case Do.END:
                    yield problem.step(state, step)
                case Do.FETCH | Do.TAKE if step == self.first:
                    state, at = first(), step
                case Do.FETCH:
                    state, at = kept[step], step
                case Do.TAKE:
                    state, at = kept.pop(step), step
                case Do.REVERSE:
                    if drift is not None:
                        drift.compare(step, state)
                    yield state
        if self.by_states == 0:
            yield state
