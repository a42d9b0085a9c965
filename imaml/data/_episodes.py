"""Episodes: where batches of tasks come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from imaml._tasks import TaskBatch

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


def check_count(name: str, value: int, *, least: int) -> None:
    """Raise where `value` is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"`{name}` must be an integer. Got {value!r} ({type(value).__name__}).")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least}. Got {value}.")


def check_split(split: str) -> None:
    """Raise where `split` is not the name of a split."""
    if split not in SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(map(repr, SPLITS))}. Got {split!r}.")


def chosen_rows(tasks: int, rows: slice | range | None) -> Sequence[int]:
    """The positions, in a batch of `tasks`, that `rows` selects."""
    if rows is None:
        return range(tasks)
    if isinstance(rows, slice):
        return range(tasks)[rows]
    if any(not 0 <= row < tasks for row in (*rows[:1], *rows[-1:])):
        raise ValueError(f"`rows` must lie in a batch of {tasks} tasks. Got {rows}.")
    return rows


@dataclass(frozen=True, kw_only=True)
class Episodes(ABC):
    """Draws batches of tasks from three disjoint splits, by counters instead of by a running state.

    Task j of batch `index` is drawn from its own generator, seeded by (seed, split, index, j). So a run resumes at any
    batch, ranks draw their rows of one batch, a smaller batch is the head of a larger one, and the global random state
    plays no part.

    Args:
        shots: Support examples of a task (of each class, in classification).
        queries: Query examples of a task (of each class).
        seed: Names the stream of tasks; it does not move the border between the splits.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A count is below 1 or the seed is negative.
    """

    shots: int = 1
    queries: int = 15
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("shots", self.shots, least=1)
        check_count("queries", self.queries, least=1)
        check_count("seed", self.seed, least=0)

    def batch(self, split: Split, index: int, tasks: int, rows: slice | range | None = None) -> TaskBatch:
        """Draw batch `index` of `split`.

        Args:
            split: "train", "val" or "test".
            index: Which batch, from 0; the same index is the same batch, on every machine and in every order.
            tasks: Tasks in the whole batch.
            rows: The rows of the batch to draw, all of them by default. Rank r of n draws
                `range(r, tasks, n)`, or any slice, and gets just those rows of the whole batch.

        Returns:
            A batch of `len(rows)` tasks on the CPU: float32 inputs, and float32 or int64 targets.

        Raises:
            TypeError: `index` or `tasks` is not an integer.
            ValueError: `split` is unknown, `index` is negative, `tasks` is below 1, or `rows` selects no row
                or one outside the batch.
        """
        check_split(split)
        check_count("index", index, least=0)
        check_count("tasks", tasks, least=1)
        chosen = chosen_rows(tasks, rows)
        if not chosen:
            raise ValueError(f"`rows` must select at least one of {tasks} tasks. Got {rows}.")
        stream = (SPLITS.index(split), int(index))
        seeds = (np.random.SeedSequence(self.seed, spawn_key=(*stream, row)) for row in chosen)
        return self._draw(split, [np.random.Generator(np.random.PCG64(seed)) for seed in seeds])

    @abstractmethod
    def _draw(self, split: Split, generators: Sequence[np.random.Generator]) -> TaskBatch:
        """Draw one task from each generator."""
