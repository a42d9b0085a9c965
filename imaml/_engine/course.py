"""How far the computation of a chunk of tasks is: who is told, and where it goes on after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal, Protocol, TypeVar

from imaml._engine.journal import Journal, owned
from imaml.inner._inner_problem import State

Progress = Callable[[int, Literal["forward", "backward"]], object]
"""Is told the number of an inner step when it has been taken, and when the sweep has come back over it."""


class Resumable(Protocol):
    """Something whose state can be written down, and taken up again."""

    def saved(self) -> Any:
        """The state: tensors and plain values in dicts, lists and tuples."""
        ...

    def resume(self, saved: Any) -> None:
        """Be in the state that was saved."""
        ...


R = TypeVar("R", bound=Resumable)


@dataclass
class Course:
    """Where a chunk stands between two moves of its computation, which are numbered from 0.

    A move takes an inner step, fetches a state, or differentiates a step. Without a journal nothing is written down,
    and every computation begins at its first move.
    """

    journal: Journal | None = None
    progress: Progress | None = None
    every: int = 1
    """How many moves there are from one note to the next."""
    parts: dict[str, Resumable] = field(default_factory=dict)
    """What is written down besides the state at hand."""
    move: int = 0
    """The move to begin with."""
    at: int = 0
    """Before which step the state is that is at hand then."""
    positions: list[int] = field(default_factory=list)
    """Positions of the tasks."""
    _state: State | None = None
    _last: int = 0
    _found: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, journal: Journal | None, progress: Progress | None, positions: list[int], steps: int) -> Course:
        """Find how far a chunk has come.

        Args:
            journal: Where that is written down; None: nowhere.
            progress: Who is told of steps.
            positions: Positions of its tasks.
            steps: Inner steps.

        Returns:
            The course. There are about 3 sqrt(steps) notes, of at most two states and what the strategy carries.
        """
        self = cls(journal, progress, every=2 * max(1, isqrt(steps)), positions=positions)
        if journal is None:
            return self
        found, journal.chunk = journal.chunk, None
        if found is None or found["positions"] != positions:
            journal.forget_chunk()
            found = {"parts": {}}
        self._found = found["parts"]
        self.move = self._last = found.get("move", 0)
        self.at = found.get("at", 0)
        state = found.get("state")
        self._state = None if state is None else tuple(state)
        return self

    def part(self, name: str, part: R) -> R:
        """Write something down too from now on, and put it where it was, if it was written down.

        Args:
            name: Its name in the notes.
            part: What it is.

        Returns:
            The same.
        """
        if self.journal is None:
            return part
        self.parts[name] = part
        if name in self._found:
            part.resume(self._found.pop(name))
        return part

    def state(self, begin: Callable[[], State]) -> State:
        """The state at hand at first; `begin` gives that before the first step."""
        state, self._state = self._state, None  # whoever has it holds it alone
        if state is not None:
            return state
        return begin() if self.journal is None or self.at not in self.journal else self.journal[self.at]

    def reach(self, move: int, at: int, state: State | None, *, always: bool = False) -> None:
        """Write down where the computation stands, if it is time.

        Args:
            move: The move that comes next.
            at: Before which step the state at hand is.
            state: The state at hand; None: it is not needed for what comes.
            always: Whether it is time in any case.
        """
        if self.journal is None or move == self._last or not always and move - self._last < self.every:
            return
        is_there = state is None or at == 0 or at in self.journal
        self.journal.note_chunk(
            {
                "positions": self.positions,
                "move": move,
                "at": at,
                "state": None if is_there or state is None else list(owned(state)),
                "parts": {name: part.saved() for name, part in self.parts.items()},
            }
        )
        self._last = move

    def keep(self, step: int, state: State) -> None:
        """Put a state away that is needed again after an interruption alone, such as the last."""
        if self.journal is not None:
            self.journal[step] = state

    def kept(self, step: int) -> State | None:
        """The state that was put away before an interruption; None: there was none."""
        return self.journal[step] if self.journal is not None and step in self.journal else None

    def end(self) -> None:
        """Let go of the parts, which may hold on to what holds the course."""
        self.parts.clear()
