"""The meta-gradient as most programs compute it: what the library's memory is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from imaml import Task


def usual_loop(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    task: Task,
    *,
    adapted: Sequence[str],
    lr: float,
    steps: int,
    regularization: float = 0.0,
) -> dict[str, Tensor]:
    """Unroll the inner loop with `create_graph=True`, then differentiate through all of it.

    Args:
        model: Its parameters are the initialisation.
        loss: A function of output and target.
        task: Pairs of input and target.
        adapted: Names of the parameters that the inner loop changes.
        lr: Its step size.
        steps: Its steps.
        regularization: Weight of the proximal term.

    Returns:
        The meta-gradient by parameter.
    """
    theta: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    phi = {name: theta[name] for name in adapted}
    (xs, ys), (xq, yq) = task.support, task.query
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        for _ in range(steps):
            grads = torch.autograd.grad(
                loss(functional_call(model, phi, (xs,)), ys), list(phi.values()), create_graph=True
            )
            phi = {
                name: value - lr * (grad + regularization * (value - theta[name]))
                for (name, value), grad in zip(phi.items(), grads, strict=True)
            }
        query_loss = loss(functional_call(model, phi, (xq,)), yq)
        return dict(zip(theta, torch.autograd.grad(query_loss, list(theta.values())), strict=True))
