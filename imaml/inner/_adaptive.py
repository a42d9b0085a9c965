"""Optimisers that divide by a running root mean square of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml._numbers import check_number
from imaml.inner._base import InnerOptimizer
from imaml.inner._hyper import Hyper, is_off
from imaml.inner._inner_problem import State
from imaml.inner._rates import Rates


def safe_sqrt(v: Tensor) -> Tensor:
    """The square root, with derivative 0 instead of infinity at 0."""
    positive = v > 0
    return torch.where(positive, v, 1).sqrt() * positive


def moments(
    mean: Tensor, square: Tensor, gradient: Tensor, step: int, betas: tuple[float, float], eps: float, eps_root: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's m and v after a step that is counted from 0, and sqrt(v' + eps_root) + eps."""
    first, second = betas
    mean = torch.lerp(mean, gradient, 1 - first)
    square = second * square + (1 - second) * gradient.square()
    return mean, square, safe_sqrt(square / (1 - second ** (step + 1)) + eps_root) + eps


def check_fraction(name: str, value: float) -> None:
    """Raise unless this is the decay rate of a running mean."""
    if not 0 <= check_number(name, value) < 1:
        raise ValueError(f"{name} must be >= 0 and < 1. Got {value}.")


def check_betas(name: str, betas: object) -> None:
    """Raise unless these are two decay rates of running means."""
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"`{name}` must be two numbers. Got {betas}.")
    for beta in betas:
        check_fraction(f"Each of `{name}`", beta)


def check_eps(eps: float, root: float = 0.0) -> None:
    """Raise unless what is added to a divisor is positive, and what is added within its square root not negative."""
    if check_number("`eps`", eps) <= 0:
        raise ValueError(f"`eps` must be positive, or a gradient of zero divides by zero. Got {eps}.")
    if check_number("`eps_root`", root) < 0:
        raise ValueError(f"`eps_root` must be >= 0. Got {root}.")


@dataclass(frozen=True, kw_only=True)
class Adam(InnerOptimizer):
    r"""Adapts by Adam, whose steps are scaled by running moments of the gradient.

    Formula: $\phi \leftarrow \phi - lr \, \hat m / (\sqrt{\hat v + eps\_root} + eps)$. With $h = g + weight\_decay \,
    \phi$: $m \leftarrow b_1 m + (1 - b_1) h$ and $v \leftarrow b_2 v + (1 - b_2) h^2$ from zero, $\hat m = m / (1 -
    b_1^k)$ and $\hat v = v / (1 - b_2^k)$ at step $k = 1, 2, ...$

    Equal to `torch.optim.Adam` with `eps_root=0`; with another the formula is that of `optax.adam`.

    The update is steep at small gradients: its derivative by a gradient near zero is lr / (sqrt(eps_root) + eps) at the
    first step. It is finite at zero itself. With eps = 1e-8 alone the rounding errors of float32 are multiplied by so
    much, step after step, that little may be left of the meta-gradient of a long training. An eps_root of 1e-9 hardly
    changes the training, and bounds that.

    Source: Kingma & Ba 2015.

    Args:
        lr: See `InnerOptimizer`, as for `steps`.
        betas: (b1, b2), each >= 0 and < 1.
        eps: > 0.
        eps_root: >= 0; bounds the derivative, in long trainings and in float32.
        weight_decay: >= 0.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range.
    """

    is_deterministic: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True
    nonnegative: ClassVar[tuple[str, ...]] = ("weight_decay",)

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    eps_root: float = 0.0
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_betas("betas", self.betas)
        check_eps(self.eps, self.eps_root)

    @property
    def buffers(self) -> int:
        """M and v."""
        return 2

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        if not is_off(self.weight_decay):
            gradient = gradient + at["weight_decay"] * state[0]
        return self._descend(state, gradient, step, at)

    def _descend(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        phi, mean, square = state
        mean, square, root = moments(mean, square, gradient, step, self.betas, self.eps, self.eps_root)
        return phi - at["lr"] / (1 - self.betas[0] ** (step + 1)) * mean / root, mean, square


@dataclass(frozen=True, kw_only=True)
class AdamW(Adam):
    """Adapts by Adam with decoupled weight decay.

    Formula: phi <- phi - lr * weight_decay * phi, then the step of `Adam`.

    Equal to `torch.optim.AdamW`, whose weight decay of 0.01 it has.

    Source: Loshchilov & Hutter 2019.

    Args:
        lr: See `InnerOptimizer`, as for `steps`.
        betas: See `Adam`.
        eps: See `Adam`.
        eps_root: See `Adam`.
        weight_decay: >= 0.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range.
    """

    is_deterministic: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True

    weight_decay: Hyper = 0.01

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        phi, *moments = state
        return self._descend((phi - at["lr"] * at["weight_decay"] * phi, *moments), gradient, step, at)


@dataclass(frozen=True, kw_only=True)
class RMSprop(InnerOptimizer):
    """Adapts by RMSprop, whose steps are divided by a running root mean square of the gradient.

    Formula: phi <- phi - lr * d with d = h / (sqrt(v + eps_root) + eps). With h = g + weight_decay * phi: v <-
    alpha v + (1 - alpha) h^2 from zero. With momentum mu the step is along the buffer b <- mu b + d.

    Equal to `torch.optim.RMSprop` with `eps_root=0`, not centred.

    Source: Hinton 2012.

    Args:
        lr: See `InnerOptimizer`, as for `steps`.
        alpha: >= 0 and < 1.
        eps: > 0.
        eps_root: >= 0, see `Adam`.
        momentum: mu >= 0.
        weight_decay: >= 0.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range.
    """

    is_deterministic: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True
    nonnegative: ClassVar[tuple[str, ...]] = ("momentum", "weight_decay")

    alpha: float = 0.99
    eps: float = 1e-8
    eps_root: float = 0.0
    momentum: Hyper = 0.0
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_fraction("`alpha`", self.alpha)
        check_eps(self.eps, self.eps_root)

    @property
    def buffers(self) -> int:
        """The mean square, and the momentum."""
        return 1 + (not is_off(self.momentum))

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        phi, square, *momentum = state
        if not is_off(self.weight_decay):
            gradient = gradient + at["weight_decay"] * phi
        square = self.alpha * square + (1 - self.alpha) * gradient.square()
        direction = gradient / (safe_sqrt(square + self.eps_root) + self.eps)
        if momentum:
            direction = at["momentum"] * momentum[0] + direction
            momentum = [direction]
        return phi - at["lr"] * direction, square, *momentum
