"""Derivatives of a model sharded over processes, whose own parameters are set to those that are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from imaml._curvature.derivatives import Derivatives, Want
from imaml._curvature.product import Sum
from imaml._losses.gradient import Gradient
from imaml._losses.replay import Role
from imaml._losses.slice import Slice
from imaml._losses.snapshot import Snapshot
from imaml._objective.foreign import leaves_of
from imaml._sharding.sharded_layout import ShardedLayout, local, whole


class Sharded(Derivatives):
    """As the model's hooks expect it: a forward pass of the model itself, and `backward` into its `.grad`.

    FSDP gathers and frees parameters in hooks that know of none but the model's, and reduces gradients on their way to
    `.grad`. Parameters and `.grad` are put back afterwards, bit for bit. The hooks have no second derivatives.
    """

    has_second: ClassVar[bool] = False

    def gradient_of(self, part: Slice, phi: Tensor, step: int, want: Want, into: Sum | None = None) -> Gradient:
        """See `Derivatives`; phi is `(1, n)`."""
        names, parameters = part.snapshot.layout.names, list(part.snapshot.objective.parameters().values())
        before = [p.grad for p in parameters]
        try:
            for parameter in parameters:
                parameter.grad = None
            with _at(part.snapshot, phi), torch.enable_grad():
                losses, figure = _losses(part, step, metric=want.metric)
                part.check_depends(losses)
                # Before `backward`, which would leave gradients there. Gathered parameters are leaves that only FSDP
                # knows, so what has no name in the objective counts as known.
                named = part.snapshot.objective.names()
                unnamed = [leaf for address, leaf in leaves_of([losses]).items() if address not in named]
                part.check_own(losses, [*parameters, *unnamed], lambda: _losses(part, step)[0])
                (losses if want.weights is None else losses * whole(want.weights)).sum().backward()
            grads = [p.grad for p in parameters]
        finally:
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad
        if part.role is Role.SUPPORT:
            part.record.used |= {n for n, g in zip(names, grads, strict=False) if g is not None}
        vector, by_shared = part.collect(grads if want.shared else grads[: len(names)], phi)
        return Gradient(losses.detach(), vector if into is None else into.add(vector, part), by_shared, figure)

    def value_of(self, part: Slice, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """See `Derivatives`."""
        with torch.no_grad(), _at(part.snapshot, phi):
            return _losses(part, step, metric=True)


def _losses(part: Slice, step: int, *, metric: bool = False) -> tuple[Tensor, Tensor | None]:
    """The loss (and metric) `(1,)` at the parameters that the model has."""
    losses, figure = part.losses((), (), part.batch, step, metric=metric)
    return whole(losses), None if figure is None else whole(figure)


@contextmanager
def _at(snapshot: Snapshot, phi: Tensor) -> Iterator[None]:
    """Within it the model has these parameters."""
    before = snapshot.theta
    _set(snapshot, phi)
    try:
        yield
    finally:
        _set(snapshot, before)


def _set(snapshot: Snapshot, phi: Tensor) -> None:
    layout, parameters = snapshot.layout, snapshot.objective.parameters()
    assert isinstance(layout, ShardedLayout)
    for name, shard in zip(layout.names, layout.shards(phi), strict=True):
        mine = local(parameters[name])
        mine.data.copy_(shard.view(mine.shape))  # by .data: graphs of the user's that saved it stay valid
