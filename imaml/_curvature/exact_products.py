"""Exact derivatives of a slice's losses at one point by autograd; for the inexact ones see `finite_difference`.

For w `(tasks, n)` a product returns H w `(tasks, n)` and, if `mixed`, the derivative `(m,)` of g' w, summed over tasks,
by the shared parameters that the loss uses besides (None where there are none). Both are the derivative of the full
gradient along (w, 0).

Never `grad(jvp)` and never a `vmap` between the derivatives: both are wrong in silence for affine normalisation layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from imaml._losses.gradient import Gradient
from imaml._losses.replay import Role
from imaml._losses.slice import Slice
from imaml._objective.exact import MathAttention, check_twice_differentiable
from imaml._torch import load_forward_ad, sequence_number, tree_flatten

_End = Tensor | GradientEdge | None
_Graph = tuple[list[Tensor], list[Tensor], list[_End]]
"""The adapted and the shared leaves, and where the graph of the gradient by each adapted one ends.

That is at its numbers, or at an edge without them, from which autograd takes longer to start.
"""


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


class Product(Protocol):
    """H at one point; `gradient` is that of the losses there, where it comes at no cost."""

    gradient: Gradient | None

    def __call__(
        self, w: Tensor, *, mixed: bool = False, into: Tensor | None = None, weight: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """H w as a new tensor, or `into` with `weight` times H w added to it; and the mixed product."""
        ...


def placed(product: Tensor, into: Tensor | None, weight: float) -> Tensor:
    """What a `Product` returns that has the whole of H w at once."""
    return product if into is None else into.add_(product, alpha=weight)


def differentiate(
    part: Slice, losses: Tensor, wanted: Sequence[Tensor], *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """The gradient of the losses, summed over tasks; remembers which adapted parameters the support loss uses."""
    part.check_depends(losses)
    ones = torch.ones_like(losses)
    grads = torch.autograd.grad(losses, wanted, ones, create_graph=create_graph, allow_unused=True)
    if part.role is Role.SUPPORT:
        part.record.used.update(n for n, g in zip(part.snapshot.layout.names, grads, strict=False) if g is not None)
    return grads


class ReverseOverReverse:
    """The gradient of g' w: double backward through plain autograd (Pearlmutter 1994).

    Where the graph of g is kept, a product costs one backward pass through it; else a forward, a backward and their
    backward.
    """

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
            hooks, zero = [], losses.new_zeros(())
            if not with_values and self._is_long:
                hooks = [leaf.register_hook(partial(_dropped, edges, i, zero)) for i, leaf in enumerate(adapted)]
            grads = differentiate(part, losses, adapted, create_graph=True)
            for hook in hooks:  # they would drop the product too
                hook.remove()
            if not hooks:
                edge = get_gradient_edge if self._is_long else _itself
                edges = [None if g is None or not g.requires_grad else edge(g) for g in grads]
        graph = (part.role, part.start, *part.part, sequence_number() - before)
        if graph not in part.record.twice:
            check_twice_differentiable([losses.grad_fn, *map(_node, edges)])
            part.record.twice.add(graph)
        values = [None if g is None else g.detach() for g in grads] if with_values else []
        return losses.detach(), values, (adapted, shared, edges)

    @property
    def _is_long(self) -> bool:
        """Whether a vector matters beside a graph; else hooks would cost more time than they save memory."""
        layout = self._part.snapshot.layout
        return self._phi.numel() >= LONG and all(dtype == layout.dtype for dtype in layout.dtypes)

    def __call__(
        self, w: Tensor, *, mixed: bool = False, into: Tensor | None = None, weight: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        adapted, shared, edges = self._kept or self._graph()[2]
        layout, hooks = self._part.snapshot.layout, []
        if self._is_long and into is not None:
            hooks = [
                leaf.register_hook(partial(_added, v, weight))
                for leaf, v in zip(adapted, layout.views(into), strict=True)
            ]
        pairs = [(edge, v) for edge, v in zip(edges, layout.views(w), strict=True) if edge is not None]
        wanted = adapted + shared if mixed else adapted
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, wanted, cotangents, retain_graph=not self._once, allow_unused=True)
        if not hooks:
            product, by_shared = self._part.collect(found, self._phi)
            return placed(product, into, weight), by_shared
        for hook in hooks:
            hook.remove()
        assert into is not None
        return into, self._part.collect_shared(found[len(adapted) :])


def _itself(gradient: Tensor) -> Tensor:
    return gradient


def _node(end: _End) -> Any:
    return end.grad_fn if isinstance(end, Tensor) else end and end.node


def _dropped(edges: list[_End], i: int, zero: Tensor, gradient: Tensor) -> Tensor:
    """Note, as a hook of a leaf, where the graph of its gradient ends; let its numbers go, which no product reads."""
    if gradient.requires_grad:
        edges[i] = get_gradient_edge(gradient)
    return zero.to(gradient.dtype).expand(gradient.shape)


def _added(total: Tensor, weight: float, product: Tensor) -> Tensor:
    """Add a leaf's product to its part of a flat vector, as a hook: no vector of all of them stands beside that one."""
    total.add_(product, alpha=weight)
    return product.new_zeros(()).expand(product.shape)


