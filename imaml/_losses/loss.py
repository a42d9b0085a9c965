"""The loss of a chunk of tasks, as a weighted sum of slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from imaml._leaves import objects
from imaml._losses.record import Record
from imaml._losses.slice import Slice
from imaml._losses.snapshot import Snapshot
from imaml._tasks import Batch
from imaml._torch import tree_leaves, tree_map


@dataclass(frozen=True, eq=False)
class Loss:
    """L(phi) of every task of a chunk: the mean over its examples, slice by slice, so that one graph is held at a time.

    One slice has all examples where no size is given.
    """

    whole: Slice
    size: int | None = None
    """Examples of a slice; None: all."""

    @property
    def snapshot(self) -> Snapshot:
        """What the call was given."""
        return self.whole.snapshot

    @property
    def record(self) -> Record:
        """What the call has done so far."""
        return self.whole.record

    @property
    def batch(self) -> Batch:
        """The batch as a whole."""
        return self.whole.batch

    @property
    def tasks(self) -> int:
        """Tasks of the chunk."""
        return self.whole.tasks

    @cached_property
    def slices(self) -> Sequence[tuple[float, Slice]]:
        """Views of the batch, with the weight of each."""
        if self.size is None or (examples := self._examples()) <= self.size:
            return [(1.0, self.whole)]
        return [
            (min(self.size, examples - first) / examples, self._slice(first, self.size))
            for first in range(0, examples, self.size)
        ]

    def split(self, tasks: int) -> Iterator[tuple[int, Loss]]:
        """Split into groups of at most so many tasks, each with the position of its first within this chunk."""
        if tasks >= self.tasks:
            yield 0, self
            return
        for first in range(0, self.tasks, tasks):
            yield first, replace(self, whole=self.whole.of_tasks(first, tasks))

    def check(self, value: Callable[[Loss], Tensor]) -> None:
        """Raise unless the loss of two slices is the mean of their losses; a loss with random draws is not looked at.

        Args:
            value: From a loss to its values `(tasks,)` at one point.

        Raises:
            ValueError: It is not.
        """
        if self.size is None or self._examples() <= self.size:
            return
        both = self._slice(0, 2 * self.size)
        at_once, apart = value(Loss(both)), value(Loss(both, self.size))
        if self.snapshot.replay.draws:
            return
        device = at_once.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.snapshot.layout.dtype
        if (at_once - apart).abs().max() > torch.finfo(dtype).eps ** 0.5 * at_once.abs().max():
            raise ValueError(
                "`microbatch_size` needs a loss that is a mean over independent examples. Got a "
                f"{self.whole.role} loss of {at_once[0].item():.6g} for the first {2 * self.size} examples at once and "
                f"{apart[0].item():.6g} as the mean of slices: look for reduction='sum', BatchNorm with batch "
                "statistics or a loss of pairs of examples."
            )

    def _examples(self) -> int:
        if others := objects(self.batch):
            raise ValueError(
                f"`microbatch_size` slices every tensor of a task. Got a {type(others[0]).__name__}, which is passed "
                "as it is: use microbatch_size=None."
            )
        sizes = {tuple(t.shape[1:2]) for t in tree_leaves(self.batch)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "`microbatch_size` slices every tensor of a task along its first dimension. Expected one number of "
                f"examples. Got {sorted(s[0] if s else 0 for s in sizes)} (0: a scalar)."
            )
        [(examples,)] = sizes
        return int(examples)

    def _slice(self, first: int, size: int) -> Slice:
        batch = tree_map(lambda t: t[:, first : first + size], self.batch)
        return replace(self.whole, batch=batch, part=(*self.whole.part, first))
