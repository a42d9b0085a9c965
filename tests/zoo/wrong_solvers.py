"""Implicit meta-gradients of the right system, solved wrongly."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from imaml import Task
from tests.zoo.problems import IMPLICIT, Setup, mlp, one_parameter, one_shot
from tests.zoo.right import Loss, Make, cg, gradient, hvp, mean_over_tasks, states
from tests.zoo.specimen import specimen

Solve = Callable[[Callable[[Tensor], Tensor], Tensor, float], Tensor]


def solved_by(solve: Solve) -> Make:
    """The implicit meta-gradient by `solve(hv, b, lam)`, which should return x with x + H x / lam = b."""

    def of_task(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
        phi = states(loss, theta, task.support, s)[-1]
        return solve(lambda w: hvp(loss, phi, task.support, w), gradient(loss, phi, task.query), s.lam)

    of_task.__name__ = solve.__name__
    return mean_over_tasks(of_task)


@specimen(IMPLICIT, mlp, story="Published CG scales the curvature in its step size, and not in its residual.")
@solved_by
def cg_residual_unscaled(hv: Callable[[Tensor], Tensor], b: Tensor, lam: float) -> Tensor:
    x, r = torch.zeros_like(b), b
    p = r
    for _ in range(5):
        hp = hv(p)
        alpha = (r @ r) / (p @ (p + hp / lam))
        x, old, r = x + alpha * p, r, r - alpha * (p + hp)
        p = r + (r @ r) / (old @ old) * p
    return x


@specimen(IMPLICIT, mlp, story="Published CG builds the next direction from the residual before the update.")
@solved_by
def cg_direction_from_the_old_residual(hv: Callable[[Tensor], Tensor], b: Tensor, lam: float) -> Tensor:
    x, r = torch.zeros_like(b), b
    p = r
    for _ in range(5):
        ap = p + hv(p) / lam
        alpha = (r @ r) / (p @ ap)
        x, old, r = x + alpha * p, r, r - alpha * ap
        p = old + (r @ r) / (old @ old) * p
    return x


@specimen(
    IMPLICIT,
    one_shot,
    story="Loops that test convergence before they store the iterate return the one before.",
    cause="unconverged solve",
)
@solved_by
def cg_previous_iterate(hv: Callable[[Tensor], Tensor], b: Tensor, lam: float) -> Tensor:
    x, r = torch.zeros_like(b), b
    p = r
    while True:
        ap = p + hv(p) / lam
        alpha = (r @ r) / (p @ ap)
        old, r = r, r - alpha * ap
        if r.norm() <= 1e-10 * b.norm():
            return x
        x = x + alpha * p
        p = r + (r @ r) / (old @ old) * p


@specimen(
    IMPLICIT,
    one_parameter,
    story="A default number of steps computed from the size, which is 0 for size 1.",
    cause="zero",
)
@solved_by
def cg_without_steps_for_size_one(hv: Callable[[Tensor], Tensor], b: Tensor, lam: float) -> Tensor:
    return cg(lambda w: w + hv(w) / lam, b, steps=10 * (len(b) // 2))


@specimen(IMPLICIT, mlp, story="A budget of CG steps far below what the spectrum asks for.", cause="unconverged solve")
@solved_by
def cg_stopped_after_one_step(hv: Callable[[Tensor], Tensor], b: Tensor, lam: float) -> Tensor:
    return cg(lambda w: w + hv(w) / lam, b, steps=1)


@specimen(IMPLICIT, mlp, story="Neumann series with a fixed small step, cut after a few terms.")
@solved_by
def neumann_with_a_tiny_step(hv: Callable[[Tensor], Tensor], b: Tensor, lam: float, step: float = 0.05) -> Tensor:
    term = b
    x = step * term
    for _ in range(5):
        term = term - step * (term + hv(term) / lam)
        x = x + step * term
    return x
