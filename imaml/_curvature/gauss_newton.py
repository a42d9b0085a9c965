"""Gauss-Newton products: the curvature of the loss as a function of the model's output, without that of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from imaml._curvature.product import Graph, Sum
from imaml._losses.gradient import Gradient
from imaml._losses.slice import Slice
from imaml._objective.attention import MathAttention
from imaml._objective.exact import check_twice_differentiable

Gradients = tuple[Tensor | None, ...]


class GaussNewton:
    """G = J' (d2 L / dz2) J of a slice's losses at `phi`, with z the model's output and J = dz / dphi.

    Positive semi-definite where the loss is convex in z, as cross entropy and squared error are; the Hessian itself
    where z is linear in the adapted parameters. Schraudolph 2002, Martens 2010.

    It holds the graph of the forward pass, and of J' u as a function of a dummy u. A product is the derivative of J' u
    by u along w, which is J w (one pass through that graph: double backward, no forward AD), then the loss's Hessian by
    z, then one ordinary backward pass. The gradient is there unless the graph is for one product alone.
    """

    mode: ClassVar[str] = "gauss-newton"

    def __init__(self, part: Slice, phi: Tensor, step: int, graph: Graph) -> None:
        self._part, self._phi = part, phi
        with torch.enable_grad(), MathAttention():
            self._adapted, shared = part.leaves(phi, shared=False)
            outputs, losses = part.through_outputs(self._adapted, shared, step)
            self._outputs = [z for z in outputs if z.requires_grad]
            part.check_depends(losses)
            part.check_own(losses, self._adapted, lambda: part.through_outputs(self._adapted, shared, step)[1])
            self._slopes = torch.autograd.grad(losses.sum(), self._outputs, create_graph=True, allow_unused=True)
            self._dummies = [torch.zeros_like(z, requires_grad=True) for z in self._outputs]
            self._pulled = self._pull_back(self._dummies, create_graph=True)
        _check_linearised(self._pulled)
        self.gradient: Gradient | None = None
        if graph is not Graph.REBUILT:
            self.gradient = Gradient(losses.detach(), self._collect(self._pull_back(self._slopes)), None)

    def __call__(self, w: Tensor, *, mixed: bool = False, into: Sum | None = None) -> tuple[Tensor, Tensor | None]:
        """G w; there is no mixed product."""
        moved = _along(self._pulled, self._dummies, self._part.views(w))
        curved = _along(self._slopes, self._outputs, moved)
        product = self._collect(self._pull_back(curved))
        return product if into is None else into.add(product, self._part), None

    def _pull_back(self, u: Sequence[Tensor | None], *, create_graph: bool = False) -> Gradients:
        """J' u per parameter; None where no output depends on it."""
        return _along(self._outputs, self._adapted, u, create_graph=create_graph)

    def _collect(self, grads: Sequence[Tensor | None]) -> Tensor:
        return self._part.collect([None if g is None else g.detach() for g in grads], self._phi)[0]


def _check_linearised(pulled: Sequence[Tensor | None]) -> None:
    try:
        check_twice_differentiable([g.grad_fn for g in pulled if g is not None])
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
