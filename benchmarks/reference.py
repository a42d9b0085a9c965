"""What each family of methods should return: plain autograd, task by task, to be run in float64."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from benchmarks.rivals import METHODS, mean_over_tasks
from benchmarks.workloads import Family, Problem
from imaml import Task


def reference(problem: Problem, family: Family) -> Tensor:
    """The meta-gradient as one flat vector.

    "exact" differentiates the whole inner loop; "first-order" is the query gradient v after it; "implicit" is
    `solver_steps` of plain conjugate gradients on (I + H / lambda) x = v, after an inner loop with the proximal term.
    """
    if family == "exact":
        return flat(METHODS["create_graph loop"].prepare(problem)())
    damping = problem.regularization if family == "implicit" else 0.0

    def one(task: Task) -> tuple[Tensor, ...]:
        start = [p.detach() for p in problem.parameters.values()]
        phi = [p.clone().requires_grad_() for p in start]
        for _ in range(problem.steps):
            grads = torch.autograd.grad(_loss(problem, phi, task.support), phi)
            moved = zip(phi, grads, start, strict=True)
            phi = [(p - problem.lr * (g + damping * (p - s))).detach().requires_grad_() for p, g, s in moved]
        v = torch.autograd.grad(_loss(problem, phi, task.query), phi)
        return v if family == "first-order" else _solve(problem, phi, task, v)

    return flat(mean_over_tasks(problem, one))


def _solve(problem: Problem, phi: list[Tensor], task: Task, v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    gradient = torch.autograd.grad(_loss(problem, phi, task.support), phi, create_graph=True)
    residual = flat(v)
    x, direction = torch.zeros_like(residual), residual.clone()
    for _ in range(problem.solver_steps):
        parts = [part.view_as(p) for part, p in zip(direction.split([p.numel() for p in phi]), phi, strict=True)]
        product = flat(torch.autograd.grad(gradient, phi, parts, retain_graph=True)) / problem.regularization
        product = product + direction
        before = residual @ residual
        step = before / (direction @ product)
        x, residual = x + step * direction, residual - step * product
        direction = residual + (residual @ residual) / before * direction
    return (x,)


def _loss(problem: Problem, phi: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return problem.loss_at(dict(zip(problem.parameters, phi, strict=True)), batch)


def flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def support_gradients(problem: Problem, *, math: bool = False) -> list[Tensor]:
    """One plain support gradient of every task at the start, the unit of *gradient-equivalents*.

    Attention runs on torch's own choice of kernel, or on its math backend, which second derivatives need.
    """
    values = list(problem.model.parameters())

    def one(task: Task) -> tuple[Tensor, ...]:
        inputs, targets = task.support
        with problem.kernels() if math else nullcontext():
            return torch.autograd.grad(problem.criterion(problem.model(inputs), targets), values)

    return mean_over_tasks(problem, one)


def support_products(problem: Problem) -> list[Tensor]:
    """One plain Hessian-vector product of every task at the start, by reverse over reverse."""
    values = list(problem.model.parameters())

    def one(task: Task) -> tuple[Tensor, ...]:
        gradients = torch.autograd.grad(problem.loss(problem.model, task.support), values, create_graph=True)
        return torch.autograd.grad(gradients, values, [torch.ones_like(g) for g in gradients])

    return mean_over_tasks(problem, one)
