"""higher: a patched model and a differentiable optimiser."""

from __future__ import annotations

import higher
import torch
from torch import Tensor

from benchmarks.rivals import Call, mean_over_tasks
from benchmarks.workloads import Problem
from imaml import Task


def prepare(problem: Problem) -> Call:
    model = problem.model
    sgd = torch.optim.SGD(model.parameters(), lr=problem.lr)

    def one(task: Task) -> tuple[Tensor, ...]:
        with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (adapted, optimizer):
            for _ in range(problem.steps):
                optimizer.step(problem.loss(adapted, task.support))
            return torch.autograd.grad(problem.loss(adapted, task.query), list(model.parameters()))

    return lambda: mean_over_tasks(problem, one)
