"""What one call has done and found out so far."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from imaml._objective.meta import MetaParameters


@dataclass
class Record:
    """Counts of a call for its report, and what its evaluations have shown about the model."""

    gradients: int = 0
    """Evaluations so far, summed over tasks: one on a chunk of 8 tasks counts 8."""
    products: int = 0
    """Products with curvature, summed over tasks likewise."""
    mode: str | None = None
    """How these were computed; None before the first."""
    gauss_newton: bool = False
    """Whether they were those of the Gauss-Newton matrix."""
    difference_error: float | None = None
    """Estimated relative error of those by finite differences; None before the first."""
    difference_move: float | None = None
    """How far those move phi, in its norms; None before the first."""
    curvature_batches: int | None = None
    """How many minibatches stand for a whole source in products after the inner loop; None: all, or there are none."""
    needs_shared: bool = False
    """Whether an evaluation by the adapted parameters alone needs to know that the shared ones require grad too: a
    forward pass asks, or differentiates by them."""
    needs_grad_mode: bool = False
    """Whether a forward pass or a loss differentiates by itself, and cannot be evaluated without gradients enabled."""
    needs_tangents: bool = False
    """Whether forward mode has met an operation that wants more than the tangents of the parameters."""
    is_vectorised: bool = True
    """Whether chunks run under `vmap`; False once the model turned out to have an operation that cannot."""
    used: set[str] = field(default_factory=set)
    """Adapted parameters that the support loss of some task depends on."""
    used_shared: set[str] = field(default_factory=set)
    """Shared ones that some derivative was taken by and not found to be zero for want of a path."""
    own: set[tuple[float, ...]] = field(default_factory=set)
    """Losses found to depend on no tensor that is not theirs: which part of which chunk, and how many nodes."""
    twice: set[tuple[float, ...]] = field(default_factory=set)
    """Gradients found to be differentiable again: which part of which chunk, and how many nodes it took."""
    statistics: list[dict[str, Tensor]] = field(default_factory=list)
    """Running statistics after the inner loop by name, `(tasks, *shape)`, of every chunk so far; none unless asked."""

    def add(self, done: Record) -> None:
        """Add what was counted and found to be used elsewhere."""
        self.gradients += done.gradients
        self.products += done.products
        self.mode = self.mode or done.mode
        self.used |= done.used
        self.used_shared |= done.used_shared

    def saved(self) -> dict[str, Any]:
        """All of it."""
        return {name: _listed(value) if isinstance(value, set) else value for name, value in vars(self).items()}

    def resume(self, saved: dict[str, Any]) -> None:
        """Go on counting from what was saved."""
        for name, value in saved.items():
            if isinstance(getattr(self, name), set):
                value = {tuple(item) if isinstance(item, list) else item for item in value}
            setattr(self, name, value)

    def mark(self) -> Callable[[], None]:
        """What takes back all that a chunk adds to from here on, but what it cost."""
        chunks, move, error = len(self.statistics), self.difference_move, self.difference_error

        def undo() -> None:
            del self.statistics[chunks:]
            self.difference_move, self.difference_error = move, error

        return undo

    def without_path(self, meta: MetaParameters, through_hyper: Collection[str]) -> list[str]:
        """Keys of learned meta-parameters, or groups of them, that no derivative was taken by.

        Args:
            meta: All of them.
            through_hyper: Names of those that have one through a hyper-parameter.

        Returns:
            The keys.
        """
        learned, reached = meta.learned().keys(), {*through_hyper, *self.used_shared}
        groups = {key: learned & group.keys() for key, group in meta.groups().items()}
        return [key for key, names in groups.items() if names and not names & reached]

    def mean_statistics(self) -> dict[str, Tensor]:
        """The mean over all tasks of the running statistics after their inner loops, in their dtypes."""
        names = self.statistics[0] if self.statistics else ()
        joined = {name: torch.cat([chunk[name] for chunk in self.statistics]) for name in names}
        return {name: values.double().mean(0).to(values.dtype) for name, values in joined.items()}


def _listed(items: Collection[str | tuple[float, ...]]) -> list[str | list[float]]:
    """A set as plain values, in an order of its own."""
    return sorted((item if isinstance(item, str) else [float(n) for n in item] for item in items), key=str)
