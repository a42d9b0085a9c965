"""Exact derivatives of a slice's losses at one point by autograd; for the inexact ones see `finite_difference`.

For w `(tasks, n)` a product returns H w `(tasks, n)` and, if `mixed`, the derivative `(m,)` of g' w, summed over tasks,
by the shared parameters that the loss uses besides (None where there are none). Both are the derivative of the full
gradient along (w, 0).

Never `grad(jvp)` and never a `vmap` between the derivatives: both are wrong in silence for affine normalisation layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, get_gradient_edge

from imaml._curvature.product import Graph, Sum, is_long, itself, nothing_like
from imaml._losses.gradient import Gradient
from imaml._losses.replay import Role
from imaml._losses.slice import Slice
from imaml._objective.attention import MathAttention
from imaml._objective.block_derivatives import TangentsAlone
from imaml._objective.exact import check_twice_differentiable
from imaml._torch import LACKS_SECOND_DERIVATIVE, gradient, load_forward_ad, sequence_number, tree_map

_End = Tensor | GradientEdge | None
_Graph = tuple[list[Tensor], list[Tensor], list[_End]]
"""The adapted and the shared leaves, and where the graph of the gradient by each adapted one ends.

That is at its numbers, or at an edge without them, from which autograd takes longer to start.
"""


def differentiate(
    part: Slice, losses: Tensor, wanted: Sequence[Tensor], *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradient of the losses, summed over tasks; remembers which adapted parameters the support loss uses."""
    part.check_depends(losses)
    grads = gradient([losses], wanted, [torch.ones_like(losses)], retain=create_graph, create=create_graph)
    if part.role is Role.SUPPORT and len(part.record.used) < len(part.snapshot.layout.names):
        part.record.used.update(n for n, g in zip(part.snapshot.layout.names, grads, strict=False) if g is not None)
    return grads


class ReverseOverReverse:
    """The gradient of g' w: double backward through plain autograd (Pearlmutter 1994).

    Where the graph of g is kept, a product costs one backward pass through it; else a forward, a backward and their
    backward.
    """

    mode: ClassVar[str] = "reverse-over-reverse"

    def __init__(self, part: Slice, phi: Tensor, step: int, graph: Graph) -> None:
        self._part, self._phi, self._step, self._once = part, phi, step, graph is not Graph.KEPT
        self.gradient: Gradient | None = None
        self._kept: _Graph | None = None
        if graph is not Graph.REBUILT:
            losses, values, self._kept = self._graph(with_values=True)
            self.gradient = Gradient(losses, *part.collect(values, phi))

    def _graph(self, *, with_values: bool = False) -> tuple[Tensor, list[Tensor | None], _Graph]:
        """The losses, the gradient's values where they are wanted, and its graph, which needs none of them."""
        part, before = self._part, sequence_number()
        with torch.enable_grad(), MathAttention():
            adapted, shared, losses, _ = part.at_leaves(self._phi, self._step, shared=True)
            edges: list[_End] = [None] * len(adapted)
            hooks = []
            if not with_values and is_long(part, self._phi):
                hooks = [leaf.register_hook(partial(_dropped, edges, i)) for i, leaf in enumerate(adapted)]
            grads = differentiate(part, losses, adapted, create_graph=True)
            for hook in hooks:  # they would drop the product too
                hook.remove()
            if not hooks:
                edge = get_gradient_edge if is_long(part, self._phi) else itself
                edges = [None if g is None or not g.requires_grad else edge(g) for g in grads]
        graph = (part.role, part.start, *part.part, sequence_number() - before)
        if graph not in part.record.twice:
            check_twice_differentiable([losses.grad_fn, *map(_node, edges)])
            part.record.twice.add(graph)
        values = [None if g is None else g.detach() for g in grads] if with_values else []
        return losses.detach(), values, (adapted, shared, edges)

    def __call__(self, w: Tensor, *, mixed: bool = False, into: Sum | None = None) -> tuple[Tensor, Tensor | None]:
        adapted, shared, edges = self._kept or self._graph()[2]
        part, hooks = self._part, []
        if into is not None and is_long(part, w):
            hooks = [leaf.register_hook(hook) for leaf, hook in zip(adapted, into.hooks(part, itself), strict=True)]
        pairs = [(edge, v) for edge, v in zip(edges, part.views(w), strict=True) if edge is not None]
        wanted = adapted + shared if mixed else adapted
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            found = gradient(outputs, wanted, cotangents, retain=not self._once, create=False)
        for hook in hooks:
            hook.remove()
        if into is not None and hooks:
            return into.vector, part.collect_shared(found[len(adapted) :])
        product, by_shared = part.collect(found, self._phi)
        return product if into is None else into.add(product, part), by_shared


