"""TorchOpt's implicit gradients: a module that knows its objective, and conjugate gradients in its backward pass."""

from __future__ import annotations

import copy

import torch
import torchopt
from torch import Tensor, nn

from benchmarks.rivals import Call, mean_over_tasks
from benchmarks.workloads import Batch, Problem
from imaml import Task


def prepare(problem: Problem) -> Call:
    solve_cg = torchopt.linear_solve.solve_cg(maxiter=problem.solver_steps, rtol=0.0)

    class Adapted(torchopt.nn.ImplicitMetaGradientModule, linear_solve=solve_cg):
        def __init__(self, start: nn.Module) -> None:
            super().__init__()
            self.start = start  # the meta-parameters
            self.model = copy.deepcopy(start)

        def objective(self, batch: Batch) -> Tensor:
            pairs = zip(self.model.parameters(), self.start.parameters(), strict=True)
            proximal = sum((p - q).square().sum() for p, q in pairs)
            return problem.loss(self.model, batch) + problem.regularization / 2 * proximal

        def solve(self, batch: Batch) -> None:
            values = list(self.model.parameters())
            sgd = torch.optim.SGD(values, lr=problem.lr)
            with torch.enable_grad():
                for _ in range(problem.steps):
                    sgd.zero_grad()
                    self.objective(batch).backward(inputs=values)
                    sgd.step()

    def one(task: Task) -> tuple[Tensor, ...]:
        adapted = Adapted(problem.model)
        adapted.solve(task.support)
        return torch.autograd.grad(problem.loss(adapted.model, task.query), list(problem.model.parameters()))

    return lambda: mean_over_tasks(problem, one)
