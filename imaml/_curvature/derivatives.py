"""Losses and their derivatives at flat parameters: by plain autograd, or by what takes its place."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml._curvature.agreement import Outputs
from imaml._curvature.exact_products import ForwardOverReverse, ReverseOverReverse, differentiate
from imaml._curvature.product import Graph, HvpMode, Product, Sum, is_long, itself
from imaml._losses.gradient import Gradient
from imaml._losses.loss import Loss
from imaml._losses.slice import Slice
from imaml._torch import LACKS_SECOND_DERIVATIVE


@dataclass(frozen=True)
class Want:
    """What is asked of first derivatives besides the losses and their gradient by the adapted parameters."""

    shared: bool = False
    """The gradient by the shared parameters, and by the initial ones where a loss takes these, summed over tasks."""
    metric: bool = False
    """The metric, if there is one."""
    weights: Tensor | None = None
    """What the losses are multiplied by, `(tasks,)`."""


@dataclass
class Findings:
    """What an engine has found out about the derivatives of an objective."""

    is_transpose: bool | None = None
    """Whether forward-over-reverse agrees with reverse-over-reverse; None: not known."""
    needs_tangents: bool | None = None
    """Whether it has to be taken with care: see `Record`."""


class Derivatives:
    """Values, gradients and exact products of losses, each a weighted sum of those of the slices of a loss.

    This class takes them by autograd. What computes them otherwise overrides what is said of one slice.
    """

    has_second: ClassVar[bool] = True
    """Whether there are exact products."""

    def __init__(self, found: Findings | None = None) -> None:
        self._found = found or Findings()

    @property
    def compiles(self) -> bool:
        """Whether functions of a slice are compiled."""
        return False

    @property
    def uncompiled(self) -> Derivatives:
        """Derivatives by plain autograd."""
        return self

    def whole(
        self,
        part: Slice,
        name: str,
        plain: Callable[..., Outputs],
        given: tuple[Tensor, ...],
        step: int,
        *,
        key: Hashable,
        losses: int | None,
    ) -> Outputs | None:
        """What a function makes of a slice and of tensors, where such functions are compiled.

        Args:
            part: The slice.
            name: What is computed, for people and as a key.
            plain: A function of a slice and of tensors, and of what the key says.
            given: The tensors, the parameters first.
            step: The inner step there.
            key: What else is frozen in the function.
            losses: Which of the outputs the losses are, by which the function is known again; None: there are none.

        Returns:
            The outputs; None where they are not compiled.
        """
        return None

    def whole_in_two(
        self,
        part: Slice,
        name: str,
        plain: Callable[..., Outputs],
        given: tuple[Tensor, ...],
        step: int,
        *,
        late: int,
        first: int,
        key: Hashable,
        losses: int,
    ) -> tuple[Outputs, Callable[..., Outputs]] | None:
        """What `whole` does, for a function of which some arguments come later.

        Args:
            part: The slice.
            name: What is computed.
            plain: The function, of a slice, of what comes later, in the shape of the parameters, and of the tensors.
            given: The tensors, the parameters first.
            step: The inner step there.
            late: How many come later.
            first: How many of the outputs depend on none of these.
            key: What else is frozen in the function.
            losses: Which of the outputs the losses are.

        Returns:
            These outputs, and what makes the others of what comes later; None where they are not compiled.
        """
        return None

    def value(self, loss: Loss, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Losses and metric `(tasks,)` at phi `(tasks, n)`, without derivatives; both are averaged over the slices."""
        parts = [(weight, *self.value_of(part, phi, step)) for weight, part in loss.slices]
        if len(parts) == 1:
            return parts[0][1:]
        metrics = [weight * metric for weight, _, metric in parts if metric is not None]
        losses = torch.stack([weight * losses for weight, losses, _ in parts]).sum(0)
        return losses, torch.stack(metrics).sum(0) if metrics else None

    def gradient(self, loss: Loss, phi: Tensor, step: int, want: Want = Want()) -> Gradient:
        """First derivatives at phi `(tasks, n)`."""
        survey = loss.snapshot.survey
        if len(loss.slices) == 1 and not (survey.recomputes_any and is_long(loss.whole, phi)):
            return self.gradient_of(loss.slices[0][1], phi, step, want)  # which `whole` is not in a mean over a source
        vector = torch.zeros_like(phi)
        parts = [
            self.gradient_of(part, phi, step, want, Sum(vector, weight)).times(weight) for weight, part in loss.slices
        ]
        return Gradient.sum(vector, parts)

    def value_of(self, part: Slice, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """`value` of one slice."""
        return part.value(phi, step)

    def gradient_of(self, part: Slice, phi: Tensor, step: int, want: Want, into: Sum | None = None) -> Gradient:
        """`gradient` of one slice; that by the adapted parameters is the vector of the sum that it is added to."""
        adapted, others, losses, figure = part.at_leaves(phi, step, shared=want.shared, metric=want.metric)
        with torch.enable_grad():
            weighted = losses if want.weights is None else want.weights * losses
            if hooked := into is not None and is_long(part, phi):
                for leaf, hook in zip(adapted, into.hooks(part, itself), strict=True):
                    leaf.register_hook(hook)
            grads = differentiate(part, weighted, adapted + others if want.shared else adapted)
        rest = grads[len(adapted) :]
        initial = part.collect_initial(rest) if rest else None
        if into is not None and hooked:
            return Gradient(losses.detach(), into.vector, part.collect_shared(rest), figure, initial)
        vector, shared = part.collect(grads, phi)
        return Gradient(losses.detach(), vector if into is None else into.add(vector, part), shared, figure, initial)

    def product_of(self, part: Slice, phi: Tensor, step: int, graph: Graph, mode: HvpMode) -> Product:
        """The exact Hessian of one slice at phi, with the gradient unless it is rebuilt.

        "auto" is reverse-over-reverse, but for recomputed blocks of which no graph is kept: forward-over-reverse
        computes them twelve times instead of sixteen.

        Args:
            part: The slice.
            phi: The point.
            step: The inner step there.
            graph: What is kept of the gradient's.
            mode: How products are computed.

        Returns:
            The products.
        """
        if mode == "forward-over-reverse":
            if self._found.needs_tangents is None:
                self._found.needs_tangents = _needs_tangents(part, phi, step)
            part.record.needs_tangents |= self._found.needs_tangents
            return ForwardOverReverse(part, phi, step)
        if mode == "auto" and graph is Graph.REBUILT and self.settle(part, phi, step):
            return ForwardOverReverse(part, phi, step)
        return ReverseOverReverse(part, phi, step, graph)

    @property
    def is_forward(self) -> bool:
        """What `settle` has found, as far as it is known."""
        return bool(self._found.is_transpose)

    def settle(self, part: Slice, phi: Tensor, step: int) -> bool:
        """Whether products are to be those of forward-over-reverse, which is found out once.

        It gives J w where the derivative of a sweep wants J' w, with J the derivative of the gradient. They differ for
        a backward pass that is no transpose of its forward pass, as that of a straight-through estimator: so the two
        modes are compared, at the cost of some ten gradients.

        Args:
            part: A slice of the loss.
            phi: A point.
            step: The inner step there.

        Returns:
            Whether they are.
        """
        if not part.snapshot.survey.recomputes_any:
            return False
        if self._found.is_transpose is None:
            self._found.is_transpose = _agree(part, phi, step)
        return self._found.is_transpose


def _agree(part: Slice, phi: Tensor, step: int) -> bool:
    """Whether the products of both modes with the gradient agree; not where there is none of a mode."""
    reverse = ReverseOverReverse(part, phi, step, Graph.REBUILT)
    try:
        return _alike(part, phi, step, lambda: ForwardOverReverse(part, phi, step), lambda: reverse)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LACKS_SECOND_DERIVATIVE):
            raise
        return False


