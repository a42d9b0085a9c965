"""Losses and their derivatives at flat parameters: by plain autograd, or by what takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml._curvature.exact_products import Graph, Product, ReverseOverReverse, differentiate
from imaml._losses.gradient import Gradient
from imaml._losses.loss import Loss
from imaml._losses.slice import Slice


@dataclass(frozen=True)
class Want:
    """What is asked of first derivatives besides the losses and their gradient by the adapted parameters."""

    shared: bool = False
    """The gradient by the shared parameters, summed over tasks."""
    metric: bool = False
    """The metric, if there is one."""
    weights: Tensor | None = None
    """What the losses are multiplied by, `(tasks,)`."""


class Derivatives:
    """Values, gradients and exact products of losses, each a weighted sum of those of the slices of a loss.

    This class takes them by autograd. What computes them otherwise overrides what is said of one slice.
    """

    has_second: ClassVar[bool] = True
    """Whether there are exact products."""

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
        total: Gradient | None = None
        for weight, part in loss.slices:
            found = self.gradient_of(part, phi, step, want)
            if weight != 1:
                found = found.mul_(weight)
            total = found if total is None else total.add_(found)
        assert total is not None
        return total

    def value_of(self, part: Slice, phi: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """`value` of one slice."""
        return part.value(phi, step)

    def gradient_of(self, part: Slice, phi: Tensor, step: int, want: Want) -> Gradient:
        """`gradient` of one slice."""
        adapted, others, losses, figure = part.at_leaves(phi, step, shared=want.shared, metric=want.metric)
        with torch.enable_grad():
            weighted = losses if want.weights is None else want.weights * losses
            grads = differentiate(part, weighted, adapted + others if want.shared else adapted)
        return Gradient(losses.detach(), *part.collect(grads, phi), figure)

    def product_of(self, part: Slice, phi: Tensor, step: int, graph: Graph) -> Product:
        """The exact Hessian of one slice at phi, by reverse-over-reverse, with the gradient unless it is rebuilt."""
        return ReverseOverReverse(part, phi, step, graph)
