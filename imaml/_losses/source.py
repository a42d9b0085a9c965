"""The support sets of a chunk of tasks, where every inner step sees others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from zlib import crc32

from torch import Tensor

from imaml._leaves import checksum
from imaml._losses.slice import outside_inference
from imaml._minibatches import Batch, Minibatches
from imaml._objective.meta import MetaParameters
from imaml._tasks import TaskBatch
from imaml._torch import tree_leaves


@dataclass(eq=False)
class Source:
    """Fetches a batch when a step needs it, and checks that a step that comes back sees the one that it saw before."""

    tasks: TaskBatch
    """Whose support sets are minibatches."""
    _seen: dict[tuple[str, int], int] = field(default_factory=dict)
    _last: tuple[int, Batch] | None = None

    @property
    def minibatches(self) -> Minibatches:
        """Where the batches come from."""
        found = self.tasks.support
        assert isinstance(found, Minibatches)
        return found

    def check(self, first: int, steps: int, meta: MetaParameters) -> None:
        """Raise unless it does for a call.

        Args:
            first: The number of the first inner step.
            steps: How many there are.
            meta: What is learned, a weight per example perhaps.

        Raises:
            ValueError: It is too short, or has no indices for a weight per example.
        """
        source, last = self.minibatches, first + steps
        if source.length is not None and source.length < last:
            raise ValueError(
                f"The source of minibatches ends before the last inner step. Expected {last} batches, for steps "
                f"{first} to {last - 1}. Got {source.length}: pass more, or a function of the step that begins again, "
                "such as lambda step: batches[step % len(batches)]."
            )
        if source.says_indices is not None or source.examples is None:
            return
        for name, tensor in meta.flat().items():
            if tensor.ndim and len(tensor) == source.examples and len(tensor) > 1:
                raise ValueError(
                    f"The meta-parameter {name!r} has {len(tensor)} entries, as many as the data set has examples, of "
                    "which each step sees a batch. Expected the indices of the examples in every batch. Got none: pass "
                    "indices=True to Minibatches.of, and use them in the loss, or indices=False where batches carry "
                    "them already, or it is no weight per example."
                )

    def at(self, step: int) -> Batch:
        """What the tasks see in a step of the training, `(tasks, ...)`; the last one is kept at hand.

        Args:
            step: Its number.

        Returns:
            The batch.

        Raises:
            ValueError: There is none, or another than before.
        """
        if self._last is None or self._last[0] != step:
            self._last = None  # before the next is there
            self._last = step, self._same(("inner step", step), self.minibatches.at)
        return self._last[1]

    def of_all(self, i: int) -> Batch:
        """The i-th of the batches that hold every example once, likewise."""
        return self._same(("batch", i), self.minibatches.of_all)

    def _same(self, key: tuple[str, int], fetch: Callable[[int], Batch]) -> Batch:
        batch = TaskBatch(support=fetch(key[1]), query=self.tasks.query).support
        sums = [checksum(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        one = crc32(repr(sums).encode())  # a number a step, whatever a batch holds
        if self._seen.setdefault(key, one) != one:
            raise ValueError(
                f"The source of minibatches gave another batch for {key[0]} {key[1]} when it was asked again, as the "
                "reverse sweep and the solver have to. Expected a function of the step. Got other numbers or shapes: "
                "draw from a generator that is seeded by the step, or keep the batches in a list."
            )
        return outside_inference(batch)

    def saved(self) -> dict[str, dict[int, int]]:
        """What the steps have seen."""
        found: dict[str, dict[int, int]] = {}
        for (kind, number), one in self._seen.items():
            found.setdefault(kind, {})[number] = one
        return found

    def resume(self, saved: dict[str, dict[int, int]]) -> None:
        """Expect that steps see what they saw then."""
        self._seen |= {(kind, number): one for kind, those in saved.items() for number, one in those.items()}

    def of_tasks(self, first: int, tasks: int) -> Source:
        """A source for some of the tasks."""
        return Source(self.tasks[first : first + tasks])
