"""The loss of a task by a model sharded over processes, whose own parameters are set to those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from imaml._losses.chunk import SUPPORT, ChunkLoss
from imaml._losses.foreign import leaves_of
from imaml._losses.gradient import Gradient
from imaml._sharding.sharded_layout import ShardedLayout, local, whole
from imaml._tasks import Batch


@dataclass(frozen=True)
class ShardedLoss(ChunkLoss):
    """As the model's hooks expect it: a forward pass of the model itself, and `backward` into its `.grad`.

    FSDP gathers and frees parameters in hooks that know of none but the model's, and reduces gradients on their way to
    `.grad`. Parameters and `.grad` are put back afterwards, bit for bit. The hooks have no second derivatives.
    """

    def leaves(self, phi: Tensor, *, fixed: bool) -> NoReturn:
        """There are none that a graph leads to."""
        raise RuntimeError("a model sharded over processes does not support double backward")

    def losses(
        self, adapted: Sequence[Tensor], fixed: Sequence[Tensor], batch: Batch, step: int, *, metric: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The loss (and metric) `(1,)` at the parameters that the model has."""
        losses, figure = super().losses((), (), batch, step, metric=metric)
        return whole(losses), None if figure is None else whole(figure)

    def _named(self, adapted: Sequence[Tensor], fixed: Sequence[Tensor]) -> dict[str, Tensor]:
        return self.context.fresh_constants()

    @torch.enable_grad()
    def gradient(
        self, phi: Tensor, step: int, *, fixed: bool = False, metric: bool = False, weights: Tensor | None = None
    ) -> Gradient:
        """First derivatives at phi `(1, n)`, of `weights` `(1,)` times the loss where given."""
        names, parameters = self.context.layout.names, list(self.context.objective.parameters().values())
        before = [p.grad for p in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            with self._at(phi):
                losses, figure = self.losses((), (), self.batch, step, metric=metric)
                self.check_depends(losses)
                # Before `backward`, which would leave gradients there. Gathered parameters are leaves that only FSDP
                # knows, so what has no name in the objective counts as known.
                named = self.context.objective.names()
                unnamed = [leaf for address, leaf in leaves_of([losses]).items() if address not in named]
                self.check_own(losses, [*parameters, *unnamed], lambda: self.losses((), (), self.batch, step)[0])
                (losses if weights is None else losses * whole(weights)).sum().backward()
            grads = [p.grad for p in parameters]
        finally:
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad
        if self.kind == SUPPORT:
            self.context.used |= {n for n, g in zip(names, grads, strict=False) if g is not None}
        return Gradient(losses.detach(), *self.collect(grads if fixed else grads[: len(names)], phi), figure)

    def value(self, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Loss and metric at phi, without derivatives."""
        with torch.no_grad(), self._at(phi):
            return self.losses((), (), self.batch, step, metric=True)

    @contextmanager
    def _at(self, phi: Tensor) -> Iterator[None]:
        """Within it the model has these parameters."""
        before = self.context.theta
        self._set(phi)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, phi: Tensor) -> None:
        layout, parameters = self.context.layout, self.context.objective.parameters()
        assert isinstance(layout, ShardedLayout)
        for name, shard in zip(layout.names, layout.shards(phi), strict=True):
            mine = local(parameters[name])
            mine.data.copy_(shard.view(mine.shape))  # by .data: graphs of the user's that saved it stay valid
