"""Models that are in another mode while the meta-gradient is computed than the problem says."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from imaml import Objective, Task
from tests.zoo.problems import IMPLICIT, MAML, Setup, dropout, running_batch_norm
from tests.zoo.right import Function, by_name, cg, flatten, gradient, hvp, states, unrolled
from tests.zoo.specimen import specimen


@specimen(
    MAML,
    running_batch_norm,
    story="A train() for the inner loop: statistics leak between tasks.",
    cause="running statistics",
)
def running_statistics_leak(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        loss, theta = flatten(objective)
        total = torch.zeros_like(theta)
        for task in tasks:
            objective.model.train()
            start = theta.clone().requires_grad_()
            phi = start
            for _ in range(s.steps):
                (g,) = torch.autograd.grad(loss(phi, task.support), phi, create_graph=True)
                phi = phi - s.lr * g
            objective.model.eval()
            total += torch.autograd.grad(loss(phi, task.query), start)[0] / len(list(tasks))
        return by_name(objective, total)

    return function


@specimen(MAML, dropout, story="A train() at the top of the loop, and masks drawn anew in each call.")
def dropout_left_on(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        objective.model.train()
        return unrolled(s)(objective, tasks)

    return function


@specimen(IMPLICIT, dropout, story="Each Hessian product of a solve sees another dropout mask.")
def dropout_redrawn_in_the_solve(s: Setup) -> Function:
    def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
        loss, theta = flatten(objective)
        parts = []
        for task in tasks:
            objective.model.eval()
            phi = states(loss, theta, task.support, s)[-1]
            v = gradient(loss, phi, task.query)
            objective.model.train()
            parts.append(cg(lambda w, phi=phi, task=task: w + hvp(loss, phi, task.support, w) / s.lam, v, steps=5))
        return by_name(objective, torch.stack(parts).mean(0))

    return function
