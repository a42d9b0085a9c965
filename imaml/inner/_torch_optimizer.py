"""Any optimiser of `torch.optim` as an inner solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml.inner._base import InnerSolver
from imaml.inner._inner_problem import InnerProblem


@dataclass(frozen=True, kw_only=True, init=False)
class TorchOptimizer(InnerSolver):
    """Adapts by any optimiser of `torch.optim`, for strategies that need the result alone.

    For example `TorchOptimizer(torch.optim.LBFGS, steps=10, lr=1.0, line_search_fn="strong_wolfe")`. The inner
    objective is the support loss with the proximal term.

    Tasks run one by one, each with an optimiser of its own that sees the parameters in their shapes, in at least
    float32.

    Not for `MAML`, which differentiates the steps: use an `InnerOptimizer`.

    Args:
        optimizer: The class.
        steps: Calls of its `step` with a closure; LBFGS takes up to `max_iter` iterations in each.
        options: Its keyword arguments, as a dictionary or spelt out.

    Raises:
        TypeError: `optimizer` is no optimiser class, or does not know an option.
        ValueError: An option out of range.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    options: Mapping[str, Any]

    def __init__(
        self,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        steps: int,
        options: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        options = dict(options or {}) | more
        for name, value in (("optimizer", optimizer), ("steps", steps), ("options", options)):
            object.__setattr__(self, name, value)
        if not callable(optimizer):
            raise TypeError(f"`optimizer` must be a class such as torch.optim.LBFGS. Got {optimizer!r}.")
        made = optimizer([torch.zeros(1, 1, requires_grad=True)], **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"`optimizer` must make a torch.optim.Optimizer. Got {type(made).__name__}.")
        self.__post_init__()

    def run(self, problem: InnerProblem) -> Tensor:
        """See `InnerSolver`."""
        return problem.one_by_one(self._run_one)

    def _run_one(self, problem: InnerProblem) -> Tensor:
        layout = problem.layout
        parts = problem.phi_0.squeeze(0).split(layout.sizes)
        leaves = [p.view(s).clone().requires_grad_() for p, s in zip(parts, layout.shapes, strict=True)]
        optimizer = self.optimizer(leaves, **self.options)

        def phi() -> Tensor:
            return torch.cat([leaf.detach().reshape(-1) for leaf in leaves]).unsqueeze(0)

        @torch.no_grad()
        def closure(step: int) -> float:
            value, gradient = problem.value_and_gradient(phi(), step)
            for leaf, part in zip(leaves, gradient.squeeze(0).split(layout.sizes), strict=True):
                leaf.grad = part.view(leaf.shape).clone()
            return value.item()

        for step in range(self.steps):
            optimizer.step(lambda step=step: closure(step))  # type: ignore[misc]
        return phi()
