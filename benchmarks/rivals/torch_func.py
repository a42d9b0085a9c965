"""The recipe of the torch.func tutorials: `grad` within `grad`, and `vmap` over tasks at one of two places.

Inside the outer derivative, `grad(mean(vmap(task)))`, is what the tutorials show; it stands between the two derivatives
and is wrong for affine normalisation layers. Outside, `vmap(grad(task))`, is right.
"""

from __future__ import annotations

from torch import Tensor
from torch.func import grad, vmap

from benchmarks.rivals import Call
from benchmarks.workloads import Batch, Problem

Named = dict[str, Tensor]


def _adapted_loss(problem: Problem, theta: Named, support: Batch, query: Batch) -> Tensor:
    phi = theta
    for _ in range(problem.steps):
        gradients = grad(problem.loss_at)(phi, support)
        phi = {n: p - problem.lr * gradients[n] for n, p in phi.items()}
    return problem.loss_at(phi, query)


def vmap_inside(problem: Problem) -> Call:
    theta = {n: p.detach() for n, p in problem.parameters.items()}

    def mean_loss(theta: Named) -> Tensor:
        def task(support: Batch, query: Batch) -> Tensor:
            return _adapted_loss(problem, theta, support, query)

        return vmap(task)(problem.tasks.support, problem.tasks.query).mean()

    return lambda: list(grad(mean_loss)(theta).values())


def vmap_outside(problem: Problem) -> Call:
    theta = {n: p.detach() for n, p in problem.parameters.items()}

    def task(support: Batch, query: Batch) -> Named:
        return grad(lambda theta: _adapted_loss(problem, theta, support, query))(theta)

    return lambda: [g.mean(0) for g in vmap(task)(problem.tasks.support, problem.tasks.query).values()]
