"""A chunk's loss in slices of its examples, for sets that do not fit at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from imaml._leaves import objects
from imaml._losses.chunk import SUPPORT, ChunkLoss
from imaml._losses.context import Context
from imaml._losses.gradient import Gradient
from imaml._tasks import Batch
from imaml._torch import tree_leaves, tree_map


@dataclass(frozen=True)
class Microbatched:
    """What `ChunkLoss` is, for a loss that is a mean over independent examples: slice by slice, one graph at a time."""

    whole: ChunkLoss
    size: int
    """Examples of a slice."""

    @property
    def context(self) -> Context:
        """Of the call."""
        return self.whole.context

    @property
    def batch(self) -> Batch:
        """All of it."""
        return self.whole.batch

    @property
    def tasks(self) -> int:
        """Tasks of the chunk."""
        return self.whole.tasks

    @property
    def parts(self) -> list[tuple[float, ChunkLoss]]:
        """Each slice, with its share of the examples."""
        examples, size = self._examples(), self.size
        return [(min(size, examples - i) / examples, self._slice(i, size)) for i in range(0, examples, size)]

    def split(self, size: int) -> Iterator[tuple[int, Microbatched]]:
        """See `ChunkLoss.split`."""
        for first, part in self.whole.split(size):
            yield first, Microbatched(part, self.size)

    def gradient(
        self, phi: Tensor, step: int, *, fixed: bool = False, metric: bool = False, weights: Tensor | None = None
    ) -> Gradient:
        """See `ChunkLoss.gradient`; the metric too is averaged over the examples."""
        total: Gradient | None = None
        for share, part in self.parts:
            gradient = part.gradient(phi, step, fixed=fixed, metric=metric, weights=weights).mul_(share)
            total = gradient if total is None else total.add_(gradient)
        assert total is not None
        return total

    def value(self, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """See `ChunkLoss.value`."""
        values = [(share, *part.value(phi, step)) for share, part in self.parts]
        losses = torch.stack([share * loss for share, loss, _ in values]).sum(0)
        metrics = [share * metric for share, _, metric in values if metric is not None]
        return losses, torch.stack(metrics).sum(0) if metrics else None

    def check(self, phi: Tensor) -> None:
        """Raise unless the loss of two slices is the mean of their losses; a loss with random draws is not looked at.

        Raises:
            ValueError: It is not.
        """
        if self._examples() <= self.size:
            return
        both = self._slice(0, 2 * self.size)
        at_once = both.value(phi, 0)[0]
        apart = Microbatched(both, self.size).value(phi, 0)[0]
        if self.context.replay.draws:
            return
        dtype = torch.get_autocast_dtype(phi.device.type) if torch.is_autocast_enabled(phi.device.type) else phi.dtype
        if (at_once - apart).abs().max() > torch.finfo(dtype).eps ** 0.5 * at_once.abs().max():
            kind = "support" if self.whole.kind == SUPPORT else "query"
            raise ValueError(
                "`microbatch_size` needs a loss that is a mean over independent examples. Got a "
                f"{kind} loss of {at_once[0].item():.6g} for the first {2 * self.size} examples at once and "
                f"{apart[0].item():.6g} as the mean of slices: look for reduction='sum', BatchNorm with batch "
                "statistics or a loss of pairs of examples."
            )

    def _examples(self) -> int:
        if others := objects(self.whole.batch):
            raise ValueError(
                f"`microbatch_size` slices every tensor of a task. Got a {type(others[0]).__name__}, which is passed "
                "as it is: use microbatch_size=None."
            )
        sizes = {tuple(t.shape[1:2]) for t in tree_leaves(self.whole.batch)}
        if len(sizes) != 1 or () in sizes:
            raise ValueError(
                "`microbatch_size` slices every tensor of a task along its first dimension. Expected one number of "
                f"examples. Got {sorted(s[0] if s else 0 for s in sizes)} (0: a scalar)."
            )
        [(examples,)] = sizes
        return int(examples)

    def _slice(self, first: int, size: int) -> ChunkLoss:
        batch = tree_map(lambda t: t[:, first : first + size], self.whole.batch)
        return replace(self.whole, batch=batch, part=(*self.whole.part, first))
