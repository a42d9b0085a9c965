"""The inner loop: how a task's parameters are adapted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml._numbers import check_integer, check_number


@dataclass(frozen=True, kw_only=True)
class GradientDescent:
    """Gradient descent, phi' = phi - lr * g, `steps` times from phi = theta.

    Args:
        lr: Step size, finite and positive.
        steps: Number of steps K >= 0; 0 adapts nothing.

    Raises:
        TypeError: `lr` is not a number or `steps` not an integer.
        ValueError: `lr` or `steps` out of range.
    """

    lr: float
    steps: int

    def __post_init__(self) -> None:
        if check_number("`lr`", self.lr) <= 0:
            raise ValueError(f"`lr` must be positive. Got {self.lr}.")
        check_integer("`steps`", self.steps, least=0)

    def update(self, state: Tensor, gradient: Tensor) -> Tensor:
        """The next state U(s, g), both `(tasks, n)`."""
        return torch.sub(state, gradient, alpha=self.lr)

    def pullback(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangents of s and of g for a cotangent a of U(s, g): (a, -lr * a)."""
        return cotangent, -self.lr * cotangent
