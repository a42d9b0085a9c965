"""What a product with curvature is, whatever computes it, and how products are added up."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import ClassVar, Literal, Protocol, get_args

from torch import Tensor

from imaml._losses.gradient import Gradient
from imaml._losses.slice import Slice

HvpMode = Literal["auto", "forward-over-reverse", "reverse-over-reverse", "finite-difference"]
"""`auto` is the fastest exact mode in eager torch, or finite differences for a model that has an operation without
second derivatives: reverse-over-reverse, or forward-over-reverse where blocks are recomputed and no graph is kept."""


def check_mode(mode: str) -> None:
    """Raise ValueError for an unknown mode."""
    if mode not in get_args(HvpMode):
        raise ValueError(f"`hvp` must be one of {', '.join(get_args(HvpMode))}. Got {mode!r}.")


LONG = 2**18
"""Entries of a vector that is worth saving."""


class Graph(Enum):
    """What is kept of the graph of a gradient, for the products at the same point."""

    REBUILT = "rebuilt"
    """Nothing: every product builds it anew, and leaves nothing behind."""
    ONCE = "once"
    """The graph, for a single product."""
    KEPT = "kept"
    """The graph, for any number of them."""


class Sum:
    """A flat vector to which a gradient or a product is added, parameter by parameter as they are complete.

    A pass that fails half way may be repeated, by whatever means: what is there is not added again.
    """

    def __init__(self, vector: Tensor, weight: float = 1.0) -> None:
        self.vector, self.weight = vector, weight
        self._done: set[int] = set()

    @property
    def has_begun(self) -> bool:
        """Whether a part of it is there."""
        return bool(self._done)

    def hooks(
        self, part: Slice, take: Callable[[Tensor], Tensor | None]
    ) -> list[Callable[[Tensor | None], Tensor | None]]:
        """What the leaves of a slice, as `leaves` makes them, hand what they get to.

        Args:
            part: The slice.
            take: From what a leaf gets to what is added, or to None for nothing.

        Returns:
            A hook for each, after which zeros that take no memory go on.
        """
        return [partial(self._take, i, view, take) for i, view in enumerate(part.views(self.vector))]

    def _take(
        self, i: int, mine: Tensor, take: Callable[[Tensor], Tensor | None], found: Tensor | None
    ) -> Tensor | None:
        if found is None:  # from a block that does not depend on its input
            return None
        part = take(found)
        if part is not None and i not in self._done:
            self._done.add(i)
            mine.add_(part, alpha=self.weight)
        return nothing_like(found)

    def add(self, vector: Tensor, part: Slice) -> Tensor:
        """Add the rest of a whole that has come at once."""
        if not self._done:
            return self.vector.add_(vector, alpha=self.weight)
        for i, (mine, its) in enumerate(zip(part.views(self.vector), part.views(vector), strict=True)):
            if i not in self._done:
                mine.add_(its, alpha=self.weight)
        return self.vector


def nothing_like(found: Tensor) -> Tensor:
    """Zeros that take no memory, without a graph or a tangent."""
    zero: Tensor = found.detach().new_zeros(())
    return zero.expand(found.shape)


def itself(found: Tensor) -> Tensor:
    """What a leaf gets, as it is."""
    return found


def is_long(part: Slice, vector: Tensor) -> bool:
    """Whether a vector matters beside a graph, and is of one dtype; else hooks cost more time than they save memory."""
    return vector.numel() >= LONG and part.snapshot.layout.is_of_one_dtype


class Product(Protocol):
    """H at one point; `gradient` is that of the losses there, where it comes at no cost."""

    gradient: Gradient | None
    mode: ClassVar[str]
    """How it is computed, as the report says it."""

    def __call__(self, w: Tensor, *, mixed: bool = False, into: Sum | None = None) -> tuple[Tensor, Tensor | None]:
        """H w as a new tensor, or the sum that it was added to; and the mixed product."""
        ...
