"""Exact Hessian-vector products of a chunk's loss at one point; for the inexact ones see `finite_difference`.

For w `(tasks, n)` a product returns H w `(tasks, n)` and, if `mixed`, the derivative `(m,)` of g' w, summed over tasks,
by the fixed parameters that the loss uses besides (None where there are none). Both are the derivative of the full
gradient along (w, 0).

Never `grad(jvp)` and never a `vmap` between the derivatives: both are wrong in silence for affine normalisation layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from imaml._losses.chunk import ChunkLoss
from imaml._losses.gradient import Gradient
from imaml._torch import load_forward_ad, may_drop_second_derivative, sequence_number, tree_flatten

Graph = Literal["rebuild", "keep", "once"]
"""Whether reverse-over-reverse builds the graph of the gradient anew for every product, keeps one, or keeps one for a
single product."""
_Graph = tuple[list[Tensor], list[Tensor], tuple[Tensor | None, ...]]


class Product(Protocol):
    """H at one point; `gradient` is that of the losses there, where the mode has it at no cost."""

    gradient: Gradient | None

    def __call__(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        """H w and the mixed product."""
        ...


class ReverseOverReverse:
    """The gradient of g' w: double backward through plain autograd (Pearlmutter 1994).

    A linearised one keeps the graph of g, so that a product costs one backward pass through it; without, a product
    costs a forward, a backward and their backward, and leaves nothing behind.
    """

    def __init__(self, loss: ChunkLoss, phi: Tensor, step: int, graph: Graph) -> None:
        self._loss, self._phi, self._step, self._once = loss, phi, step, graph != "keep"
        self.gradient: Gradient | None = None
        self._kept: _Graph | None = None
        if graph != "rebuild":
            losses, self._kept = self._graph()
            values = [None if g is None else g.detach() for g in self._kept[2]]
            self.gradient = Gradient(losses, *loss.collect(values, phi))

    @torch.enable_grad()
    def _graph(self) -> tuple[Tensor, _Graph]:
        loss, before = self._loss, sequence_number()
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            adapted, fixed, losses, _ = loss.at_leaves(self._phi, self._step, fixed=True)
            grads = loss.differentiate(losses, adapted, create_graph=True)
        graph = (loss.kind, loss.start, *loss.part, sequence_number() - before)
        if graph not in loss.context.graphs:
            check_twice_differentiable([losses, *(g for g in grads if g is not None)])
            loss.context.graphs.add(graph)
        return losses.detach(), (adapted, fixed, grads)

    def __call__(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        adapted, fixed, grads = self._kept or self._graph()[1]
        views = self._loss.context.layout.views(w)
        pairs = [(g, v) for g, v in zip(grads, views, strict=True) if g is not None and g.requires_grad]
        wanted = adapted + fixed if mixed else adapted
        found: tuple[Tensor | None, ...] = (None,) * len(wanted)
        if pairs:
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, wanted, cotangents, retain_graph=not self._once, allow_unused=True)
        return self._loss.collect(found, self._phi)


class Accumulated:
    """The weighted sum of the products of parts, built and released one after the other."""

    gradient: Gradient | None = None

    def __init__(self, parts: Sequence[tuple[float, ChunkLoss]], build: Callable[[ChunkLoss], Product]) -> None:
        self._parts, self._build = parts, build

    def __call__(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        total, total_mixed = torch.zeros_like(w), None
        for share, part in self._parts:
            product, its_mixed = self._build(part)(w, mixed=mixed)
            total.add_(product, alpha=share)
            if its_mixed is not None:
                total_mixed = its_mixed.mul_(share) if total_mixed is None else total_mixed.add_(its_mixed, alpha=share)
        return total, total_mixed


def check_twice_differentiable(outputs: Sequence[Tensor]) -> None:
    """Raise RuntimeError where a graph passes an operation without second derivative.

    Autograd itself is silent about it: such an operation leads to no leaf, and counts as unused. A custom
    `autograd.Function` that `vmap` has rewritten drops its second derivative without a trace if it has none, so none of
    them is trusted; they are exact with `chunk_size=1`.

    Raises:
        RuntimeError: There is one.
    """
    seen: set[Any] = set()
    pending = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if may_drop_second_derivative(node):
            raise RuntimeError(f"{node.name()} does not support double backward")
        pending += [following for following, _ in node.next_functions if following is not None]


class ForwardOverReverse:
    """The directional derivative of g along w: `jvp` of `grad`, rebuilt for every product.

    Every floating tensor of the batch is an argument with an explicit zero tangent, without which losses such as
    `mse_loss` fail. There is no linearisation: `torch.func.linearize` gives wrong products for
    `binary_cross_entropy_with_logits`, fails for GroupNorm and can crash the process.
    """

    gradient: Gradient | None = None

    def __init__(self, loss: ChunkLoss, phi: Tensor, step: int) -> None:
        load_forward_ad()
        self._loss, self._phi, self._step = loss, phi, step
        self._data, self._structure = tree_flatten(loss.batch)
        self._moving = [i for i, t in enumerate(self._data) if t.is_floating_point()]
        adapted, fixed = loss.leaves(phi.contiguous(), fixed=False)
        self._primals = ([t.detach() for t in adapted], fixed, [self._data[i] for i in self._moving])
        self._rest = [[torch.zeros_like(t) for t in still] for still in self._primals[1:]]
        if loss.context.replay.draws:
            self._check_draws()

    def __call__(self, w: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor | None]:
        tangents = self._jvp(w, mixed)[1]
        n = len(self._loss.context.layout.names)  # what the loss does not use has zeros, as if it were used
        used = [t if bool(t.any()) else None for t in tangents[n:]] if mixed else []
        return self._loss.collect([*tangents[:n], *used], self._phi)

    def _jvp(self, w: Tensor, mixed: bool) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient and its derivative along w, by the adapted and if `mixed` the fixed parameters."""
        gradient = torch.func.grad(self._total, argnums=(0, 1) if mixed or self._loss.context.needs_fixed else (0,))
        tangents = (self._loss.context.layout.views(w), *self._rest)
        with sdpa_kernel(SDPBackend.MATH):
            both = torch.func.jvp(gradient, self._primals, tangents)
        primal, tangent = ([t for part in parts for t in part] for parts in both)
        return primal, tangent

    def _total(self, adapted: list[Tensor], fixed: list[Tensor], floats: list[Tensor]) -> Tensor:
        leaves = list(self._data)
        for i, tensor in zip(self._moving, floats, strict=True):
            leaves[i] = tensor
        return self._loss.losses(adapted, fixed, self._structure.unflatten(leaves), self._step)[0].sum()

    def _check_draws(self) -> None:
        """Raise RuntimeError if the gradient under forward AD sees other random numbers than the inner loop's."""
        both = self._jvp(torch.zeros_like(self._phi), mixed=False)[0]
        primal = self._loss.collect(both[: len(self._loss.context.layout.names)], self._phi)[0]
        plain = self._loss.gradient(self._phi, self._step).adapted
        if (primal - plain).norm() > torch.finfo(plain.dtype).eps ** 0.5 * plain.norm():
            raise RuntimeError("the loss draws its random numbers in another order under forward AD")