def _needs_tangents(part: Slice, phi: Tensor, step: int) -> bool:
    """Whether forward mode loses tangents in silence, as in torch's backward formula of `linalg.solve` (torch 2.13)."""

    def careful() -> Product:
        part.record.needs_tangents = True
        return ForwardOverReverse(part, phi, step)

    before = part.record.needs_tangents
    try:
        return before or not _alike(part, phi, step, lambda: ForwardOverReverse(part, phi, step), careful)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in LACKS_SECOND_DERIVATIVE):
            raise
        return False  # the product will say what there is to say
    finally:
        part.record.needs_tangents = before


def _alike(part: Slice, phi: Tensor, step: int, *products: Callable[[], Product]) -> bool:
    """Whether two kinds of products with the gradient are the same, but for rounding, the mixed ones too."""
    adapted, _, losses, _ = part.at_leaves(phi, step, shared=False)
    w = part.collect(differentiate(part, losses, adapted), phi)[0]
    del adapted, losses
    total, mixed, sizes = torch.zeros_like(w), list[Tensor | None](), list[Tensor]()
    for product, sign in zip(products, (1, -1), strict=True):
        mixed.append(product()(w, mixed=True, into=Sum(total, sign))[1])
        sizes.append(total.norm())
    device = phi.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else phi.dtype
    close = torch.finfo(dtype).eps ** 0.5
    first, second = mixed
    if first is None or second is None:
        return first is second and bool(sizes[1] <= close * sizes[0])
    return bool(sizes[1] <= close * sizes[0]) and bool((first - second).norm() <= close * first.norm())
