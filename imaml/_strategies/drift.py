"""How far states that a sweep takes again are from those on the way to the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imaml._engine.course import Resumable
from imaml.inner._inner_problem import State

_BLOCKS = 64
_SEED = 1602


class Drift(Resumable):
    """Compares states by sketches of 64 numbers a vector, at the cost of a pass over each.

    A sketch S x has the sums of x over 64 blocks, with random signs: the expected |S x - S y|^2 is |x - y|^2, to a
    relative standard deviation of about sqrt(2 / 64). Its sums are in float64, in one order, so that equal bits have
    equal sketches.

    Source: Charikar, Chen & Farach-Colton 2002 (CountSketch), with blocks for its buckets.
    """

    def __init__(self) -> None:
        self._noted: dict[int, Tensor] = {}
        self._signs: Tensor | None = None
        self.most: Tensor | None = None
        """The largest relative difference of a vector of a state so far, `(tasks,)`; None: none was compared."""

    def note(self, step: int, state: State) -> None:
        """Note the state before a step, unless it is known."""
        if step not in self._noted:
            self._noted[step] = self._sketch(state)

    def compare(self, step: int, state: State) -> None:
        """Compare the state before a step, which is needed no more, with what was noted, if anything was."""
        before = self._noted.pop(step, None)
        if before is None:
            return
        apart = (self._sketch(state) - before).norm(dim=-1)
        relative = torch.where(apart == 0, apart, apart / before.norm(dim=-1)).amax(0)
        self.most = relative if self.most is None else torch.maximum(self.most, relative)

    def most_of(self, tasks: Tensor) -> Tensor:
        """The largest difference of each of these tasks, `(tasks,)`: 0 where nothing was taken again."""
        return torch.zeros_like(tasks, dtype=torch.float64) if self.most is None else self.most

    def saved(self) -> dict[str, Any]:
        """The sketches that are waiting, and the largest difference."""
        sketches = torch.stack([*self._noted.values()]) if self._noted else None
        return {"steps": [*self._noted], "sketches": sketches, "most": self.most}

    def resume(self, saved: dict[str, Any]) -> None:
        """Be where it was when that was saved."""
        sketches: Sequence[Tensor] = [] if saved["sketches"] is None else [*saved["sketches"]]
        self._noted, self.most = dict(zip(saved["steps"], sketches, strict=True)), saved["most"]

    def _sketch(self, state: State) -> Tensor:
        """`(vectors, tasks, blocks)`."""
        size = -(-state[0].shape[-1] // _BLOCKS)
        if self._signs is None:  # one row for all blocks, so that they take a 64th of a vector
            generator = torch.Generator().manual_seed(_SEED)
            signs = torch.randint(2, (size,), generator=generator, dtype=torch.float64).mul_(2).sub_(1)
            self._signs = signs.to(state[0].device)
        signs = self._signs

        def sums(vector: Tensor) -> Tensor:
            parts = vector.split(size, dim=-1)
            found = [(part.double() * signs[: part.shape[-1]]).sum(-1) for part in parts]
            return torch.stack(found, -1)

        return torch.stack([sums(vector) for vector in state])
