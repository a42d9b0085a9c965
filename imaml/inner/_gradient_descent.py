"""Gradient descent, with momentum or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml.inner._base import InnerOptimizer
from imaml.inner._hyper import Hyper, is_off
from imaml.inner._inner_problem import State
from imaml.inner._rates import Rates


@dataclass(frozen=True, kw_only=True)
class GradientDescent(InnerOptimizer):
    r"""Adapts by gradient descent, with momentum or without, from phi = theta.

    Formula: $\phi \leftarrow \phi - lr \, d$, `steps` times. With $h = g + weight\_decay \, \phi$ the direction $d$ is
    $h$; with momentum $\mu$ it is the buffer $b \leftarrow \mu b + h$, which starts at zero, or with Nesterov's $h +
    \mu b$.

    Equal to `torch.optim.SGD` without dampening.

    Source: Sutskever et al. 2013, for Nesterov's momentum.

    Args:
        lr: See `InnerOptimizer`, as for `steps`.
        momentum: mu >= 0.
        nesterov: Look ahead along the buffer.
        weight_decay: >= 0.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range, or `nesterov` without momentum.
    """

    is_linear: ClassVar[bool] = True
    is_deterministic: ClassVar[bool] = True
    is_elementwise: ClassVar[bool] = True
    nonnegative: ClassVar[tuple[str, ...]] = ("momentum", "weight_decay")

    momentum: Hyper = 0.0
    nesterov: bool = False
    weight_decay: Hyper = 0.0

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        if self.nesterov and not self._has_momentum:
            raise ValueError("nesterov=True needs `momentum` > 0. Got momentum=0.")

    @property
    def _has_momentum(self) -> bool:
        return not is_off(self.momentum)

    @property
    def buffers(self) -> int:
        """The momentum."""
        return int(self._has_momentum)

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        phi, direction = state[0], gradient
        if not is_off(self.weight_decay):
            direction = direction + at["weight_decay"] * phi
        if not self._has_momentum:
            return (minus(phi, at["lr"], direction),)
        buffer = at["momentum"] * state[1] + direction
        direction = direction + at["momentum"] * buffer if self.nesterov else buffer
        return minus(phi, at["lr"], direction), buffer

    def pullback(
        self, state: State, gradient: Tensor, cotangents: State, step: int, at: Rates, learned: frozenset[str]
    ) -> tuple[State, Tensor, dict[str, Tensor]]:
        """See `InnerOptimizer`; written out for the plain step, (a, -lr a) for a cotangent a."""
        if self._has_momentum or not is_off(self.weight_decay) or "lr" in learned:
            return super().pullback(state, gradient, cotangents, step, at, learned)
        return cotangents, -at["lr"] * cotangents[0], {}


def minus(phi: Tensor, lr: float | Tensor, direction: Tensor) -> Tensor:
    """Phi - lr * direction, without a vector in between."""
    if isinstance(lr, Tensor):
        return torch.addcmul(phi, lr, direction, value=-1)
    return torch.sub(phi, direction, alpha=lr)
