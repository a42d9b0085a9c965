"""The inner loop: how a task's parameters are adapted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GradientDescent:
    """Gradient descent, phi' = phi - lr * g, `steps` times from phi = theta.

    Args:
        lr: Step size, finite and positive.
        steps: Number of steps K >= 0; 0 adapts nothing.

    Raises:
        TypeError: `steps` is not an integer.
        ValueError: `lr` or `steps` out of range.
    """

    lr: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"`lr` must be a finite positive number. Got {self.lr}.")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"`steps` must be an integer. Got {self.steps!r}.")
        if self.steps < 0:
            raise ValueError(f"`steps` must be >= 0. Got {self.steps}.")

    def update(self, state: Tensor, gradient: Tensor) -> Tensor:
        """The next state U(s, g), both `(tasks, n)`."""
        return torch.sub(state, gradient, alpha=self.lr)

    def pullback(self, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The cotangents of s and of g for a cotangent a of U(s, g): (a, -lr * a)."""
        return cotangent, -self.lr * cotangent
