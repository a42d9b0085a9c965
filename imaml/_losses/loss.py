"""The loss of a chunk of tasks, as a weighted sum of slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import overload

import torch
from torch import Tensor

from imaml._leaves import objects
from imaml._losses.record import Record
from imaml._losses.slice import Slice
from imaml._losses.snapshot import Snapshot
from imaml._losses.source import Source
from imaml._tasks import Batch
from imaml._torch import tree_leaves, tree_map


@dataclass(frozen=True, eq=False)
class Loss:
    """L(phi) of every task of a chunk: the mean over its examples, slice by slice, so that one graph is held at a time.

    One slice has all examples where no size is given. A step of the inner loop may see others: see `at`.
    """

    whole: Slice
    size: int | None = None
    """Examples of a slice; None: all."""
    source: Source | None = None
    """What the steps of the inner loop see; None: all the same."""

    def at(self, step: int) -> Loss:
        """The loss that a step of the training sees."""
        return self if self.source is None else self._of(self.source.at(step))

    def mean(self, batches: Sequence[int] | None) -> Loss:
        """The loss that the steps see in the mean: over all of the source, or over these of its batches.

        Args:
            batches: Steps whose batches stand for the source; None: all examples, once.

        Returns:
            The mean, each batch counting by its number of examples; they are fetched one after another.

        Raises:
            ValueError: The source has no end, and no batches are named.
        """
        if self.source is None:
            return self
        if batches is not None:
            end = self.source.minibatches.length
            return self._mean([partial(self.source.at, step % end if end else step) for step in batches])
        count = self.source.minibatches.length_of_all
        if count is None:
            raise ValueError(
                "The mean over a source of minibatches without an end is not known. Expected a sequence of batches or "
                "Minibatches.of(dataset, ...). Got a function of the step: say how many of its batches stand for it, "
                "with curvature_batches=m."
            )
        return self._mean([partial(self.source.of_all, i) for i in range(count)])

    def _mean(self, fetch: Sequence[Callable[[], Batch]]) -> Loss:
        return MeanLoss(self.whole, self.size, fetch=fetch)

    def _of(self, batch: Batch) -> Loss:
        return Loss(replace(self.whole, batch=batch), self.size)

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
            source = None if self.source is None else self.source.of_tasks(first, tasks)
            yield first, replace(self, whole=self.whole.of_tasks(first, tasks), source=source)

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
        sizes = self._sizes()
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "`microbatch_size` slices every tensor of a task along its first dimension. Expected one number of "
                f"examples. Got {sorted(s[0] if s else 0 for s in sizes)} (0: a scalar)."
            )
        [(examples,)] = sizes
        return int(examples)

    @property
    def weight(self) -> int:
        """Its number of examples, where that is one number: what it counts in a mean."""
        sizes = self._sizes()
        return 1 if len(sizes) != 1 or () in sizes else int(*sizes.pop())

    def _sizes(self) -> set[tuple[int, ...]]:
        return {tuple(t.shape[1:2]) for t in tree_leaves(self.batch)}

    def _slice(self, first: int, size: int) -> Slice:
        batch = tree_map(lambda t: t[:, first : first + size], self.batch)
        return replace(self.whole, batch=batch, part=(*self.whole.part, first))


@dataclass(frozen=True, eq=False)
class MeanLoss(Loss):
    """The mean of the losses on several batches, weighted by their numbers of examples; `whole` is on none of them."""

    fetch: Sequence[Callable[[], Batch]] = ()
    """What gives each of the batches."""

    @cached_property
    def slices(self) -> Sequence[tuple[float, Slice]]:
        """See `Loss`; a batch is fetched when its slices are asked for."""
        return _Fetched([partial(self._alone, i, get) for i, get in enumerate(self.fetch)])

    def _alone(self, i: int, get: Callable[[], Batch]) -> Loss:
        return Loss(replace(self.whole, batch=get(), part=(*self.whole.part, i)), self.size)


class _Fetched(Sequence[tuple[float, Slice]]):
    """The slices of several losses, of which the last is at hand."""

    def __init__(self, losses: Sequence[Callable[[], Loss]]) -> None:
        self._losses = losses
        self._last: tuple[int, Loss] | None = None
        self._parts: list[tuple[int, int, float]] = []
        total = 0
        for i in range(len(losses)):
            loss = self._loss(i)
            self._parts += [(i, j, loss.weight * weight) for j, (weight, _) in enumerate(loss.slices)]
            total += loss.weight
        self._parts = [(i, j, weight / total) for i, j, weight in self._parts]

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, index: int) -> tuple[float, Slice]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[float, Slice]]: ...

    def __getitem__(self, index: int | slice) -> tuple[float, Slice] | Sequence[tuple[float, Slice]]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        i, j, weight = self._parts[index]
        return weight, self._loss(i).slices[j][1]

    def _loss(self, i: int) -> Loss:
        if self._last is None or self._last[0] != i:
            self._last = None  # before the next is there
            self._last = i, self._losses[i]()
        return self._last[1]
