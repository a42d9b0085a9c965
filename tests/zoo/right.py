"""Plain meta-gradients that are right, in PyTorch alone; each specimen of the zoo is one of them with one thing wrong.

Every parameter adapts. A parameter vector is flat, `(n,)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from imaml import Objective, Task
from tests.zoo.problems import Setup

Loss = Callable[[Tensor, Any], Tensor]
Function = Callable[[Objective, Iterable[Task]], dict[str, Tensor]]
Make = Callable[[Setup], Function]
OfTask = Callable[[Loss, Tensor, Task, Setup], Tensor]


def by_name(objective: Objective, flat: Tensor) -> dict[str, Tensor]:
    params = objective.parameters()
    parts = flat.split([p.numel() for p in params.values()])
    return {n: part.view(p.shape) for (n, p), part in zip(params.items(), parts, strict=True)}


def flatten(objective: Objective) -> tuple[Loss, Tensor]:
    """The loss of flat parameters and a batch, and the parameters."""
    theta = torch.cat([p.detach().flatten() for p in objective.parameters().values()])
    return lambda phi, batch: objective.evaluate(by_name(objective, phi), batch)[0], theta


def mean_over_tasks(of_task: OfTask) -> Make:
    """From the meta-gradient of one task, `of_task(loss, theta, task, setup)`, to that of a batch."""

    @wraps(of_task)
    def make(setup: Setup) -> Function:
        def function(objective: Objective, tasks: Iterable[Task]) -> dict[str, Tensor]:
            loss, theta = flatten(objective)
            return by_name(objective, torch.stack([of_task(loss, theta, task, setup) for task in tasks]).mean(0))

        return function

    return make


def gradient(loss: Loss, phi: Tensor, batch: Any) -> Tensor:
    phi = phi.detach().requires_grad_()
    return torch.autograd.grad(loss(phi, batch), phi)[0]


def hvp(loss: Loss, phi: Tensor, batch: Any, w: Tensor) -> Tensor:
    """Hessian times w."""
    phi = phi.detach().requires_grad_()
    (g,) = torch.autograd.grad(loss(phi, batch), phi, create_graph=True)
    return torch.autograd.grad(g @ w, phi)[0]


def states(loss: Loss, theta: Tensor, support: Any, s: Setup) -> list[Tensor]:
    """All states of the inner loop, theta first."""
    visited = [theta]
    for _ in range(s.steps):
        phi = visited[-1]
        visited.append(phi - s.lr * (gradient(loss, phi, support) + s.lam * (phi - theta)))
    return visited


def cg(mv: Callable[[Tensor], Tensor], b: Tensor, steps: int = 50) -> Tensor:
    """Conjugate gradients for mv(x) = b."""
    x, r = torch.zeros_like(b), b
    p = r
    for _ in range(steps):
        if r.norm() <= 1e-13 * b.norm():
            break
        ap = mv(p)
        alpha = (r @ r) / (p @ ap)
        x, old, r = x + alpha * p, r, r - alpha * ap
        p = r + (r @ r) / (old @ old) * p
    return x


@mean_over_tasks
def unrolled(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    """MAML through the graph of the inner loop."""
    theta = theta.clone().requires_grad_()
    phi = theta
    for _ in range(s.steps):
        (g,) = torch.autograd.grad(loss(phi, task.support), phi, create_graph=True)
        phi = phi - s.lr * (g + s.lam * (phi - theta))
    return torch.autograd.grad(loss(phi, task.query), theta)[0]


@mean_over_tasks
def swept(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    """MAML without a proximal term, by the adjoint of its steps."""
    *visited, phi = states(loss, theta, task.support, s)
    a = gradient(loss, phi, task.query)
    for state in reversed(visited):
        a = a - s.lr * hvp(loss, state, task.support, a)
    return a


@mean_over_tasks
def implicit(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    """Implicit MAML by conjugate gradients."""
    phi = states(loss, theta, task.support, s)[-1]
    v = gradient(loss, phi, task.query)
    return cg(lambda w: w + hvp(loss, phi, task.support, w) / s.lam, v)


@mean_over_tasks
def dense_implicit(loss: Loss, theta: Tensor, task: Task, s: Setup) -> Tensor:
    """Implicit MAML by a dense Hessian."""
    phi = states(loss, theta, task.support, s)[-1]
    h = torch.autograd.functional.hessian(lambda x: loss(x, task.support), phi)
    return torch.linalg.solve(torch.eye(len(phi)).to(h) + h / s.lam, gradient(loss, phi, task.query))