def _node(end: _End) -> Any:
    return end.grad_fn if isinstance(end, Tensor) else end and end.node


def _dropped(edges: list[_End], i: int, gradient: Tensor | None) -> Tensor | None:
    """Note, as a hook of a leaf, where the graph of its gradient ends; let its numbers go, which no product reads."""
    if gradient is None:  # from a block that does not depend on its input
        return None
    if gradient.requires_grad:
        edges[i] = get_gradient_edge(gradient)
    return nothing_like(gradient)


class ForwardOverReverse:
    """The directional derivative of g along w: dual numbers through plain autograd, anew for every product.

    A hook of each leaf adds the tangent of its gradient to a flat vector as soon as it is complete, and lets the
    gradient go. Where a formula of torch's wants it, every floating tensor of the batch has an explicit zero tangent,
    and the backward pass is itself recorded, by which torch takes it apart into operations that have forward mode.
    """

    gradient: Gradient | None = None
    mode: ClassVar[str] = "forward-over-reverse"

    def __init__(self, part: Slice, phi: Tensor, step: int) -> None:
        load_forward_ad()
        self._part, self._phi, self._step = part, phi.contiguous(), step  # a tangent lies as its primal does

    def __call__(self, w: Tensor, *, mixed: bool = False, into: Sum | None = None) -> tuple[Tensor, Tensor | None]:
        part, layout = self._part, self._part.snapshot.layout
        tangents: dict[int, Tensor] = {}
        takes: list[Callable[[Tensor | None], Tensor | None]]
        takes = [partial(_keep, tangents, i) for i in range(len(layout.names) + len(part.snapshot.shared) * mixed)]
        if adds := layout.is_of_one_dtype:
            into = into or Sum(torch.zeros_like(w))
            takes = [*into.hooks(part, _tangent), *takes[len(layout.names) :]]
        with forward_ad.dual_level():
            if not part.record.needs_tangents:
                try:
                    self._run(w, takes)
                except RuntimeError as error:
                    if not any(sign in str(error) for sign in LACKS_SECOND_DERIVATIVE):
                        raise
                    part.record.needs_tangents = True
            if part.record.needs_tangents:
                self._run(w, takes)
        found = [tangents.get(i) for i in range(len(takes))]
        by_shared = part.collect_shared(found[len(layout.names) :])
        if adds and into is not None:
            return into.vector, by_shared
        product = layout.gather(found[: len(layout.names)], self._phi)
        return product if into is None else into.add(product, part), by_shared

    def _run(self, w: Tensor, takes: Sequence[Callable[[Tensor | None], Tensor | None]]) -> None:
        """One pass, in which the leaves hand out their gradients."""
        part, careful = self._part, self._part.record.needs_tangents
        adapted, shared = part.leaves(self._phi, shared=len(takes) > len(part.snapshot.layout.names))
        batch = tree_map(_still, part.batch) if careful else part.batch
        with torch.enable_grad(), MathAttention(), TangentsAlone():
            pairs = zip(adapted, part.views(w), strict=True)
            adapted = [forward_ad.make_dual(leaf.detach(), tangent).requires_grad_() for leaf, tangent in pairs]
            wanted = [*adapted, *shared][: len(takes)]
            for leaf, take in zip(wanted, takes, strict=True):
                leaf.register_hook(take)
            losses = part.losses(adapted, shared, batch, self._step)[0]
            part.check_depends(losses)
            # An edge: losses hold a tangent, and with it a graph of tangents, until the end.
            ones, end = losses.new_ones(losses.shape), get_gradient_edge(losses)
            del losses
            torch.autograd.grad(end, wanted, ones, create_graph=careful, allow_unused=True)


def _tangent(gradient: Tensor) -> Tensor | None:
    tangent = forward_ad.unpack_dual(gradient).tangent
    return None if tangent is None else tangent.detach()


def _keep(tangents: dict[int, Tensor], i: int, gradient: Tensor | None) -> Tensor | None:
    if gradient is None:  # from a block that does not depend on its input
        return None
    if (tangent := _tangent(gradient)) is not None:
        tangents[i] = tangent
    return nothing_like(gradient)


def _still(tensor: Tensor) -> Tensor:
    """A tensor of a batch with an explicit zero tangent, without which losses such as `mse_loss` fail."""
    if not tensor.is_floating_point():
        return tensor
    found: Tensor = forward_ad.make_dual(tensor, torch.zeros_like(tensor))
    return found
