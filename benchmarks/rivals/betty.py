"""Betty's hypergradients of a two-level problem, by its own functions; the inner loop is plain gradient descent.

Its engine drives training loops and cannot be asked for one meta-gradient, so its problems are joined by hand.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from betty.configs import Config
from betty.hypergradient import get_grads
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from benchmarks.rivals import Call, mean_over_tasks
from benchmarks.workloads import Batch, Problem
from imaml import Task


def _call(problem: Problem, **options: Any) -> Call:
    class Inner(ImplicitProblem):
        def training_step(self, batch: Batch) -> Tensor:
            pairs = zip(self.module.parameters(), problem.model.parameters(), strict=True)
            proximal = sum((p - q).square().sum() for p, q in pairs)
            return problem.loss(self.module, batch) + problem.regularization / 2 * proximal

    def one(task: Task) -> list[Tensor]:
        model: nn.Module = copy.deepcopy(problem.model)
        inner = Inner("inner", Config(**options), module=model)
        outer = ImplicitProblem("outer", Config(), module=problem.model)
        inner.cur_batch = task.support
        sgd = torch.optim.SGD(model.parameters(), lr=problem.lr)
        for _ in range(problem.steps):
            sgd.zero_grad()
            inner.training_step(task.support).backward(inputs=list(model.parameters()))
            sgd.step()
        found: list[Tensor] = get_grads(problem.loss(model, task.query), [outer, inner, outer], False)
        return found

    return lambda: mean_over_tasks(problem, one)


def cg(problem: Problem) -> Call:
    return _call(problem, type="cg", cg_iterations=problem.solver_steps)


def neumann(problem: Problem) -> Call:
    """As many terms as the others have CG steps, with a step that converges for curvature up to 19 lambda."""
    alpha = 0.1 / problem.regularization
    return _call(problem, type="neumann", neumann_iterations=problem.solver_steps, neumann_alpha=alpha)


def darts(problem: Problem) -> Call:
    return _call(problem, type="darts")
