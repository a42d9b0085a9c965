"""Hessian-vector products by differences of gradients: for models that have no second derivatives, and inexact."""

from __future__ import annotations

import contextlib
import math
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from imaml._curvature.casts import Casts
from imaml._curvature.derivatives import Derivatives, Want
from imaml._curvature.product import Sum
from imaml._losses.gradient import Gradient
from imaml._losses.loss import Loss
from imaml_solvers._vectors import norm

_SHORTER = 8
"""What a move is divided by for the next."""


class FiniteDifference:
    """(g(phi + h w) - g(phi - h w)) / 2h: two gradients a product, first derivatives only, inexact.

    Each task's step moves phi by a fraction r of its norm, h = r (1 + |phi|) / |w|. A product errs by truncation,
    O(r^2) for a smooth loss, by rounding, O(eps / r), and at kinks: a ReLU that switches between the two points adds
    O(1 / r), with a probability of O(r). So r is about eps^(1/3), which balances the first two, or shorter where kinks
    are near: the first product of a call is computed with r = eps^(1/3), r / 8, r / 64 and so on, not below eps / 4,
    until two in a row agree to eps^(1/3) in every task. The call uses the shorter of these, or if none agree the
    shorter of the two that differ least, in the mean over tasks. What they differ by, in the worst task, is the
    estimate of the error.

    eps is that of the coarsest dtype among phi, the tensors that autograd saves, and those that a tensor is cast to:
    that of autocast, for one, or of a quantised layer.
    """

    gradient: Gradient | None = None
    mode: ClassVar[str] = "finite-difference"

    def __init__(self, derivatives: Derivatives, loss: Loss, phi: Tensor, step: int) -> None:
        self._derivatives, self._loss, self._phi, self._step = derivatives, loss, phi, step
        self._length = 1 + norm(phi)

    def __call__(self, w: Tensor, *, mixed: bool = False, into: Sum | None = None) -> tuple[Tensor, Tensor | None]:
        move = self._loss.record.difference_move
        product, by_shared = self._first(w, mixed) if move is None else self._moved_by(move, w, mixed)
        return product if into is None else into.add(product, self._loss.whole), by_shared

    def _first(self, w: Tensor, mixed: bool) -> tuple[Tensor, Tensor | None]:
        """The product, and the move for the rest of the call; products of zeros tell nothing of it."""
        record, least, eps = self._loss.record, float("inf"), self._eps()
        close = move = eps ** (1 / 3)
        found = self._moved_by(move, w, mixed)
        while move / _SHORTER >= eps / 4:
            longer, move = found[0], move / _SHORTER
            found = self._moved_by(move, w, mixed)
            difference = _difference(longer, found[0])
            worst, mean = difference.nan_to_num().max().item(), difference.nanmean().item()
            if math.isnan(mean):
                record.difference_error = 0.0
                return found
            if worst <= close or mean < least:
                least, record.difference_move, record.difference_error = mean, move, worst
            if worst <= close:
                return found
        assert record.difference_move is not None
        return found if record.difference_move == move else self._moved_by(record.difference_move, w, mixed)

    def _eps(self) -> float:
        """The eps of the coarsest dtype that one gradient meets."""
        casts = Casts()
        dtypes = casts.dtypes
        dtypes.add(self._phi.dtype)

        def pack(saved: Tensor) -> Tensor:
            dtypes.add(saved.dtype)
            return saved.detach()  # the tensor itself would be kept by its own graph

        with casts, saved_tensors_hooks(pack, lambda saved: saved), contextlib.suppress(RuntimeError):
            # A model that differentiates may refuse to be looked at.
            self._derivatives.gradient(self._loss, self._phi, self._step)
        return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)

    def _moved_by(self, move: float, w: Tensor, mixed: bool) -> tuple[Tensor, Tensor | None]:
        size = norm(w)
        h = move * self._length / torch.where(size > 0, size, torch.ones_like(size))
        step, want = h.unsqueeze(-1), Want(mixed, weights=1 / (2 * h))
        ahead, behind = (
            self._derivatives.gradient(self._loss, torch.addcmul(self._phi, step, w, value=sign), self._step, want)
            for sign in (1, -1)
        )
        shared = None if ahead.shared is None or behind.shared is None else ahead.shared - behind.shared
        return ahead.adapted.sub_(behind.adapted), shared


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """|x - y| relative to the larger norm, `(tasks,)`; NaN where both are zero or one is not finite."""
    return norm(x - y) / torch.maximum(norm(x), norm(y))
