"""Optimisers whose steps have a length of their own, whatever that of the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imaml.inner._adaptive import Adam, check_eps, moments
from imaml.inner._base import InnerOptimizer
from imaml.inner._hyper import Hyper, is_off
from imaml.inner._inner_problem import State
from imaml.inner._rates import Rates


@dataclass(frozen=True, kw_only=True)
class NormalizedDescent(InnerOptimizer):
    """Adapts by steps of one length, along the gradient of all parameters together.

    Formula: phi <- phi - lr * m / (|m| + eps) with m <- mu m + (1 - mu) g from zero for momentum mu, and the norm over
    all entries of a task. Known as normalised gradient descent.

    Source: Hazan et al. 2015; Cutkosky & Mehta 2020, for the momentum.

    Args:
        lr: See `InnerOptimizer`, as for `steps`: the length of a step.
        momentum: mu >= 0.
        eps: > 0.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range.
    """

    is_deterministic: ClassVar[bool] = True
    nonnegative: ClassVar[tuple[str, ...]] = ("momentum",)

    momentum: Hyper = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_eps(self.eps)

    @property
    def buffers(self) -> int:
        """The momentum."""
        return int(not is_off(self.momentum))

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        phi, *means = state
        if means:
            means = [at["momentum"] * means[0] + (1 - at["momentum"]) * gradient]
        direction = means[0] if means else gradient
        norm = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        return phi - at["lr"] * direction / (norm + self.eps), *means


@dataclass(frozen=True, kw_only=True)
class LAMB(Adam):
    r"""Adapts by LAMB: the step of Adam in every parameter, as long as the parameter is.

    Formula: for each parameter $x$, $x \leftarrow x - lr \, (|x| / |u|) \, u$ with $u = \hat m / (\sqrt{\hat v +
    eps\_root} + eps) + weight\_decay \, x$, where $\hat m$ and $\hat v$ are the moments of `Adam`. Where $|x|$ or $|u|$
    is zero, their ratio is taken to be 1.

    The formula is that of `optax.lamb`.

    Source: You et al. 2020, without bounds of |x|.

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

    eps: float = 1e-6

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        phi, mean, square = state
        mean, square, root = moments(mean, square, gradient, step, self.betas, self.eps, self.eps_root)
        direction = mean / (1 - self.betas[0] ** (step + 1)) / root
        if not is_off(self.weight_decay):
            direction = direction + at["weight_decay"] * phi
        parts, directions, lr = (at.views(flat) for flat in (phi, direction, at["lr"]))
        following = {n: x - lr[n] * _trust(x, directions[n]) * directions[n] for n, x in parts.items()}
        return at.flat(following), mean, square


def _trust(parameter: Tensor, direction: Tensor) -> Tensor:
    """|x| / |u|, `(tasks, 1, ...)`; 1 where either is zero, with derivative 0."""
    x, u = (torch.linalg.vector_norm(t.reshape(len(t), -1), dim=-1) for t in (parameter, direction))
    both = (x > 0) & (u > 0)
    ratio = torch.where(both, x, 1.0) / torch.where(both, u, 1.0)
    return ratio.view(-1, *(1,) * (parameter.ndim - 1))
