"""Newton's method with a matrix-free solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml._curvature.product import HvpMode, check_mode
from imaml._numbers import check_number
from imaml.inner._base import InnerSolver
from imaml.inner._inner_problem import InnerProblem, Quadratic
from imaml_solvers import CG, LinearSolver

_SUFFICIENT, _HALVINGS, _ROUNDINGS = 1e-4, 30, 100


@dataclass(frozen=True, kw_only=True)
class NewtonCG(InnerSolver):
    r"""Adapts by Newton's method with conjugate gradients, for strategies that need the result alone.

    Formula: $\phi \leftarrow \phi + t d$ with $(H + \Lambda) d = -g$. $t$ is the largest of 1, 1/2, 1/4, ... that
    decreases the inner objective by $10^{-4} \, t \, |g^\top d|$ (Armijo). Where CG meets a direction of negative
    curvature $d$ is what it had before, or $-g$. All tasks of a chunk run at once, each with its own $t$.

    A task stops once |g| <= `stationarity`, where no t decreases its objective, or where a step whose decrease is lost
    in rounding does not decrease |g| either.

    Cost per step and task: one gradient, the solver's Hessian-vector products, one forward pass for each t tried.

    Not for minima on a kink (ReLU, max pooling), which are not found: see `report.stationarity`.

    Source: Nocedal & Wright, ch. 7; the Hessian-free inner solver of Rajeswaran et al. 2019.

    Args:
        steps: The most steps.
        solver: For d. A rough solve far from the minimum costs little: few steps of CG with rtol = 0.1 or so.
        stationarity: See above, >= 0.
        hvp: See `MAML`.

    Raises:
        TypeError: A wrong type.
        ValueError: A number out of range.
    """

    solver: LinearSolver = CG(max_steps=20, rtol=0.01)
    stationarity: float = 0.0
    hvp: HvpMode = "auto"

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_mode(self.hvp)
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(f"`solver` must be a LinearSolver such as CG(max_steps=20). Got {self.solver!r}.")
        if check_number("`stationarity`", self.stationarity) < 0:
            raise ValueError(f"`stationarity` must be >= 0. Got {self.stationarity}.")

    def run(self, problem: InnerProblem) -> Tensor:
        """See `InnerSolver`."""
        phi = before = problem.phi_0
        moving = torch.ones_like(phi[:, :1], dtype=torch.bool)
        unchecked, size_before = torch.zeros_like(moving), torch.full_like(phi[:, :1], torch.inf)
        for step in range(self.steps):
            at = problem.quadratic(phi, step, self.hvp)
            value, gradient = at.value, at.gradient
            size = gradient.norm(dim=-1, keepdim=True)
            in_vain = unchecked & (size >= size_before)
            phi = torch.where(in_vain, before, phi)
            moving = moving & ~in_vain & (size > self.stationarity)
            if not moving.any():
                break
            problem.stopped = ~moving.squeeze(-1)
            direction = self._direction(at)
            del at  # the graph of the gradient hangs on it
            length, unchecked = _line_search(problem, phi, step, direction, value, _dot(gradient, direction))
            moving = moving & (length > 0)
            unchecked, before, size_before = unchecked & moving, phi, size
            phi = torch.where(moving, phi + length * direction, phi)
        return phi

    def _direction(self, at: Quadratic) -> Tensor:
        direction = self.solver.solve(at.hessian, -at.gradient).x
        descends = _dot(at.gradient, direction) < 0
        return torch.where(descends.unsqueeze(-1), direction, -at.gradient)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _line_search(
    problem: InnerProblem, phi: Tensor, step: int, direction: Tensor, before: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest length that decreases each task's objective.

    Returns:
        The lengths `(tasks, 1)`, 0 where none does; and whether one is 1 unchecked, since the decrease is lost in
        rounding.
    """
    unchecked = slope.abs() <= _ROUNDINGS * torch.finfo(before.dtype).eps * before.abs()
    length, accepted = torch.ones_like(before), unchecked
    for _ in range(_HALVINGS):
        if accepted.all():
            break
        value = problem.value(phi + length.unsqueeze(-1) * direction, step)
        accepted = accepted | (value <= before + _SUFFICIENT * length * slope) & (value < before)
        length = torch.where(accepted, length, length / 2)
    return torch.where(accepted, length, 0).unsqueeze(-1), unchecked.unsqueeze(-1)
