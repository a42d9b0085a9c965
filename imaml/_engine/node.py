"""The one autograd node behind `result.loss`.

The meta-gradient is computed in forward, so its memory is given back at once; clipping, accumulation, `GradScaler` and
a network that produced theta work as with any loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _MetaLoss(torch.autograd.Function):
    """A loss whose gradients were computed in forward; backward only scales them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Keep the gradients, one per parameter, and return the loss."""
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Scale; raises RuntimeError where the result is to be differentiated again."""
        # `once_differentiable` would return tensors without grad, and a penalty on them would be a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A meta-gradient cannot be differentiated again. Expected backward() or torch.autograd.grad without "
                "create_graph. Got create_graph=True: differentiate other losses by themselves, and for a penalty on "
                "the meta-gradient take finite differences of `value_and_grad`."
            )
        return None, None, *(outer[0] * gradient for gradient in ctx.saved_tensors)


def attach(loss: Tensor, gradients: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """The loss as a function of the parameters, with these gradients."""
    result: Tensor = _MetaLoss.apply(loss, gradients, *parameters)  # type: ignore[no-untyped-call]
    return result
