"""Optimisers that step along the sign of a running mean of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml.inner._adaptive import check_betas, check_fraction
from imaml.inner._base import InnerOptimizer
from imaml.inner._gradient_descent import minus
from imaml.inner._hyper import Hyper, is_off
from imaml.inner._inner_problem import State
from imaml.inner._rates import Rates


@dataclass(frozen=True, kw_only=True)
class SignDescent(InnerOptimizer):
    """Adapts by steps of one size in every entry, along the sign of the gradient.

    Formula: phi <- phi - lr * (sign(m) + weight_decay * phi) with m <- mu m + (1 - mu) g from zero for momentum mu.
    Known as signSGD, and with momentum as Signum.

    The derivative of a sign is zero wherever it has one. So nothing of the support losses' curvature enters, nor of
    what they depend on: theta gets what `FOMAML` gives it, but for weight decay, and example weights get zero. Learned
    step sizes get their derivative.

    Source: Bernstein et al. 2018.

    Args:
        lr: See `InnerOptimizer`, as for `steps`.
        momentum: mu, >= 0 and < 1.
        weight_decay: >= 0, decoupled.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range.
    """

    is_linear: ClassVar[bool] = True
    is_deterministic: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True
    nonnegative: ClassVar[tuple[str, ...]] = ("weight_decay",)

    momentum: float = 0.0
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_fraction("`momentum`", self.momentum)

    @property
    def buffers(self) -> int:
        """The momentum."""
        return int(self.momentum > 0)

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        phi, *means = state
        means = [torch.lerp(gradient, mean, self.momentum) for mean in means]
        direction = means[0] if means else gradient
        return _signed(phi, direction, at, decays=not is_off(self.weight_decay)), *means


@dataclass(frozen=True, kw_only=True)
class Lion(InnerOptimizer):
    """Adapts by Lion, which steps along the sign of an interpolation of the gradient and its running mean.

    Formula: phi <- phi - lr * (sign(b1 m + (1 - b1) g) + weight_decay * phi), then m <- b2 m + (1 - b2) g from zero.

    The formula is that of `optax.lion`. Its derivative is like that of `SignDescent`: what the gradients depend on is
    without effect.

    Source: Chen et al. 2023.

    Args:
        lr: See `InnerOptimizer`, as for `steps`.
        betas: (b1, b2), each >= 0 and < 1.
        weight_decay: >= 0, decoupled.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range.
    """

    is_linear: ClassVar[bool] = True
    is_deterministic: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True
    nonnegative: ClassVar[tuple[str, ...]] = ("weight_decay",)

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_betas("betas", self.betas)

    @property
    def buffers(self) -> int:
        """The running mean."""
        return 1

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        (phi, mean), (first, second) = state, self.betas
        direction = torch.lerp(gradient, mean, first)
        following = _signed(phi, direction, at, decays=not is_off(self.weight_decay))
        return following, torch.lerp(gradient, mean, second)


def _signed(phi: Tensor, direction: Tensor, at: Rates, *, decays: bool) -> Tensor:
    direction = direction.sign()
    return minus(phi, at["lr"], direction + at["weight_decay"] * phi if decays else direction)
