"""What the chunks of a call have given so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from imaml._engine.report import Outcome

Part = tuple[list[int], tuple[list[Tensor], Outcome]]
"""The positions of tasks, their summed gradients, and their outcome."""


@dataclass
class Totals:
    """Sums of gradients, and the outcome of every task."""

    chunks: int = 0
    """How many chunks are done."""
    positions: list[int] = field(default_factory=list)
    """Positions of the tasks in the order of the outcomes."""
    skipped: list[int] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)
    """The gradients for theta and for any shared parameters, over these tasks."""

    def add(self, where: Sequence[int], parts: Sequence[Part]) -> None:
        """Add a chunk.

        Args:
            where: The positions of its tasks.
            parts: What these gave, all at once or some at a time; those that are missing were skipped.
        """
        for kept, (summed, outcome) in parts:
            self.sums = [a.add_(b) for a, b in zip(self.sums, summed, strict=True)] if self.sums else summed
            self.outcomes.append(outcome)
            self.positions += kept
        self.skipped += set(where).difference(*(kept for kept, _ in parts))
        self.chunks += 1

    def saved(self) -> dict[str, Any]:
        """All of it."""
        outcomes = [{f.name: getattr(outcome, f.name) for f in fields(Outcome)} for outcome in self.outcomes]
        return vars(self) | {"outcomes": outcomes}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on adding to what was saved."""
        for name, value in saved.items():
            setattr(self, name, value)
        self.outcomes = [Outcome(**entries) for entries in saved["outcomes"]]