class ForwardOverReverse:
    """The directional derivative of g along w: `jvp` of `grad`, rebuilt for every product.

    Every floating tensor of the batch is an argument with an explicit zero tangent, without which losses such as
    `mse_loss` fail. There is no linearisation: `torch.func.linearize` gives wrong products for
    `binary_cross_entropy_with_logits`, fails for GroupNorm and can crash the process.
    """

    gradient: Gradient | None = None

    def __init__(self, part: Slice, phi: Tensor, step: int) -> None:
        load_forward_ad()
        self._part, self._phi, self._step = part, phi, step
        self._data, self._structure = tree_flatten(part.batch)
        self._moving = [i for i, t in enumerate(self._data) if t.is_floating_point()]
        adapted, shared = part.leaves(phi.contiguous(), shared=False)
        self._primals = ([t.detach() for t in adapted], shared, [self._data[i] for i in self._moving])
        self._rest = [[torch.zeros_like(t) for t in still] for still in self._primals[1:]]
        if part.snapshot.replay.draws:
            self._check_draws()

    def __call__(
        self, w: Tensor, *, mixed: bool = False, into: Tensor | None = None, weight: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        tangents = self._jvp(w, mixed)[1]
        n = len(self._part.snapshot.layout.names)  # what the loss does not use has zeros, as if it were used
        used = [t if bool(t.any()) else None for t in tangents[n:]] if mixed else []
        product, by_shared = self._part.collect([*tangents[:n], *used], self._phi)
        return placed(product, into, weight), by_shared

    def _jvp(self, w: Tensor, mixed: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient and its derivative along w, by the adapted and if `mixed` the shared parameters."""
        gradient = torch.func.grad(self._total, argnums=(0, 1) if mixed or self._part.record.needs_shared else (0,))
        tangents = (self._part.snapshot.layout.views(w), *self._rest)
        with MathAttention():
            both = torch.func.jvp(gradient, self._primals, tangents)
        primal, tangent = ([t for part in parts for t in part] for parts in both)
        return primal, tangent

    def _total(self, adapted: list[Tensor], shared: list[Tensor], floats: list[Tensor]) -> Tensor:
        leaves = list(self._data)
        for i, tensor in zip(self._moving, floats, strict=True):
            leaves[i] = tensor
        return self._part.losses(adapted, shared, self._structure.unflatten(leaves), self._step)[0].sum()

    def _check_draws(self) -> None:
        """Raise RuntimeError if the gradient under forward AD sees other random numbers than the inner loop's."""
        both = self._jvp(torch.zeros_like(self._phi), mixed=False)[0]
        primal = self._part.collect(both[: len(self._part.snapshot.layout.names)], self._phi)[0]
        adapted, _, losses, _ = self._part.at_leaves(self._phi, self._step, shared=False)
        with torch.enable_grad():
            plain = self._part.collect(differentiate(self._part, losses, adapted), self._phi)[0]
        if (primal - plain).norm() > torch.finfo(plain.dtype).eps ** 0.5 * plain.norm():
            raise RuntimeError("the loss draws its random numbers in another order under forward AD")
