"""Muon: steps along matrices with orthogonal rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from imaml._numbers import check_integer, check_number
from imaml._objective.select import select
from imaml.inner._adaptive import check_betas, check_eps, moments
from imaml.inner._base import InnerOptimizer
from imaml.inner._hyper import Hyper
from imaml.inner._inner_problem import State
from imaml.inner._rates import Rates

AdjustLR = Literal["original", "match_rms_adamw"]


@dataclass(frozen=True, kw_only=True)
class Muon(InnerOptimizer):
    """Adapts matrices by Muon, along a momentum whose singular values are brought near 1, and the rest by AdamW.

    Formula: m <- mu m + (1 - mu) g from zero, o = NS(mu m + (1 - mu) g), or NS(m) without Nesterov's momentum, then
    X <- X - lr * weight_decay * X - lr * s * o. NS divides a matrix by its norm, and applies the polynomial X <- a X +
    b (X X') X + c (X X')^2 X to it `ns_steps` times. For a matrix `(p, q)` s = sqrt(max(1, p / q)), or 0.2 sqrt(max(p,
    q)) with `adjust_lr_fn="match_rms_adamw"`.

    Parameters of one, three or more dimensions, and those that `others` names, adapt as by `AdamW`.

    Equal to `torch.optim.Muon`, but in the dtype of the inner state: torch's iterates in bfloat16.

    Source: Jordan et al. 2024; Liu et al. 2025, for the other scale.

    Args:
        lr: See `InnerOptimizer`, as for `steps`; of the matrices.
        momentum: mu >= 0.
        nesterov: Look ahead along the momentum.
        weight_decay: >= 0, of the matrices.
        ns_steps: Number of iterations.
        ns_coefficients: (a, b, c).
        eps: > 0, the least norm that a matrix is divided by.
        adjust_lr_fn: How a step is scaled by the shape of a matrix: "original" or "match_rms_adamw".
        others: Matrices that adapt by AdamW too, such as embeddings and the head: names of parameters or modules, or
            patterns such as `["*embedding*"]`.
        adamw_lr: As `lr`, of the parameters that adapt by AdamW.
        adamw_betas: See `Adam`, likewise.
        adamw_eps: See `Adam`.
        adamw_eps_root: See `Adam`.
        adamw_weight_decay: >= 0.

    Raises:
        TypeError: See `InnerOptimizer`.
        ValueError: A number out of range, or, when it runs, a name in `others` that no adapted parameter has.
    """

    is_deterministic: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("lr", "adamw_lr")
    nonnegative: ClassVar[tuple[str, ...]] = ("momentum", "weight_decay", "adamw_weight_decay")

    momentum: Hyper = 0.95
    nesterov: bool = True
    weight_decay: Hyper = 0.1
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    adjust_lr_fn: AdjustLR = "original"
    others: Sequence[str] = ()
    adamw_lr: Hyper = 3e-4
    adamw_betas: tuple[float, float] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    adamw_eps_root: float = 0.0
    adamw_weight_decay: Hyper = 0.01

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_integer("`ns_steps`", self.ns_steps, least=0)
        if not isinstance(self.ns_coefficients, (tuple, list)) or len(self.ns_coefficients) != 3:
            raise ValueError(f"`ns_coefficients` must be three numbers. Got {self.ns_coefficients}.")
        for number in self.ns_coefficients:
            check_number("Each of `ns_coefficients`", number)
        check_eps(self.eps)
        if self.adjust_lr_fn not in get_args(AdjustLR):
            raise ValueError(
                f"`adjust_lr_fn` must be one of {', '.join(get_args(AdjustLR))}. Got {self.adjust_lr_fn!r}."
            )
        if isinstance(self.others, str):
            raise TypeError(
                f"`others` must be a list of names. Got the string {self.others!r}: write [{self.others!r}]."
            )
        check_betas("adamw_betas", self.adamw_betas)
        check_eps(self.adamw_eps, self.adamw_eps_root)

    @property
    def buffers(self) -> int:
        """The momentum, and the second moment of the parameters that adapt by AdamW."""
        return 2

    def update(self, state: State, gradient: Tensor, step: int, at: Rates) -> State:
        """See the class."""
        phi, mean, square = (at.views(part) for part in state)
        gradients, names = at.views(gradient), (*self.positive, *self.nonnegative)
        rates = {name: at.views(at[name]) for name in names}
        others = select(self.others, phi)
        following = {}
        for name, x in phi.items():
            own = {rate: values[name] for rate, values in rates.items()}
            part = (x, mean[name], square[name])
            if x.ndim == 3 and name not in others:
                following[name] = self._of_matrix(part, gradients[name], own)
            else:
                following[name] = self._of_other(part, gradients[name], step, own)
        return tuple(at.flat({name: parts[i] for name, parts in following.items()}) for i in range(3))

    def _of_matrix(self, state: State, gradient: Tensor, at: dict[str, Any]) -> State:
        x, mean, square = state
        lr, mu = at["lr"], at["momentum"]
        mean = mu * mean + (1 - mu) * gradient
        direction = mu * mean + (1 - mu) * gradient if self.nesterov else mean
        rows, columns = x.shape[-2:]
        scale = max(1, rows / columns) ** 0.5 if self.adjust_lr_fn == "original" else 0.2 * max(rows, columns) ** 0.5
        return (1 - lr * at["weight_decay"]) * x - lr * scale * self._orthogonal(direction), mean, square

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """Matrices `(tasks, p, q)` with singular values near 1, or zero, and the same singular vectors."""
        if matrix.shape[-2] > matrix.shape[-1]:
            return self._orthogonal(matrix.mT).mT
        a, b, c = self.ns_coefficients
        norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True)
        x = matrix / norm.clamp(min=self.eps)
        for _ in range(self.ns_steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    def _of_other(self, state: State, gradient: Tensor, step: int, at: dict[str, Any]) -> State:
        x, mean, square = state
        lr, betas = at["adamw_lr"], self.adamw_betas
        mean, square, root = moments(mean, square, gradient, step, betas, self.adamw_eps, self.adamw_eps_root)
        x = (1 - lr * at["adamw_weight_decay"]) * x
        return x - lr / (1 - betas[0] ** (step + 1)) * mean / root, mean, square
