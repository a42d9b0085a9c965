"""Hessian-vector products by differences of gradients: for models that have no second derivatives, and inexact."""

from __future__ import annotations

import torch
from torch import Tensor

from imaml._chunk import ChunkLoss, Gradient
from imaml._microbatch import Microbatched

_LONGER, _ATTEMPTS = 8.0, 6
"""What a move grows by, and how many moves are compared with the next at most."""
_CLOSE = 0.05
"""The relative difference of two products from which a move is long enough."""


class FiniteDifference:
    """(g(phi + h w) - g(phi - h w)) / 2h: two gradients a product, first derivatives only, inexact.

    Each task's step moves phi by a fraction r of its norm, h = r (1 + |phi|) / |w|. A product errs by rounding,
    O(eps / r), by truncation, O(r^2) for a smooth loss, and at kinks: a ReLU that switches between the two points adds
    O(1 / r), with a probability of O(r). A network has thousands of them, and no estimate at one point tells of those
    near the next. So r is short: eps^(1/2) in float64, and below 2 eps, where rounding costs a few percent.

    Gradients can be rounded more coarsely than phi is, as under autocast. So the first product of a call is computed
    with 8r too. If the two differ by more than 5 %, in the median over tasks, r grows by factors of 8, at most to 8^5,
    and the call uses the r whose product differs least from that of 8r. The difference of the worst task is the
    estimate of the error.
    """

    gradient: Gradient | None = None

    def __init__(self, loss: ChunkLoss | Microbatched, phi: Tensor, step: int) -> None:
        self._loss, self._phi, self._step = loss, phi, step
        self._length = 1 + phi.norm(dim=-1, keepdim=True)

    def __call__(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        move = self._loss.context.hvp_move
        return self._first(w, mixed) if move is None else self._moved_by(move, w, mixed)

    def _first(self, w: Tensor, mixed: bool) -> tuple[Tensor, Tensor | None]:
        """The product, and the move for the rest of the call."""
        context, least = self._loss.context, float("inf")
        eps = torch.finfo(w.dtype).eps
        shortest = eps**0.5 if w.dtype == torch.float64 else 2 * eps
        context.hvp_move, context.hvp_error = shortest, 0.0
        found = self._moved_by(shortest, w, mixed)
        product = found[0]
        for attempt in range(_ATTEMPTS):
            move = shortest * _LONGER**attempt
            longer = self._moved_by(_LONGER * move, w, mixed=False)[0]
            size = longer.norm(dim=-1)
            difference = torch.where(size > 0, (longer - product).norm(dim=-1), torch.nan)
            relative = difference / size
            typical = difference.nanmedian().item()
            if typical < least:
                least, context.hvp_move, context.hvp_error = typical, move, relative.nan_to_num().max().item()
            if relative.nanmedian().item() < _CLOSE:
                break
            product = longer
        return found if context.hvp_move == shortest else self._moved_by(context.hvp_move, w, mixed)

    def _moved_by(self, move: float, w: Tensor, mixed: bool) -> tuple[Tensor, Tensor | None]:
        norm = w.norm(dim=-1, keepdim=True)
        h = move * self._length / torch.where(norm > 0, norm, torch.ones_like(norm))
        weights = (1 / (2 * h)).squeeze(-1)
        ahead, behind = (
            self._loss.gradient(torch.addcmul(self._phi, h, w, value=s), self._step, fixed=mixed, weights=weights)
            for s in (1, -1)
        )
        fixed = None if ahead.fixed is None or behind.fixed is None else ahead.fixed - behind.fixed
        return ahead.adapted.sub_(behind.adapted), fixed
