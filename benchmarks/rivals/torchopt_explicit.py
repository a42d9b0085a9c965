"""TorchOpt's explicit gradients: a differentiable optimiser that rewrites the model, rolled back after every task."""

from __future__ import annotations

import torch
import torchopt
from torch import Tensor

from benchmarks.rivals import Call, mean_over_tasks
from benchmarks.workloads import Problem
from imaml import Task


def prepare(problem: Problem) -> Call:
    model = problem.model
    theta = list(model.parameters())
    optimizer = torchopt.MetaSGD(model, lr=problem.lr)
    start = torchopt.extract_state_dict(model), torchopt.extract_state_dict(optimizer)

    def one(task: Task) -> tuple[Tensor, ...]:
        for _ in range(problem.steps):
            optimizer.step(problem.loss(model, task.support))
        found = torch.autograd.grad(problem.loss(model, task.query), theta)
        torchopt.recover_state_dict(model, start[0])
        torchopt.recover_state_dict(optimizer, start[1])
        return found

    return lambda: mean_over_tasks(problem, one)
