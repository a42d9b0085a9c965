"""The loop that everyone writes first: one autograd graph of the whole inner loop, task by task."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.rivals import Call, mean_over_tasks
from benchmarks.workloads import Problem
from imaml import Task


def prepare(problem: Problem) -> Call:
    theta = problem.parameters

    def one(task: Task) -> tuple[Tensor, ...]:
        phi = theta
        for _ in range(problem.steps):
            grads = torch.autograd.grad(problem.loss_at(phi, task.support), list(phi.values()), create_graph=True)
            phi = {n: p - problem.lr * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        return torch.autograd.grad(problem.loss_at(phi, task.query), list(theta.values()))

    return lambda: mean_over_tasks(problem, one)
