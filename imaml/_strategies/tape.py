"""What a reverse sweep over inner steps keeps on the way to their end, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from imaml._curvature.product import HvpMode
from imaml._engine.problem import Problem
from imaml._objective.attention import MathAttention
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
    def recorded(self, problem: Problem, mode: HvpMode) -> Iterator[tuple[Tensor, Iterator[Point]]]:
        """Take the whole inner loop.

        Args:
            problem: A chunk.
            mode: How Hessian-vector products are computed.

        Yields:
            phi, and the steps to differentiate, the last first.
        """
        before, last = _before(problem, self.first), self.first + self.by_states
        with store(self.storage, problem.snapshot.like.device, self.most_states) as kept:
            states = self._states_backwards(problem, before, kept)
            backwards = reversed(range(self.first, last))
            # Neither phi nor a state has a name here, which would keep it through the sweep.
            yield self._with_graphs(
                problem, next(states), mode, (Point.at(problem, next(states), step, mode) for step in backwards)
            )

    def _with_graphs(
        self, problem: Problem, state: State, mode: HvpMode, earlier: Iterator[Point]
    ) -> tuple[Tensor, Iterator[Point]]:
        """Take the steps with graphs; phi, and these backwards, followed by the earlier ones."""
        points = []
        with MathAttention():  # every graph needs it: switched once, not step by step
            for step in range(self.first + self.by_states, self.first + self.steps):
                point, gradient = Point.with_gradient(problem, state, step, mode)
                points.append(point)
                state = problem.update(state, gradient, step)
        return problem.keep(state), chain((points.pop() for _ in range(self.graphs)), earlier)

    def _states_backwards(self, problem: Problem, before: Callable[[], State], kept: Store) -> Iterator[State]:
        """Yield the state after these steps, then that before each, the last first; `before` gives the first."""
        state = before()
        if self.by_states == 0:
            yield state
        for what, step in moves(self.by_states, self.checkpoints):
            match what:
                case Do.KEEP:
                    kept[step] = state
                case Do.STEP:
                    state = problem.step(state, self.first + step)
                case Do.END:
                    yield problem.step(state, self.first + step)
                case Do.FETCH:
                    state = kept[step] if step > 0 else before()
                case Do.TAKE:
                    state = kept.pop(step) if step > 0 else before()
                case Do.REVERSE:
                    yield state


def _before(problem: Problem, step: int) -> Callable[[], State]:
    """The state before an inner step; that before the first is gathered whenever it is asked for, and held by none."""

    def start() -> State:
        return problem.begin()

    if step == 0:
        return start
    state = start()
    for taken in range(step):
        state = problem.step(state, taken)
    return lambda: state
