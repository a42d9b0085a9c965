"""The one autograd node behind `result.loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _MetaLoss(torch.autograd.Function):
    """A loss whose gradients were computed in forward; backward only scales them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Keep the gradients, one per parameter, and return the loss."""
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale."""
        return None, None, *(outer[0] * gradient for gradient in ctx.saved_tensors)


def attach(loss: Tensor, gradients: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """The loss as a function of the parameters, with these gradients."""
    result: Tensor = _MetaLoss.apply(loss, gradients, *parameters)  # type: ignore[no-untyped-call]
    return result
