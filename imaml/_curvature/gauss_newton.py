"""Gauss-Newton products: the curvature of the loss as a function of the model's output, without that of the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from imaml._curvature.curvature import Curvature, HvpMode
from imaml._curvature.exact_products import check_twice_differentiable
from imaml._losses.chunk import ChunkLoss
from imaml._losses.gradient import Gradient
from imaml._losses.microbatch import Microbatched

Gradients = tuple[Tensor | None, ...]


class GaussNewton:
    """G = J' (d2 L / dz2) J of a chunk's support loss at `phi`, with z the model's output and J = dz / dphi.

    Positive semi-definite where the loss is convex in z, as cross entropy and squared error are; the Hessian itself
    where z is linear in the adapted parameters. Schraudolph 2002, Martens 2010.

    The linearised model is kept for all products, or built anew, slice by slice, where the loss is a sum of parts.
    """

    def __init__(self, loss: ChunkLoss | Microbatched, phi: Tensor, step: int, *, mode: HvpMode) -> None:
        self._loss, self._phi, self._step, self._mode, self._context = loss, phi, step, mode, loss.context
        self._context.gauss_newton = True
        self._kept: _Linearised | None = None
        self._gradient: Gradient | None = None
        if len(loss.parts) == 1:
            self._context.gradients += loss.tasks
            self._kept = _Linearised(loss.parts[0][1], phi, step)
            self._gradient = self._kept.gradient()

    def take_gradient(self) -> Gradient | None:
        """The support loss and its gradient at phi, where they are known; kept no longer."""
        gradient, self._gradient = self._gradient, None
        return gradient

    def product(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        """G w `(tasks, n)` and, if `mixed`, the derivative of g' w by the fixed parameters: the exact one."""
        if mixed:
            exact = Curvature(self._loss, self._phi, self._step, mode=self._mode, graph="rebuild")
            return exact.product(w, mixed=True)
        self._context.hvps += self._loss.tasks
        if self._kept is not None:
            return self._kept.product(w), None
        total = torch.zeros_like(w)
        for share, part in self._loss.parts:
            total.add_(_Linearised(part, self._phi, self._step).product(w), alpha=share)
        return total, None


class _Linearised:
    """The forward pass at phi, and J' u as a function of a dummy u.

    A product is the derivative of J' u by u along w, which is J w (one pass through the graph of J' u), then the loss's
    Hessian by z, then one ordinary backward pass.
    """

    def __init__(self, loss: ChunkLoss, phi: Tensor, step: int) -> None:
        self._loss, self._phi = loss, phi
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            self._adapted, fixed = loss.leaves(phi, fixed=False)
            outputs, losses = loss.through_outputs(self._adapted, fixed, step)
            self._outputs = [z for z in outputs if z.requires_grad]
            loss.check_depends(losses)
            loss.check_own(losses, self._adapted, lambda: loss.through_outputs(self._adapted, fixed, step)[1])
            self._slopes = torch.autograd.grad(losses.sum(), self._outputs, create_graph=True, allow_unused=True)
            self._dummies = [torch.zeros_like(z, requires_grad=True) for z in self._outputs]
            self._pulled = self._pull_back(self._dummies, create_graph=True)
        _check_linearised(self._pulled)
        self._losses = losses.detach()

    def gradient(self) -> Gradient:
        """The losses and their gradient."""
        return Gradient(self._losses, self._collect(self._pull_back(self._slopes)), None)

    def product(self, w: Tensor) -> Tensor:
        """G w."""
        moved = _along(self._pulled, self._dummies, self._loss.context.layout.views(w))
        curved = _along(self._slopes, self._outputs, moved)
        return self._collect(self._pull_back(curved))

    def _pull_back(self, u: Sequence[Tensor | None], *, create_graph: bool = False) -> Gradients:
        """J' u per parameter; None where no output depends on it."""
        return _along(self._outputs, self._adapted, u, create_graph=create_graph)

    def _collect(self, grads: Sequence[Tensor | None]) -> Tensor:
        return self._loss.collect([None if g is None else g.detach() for g in grads], self._phi)[0]


def _check_linearised(pulled: Sequence[Tensor | None]) -> None:
    try:
        check_twice_differentiable([g for g in pulled if g is not None])
    except RuntimeError as error:
        raise RuntimeError(
            f"curvature='ggn' differentiates the model's backward pass, and met an operation that has no second "
            f"derivative ({error}). Use chunk_size=1 for a custom autograd.Function that has one, or "
            "curvature='hessian', which falls back on finite differences."
        ) from error


def _along(
    values: Sequence[Tensor | None],
    at: Sequence[Tensor],
    direction: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
) -> Gradients:
    """The derivative of <values, direction> by `at`, through the graph that `values` carry, which is kept."""
    known = [(f, d) for f, d in zip(values, direction, strict=True) if f is not None and d is not None]
    pairs = [(f, d) for f, d in known if f.requires_grad]
    if not pairs:
        return (None,) * len(at)
    outputs, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, at, cotangents, create_graph=create_graph, retain_graph=True, allow_unused=True)
