"""torch-maml: copies of the model that are differentiable in the original, with or without gradient checkpointing."""

from __future__ import annotations

import warnings
from typing import Any

import torch_maml
from torch import Tensor

from benchmarks.rivals import Call, mean_over_tasks
from benchmarks.workloads import Problem
from imaml import Task


def _call(problem: Problem, kind: Any, **options: Any) -> Call:
    optimizer = torch_maml.IngraphGradientDescent(problem.lr)
    maml = kind(problem.model, problem.loss, optimizer=optimizer, **options)

    def one(task: Task) -> tuple[Tensor, ...]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = maml([task.support] * problem.steps).model
        # its checkpoints refuse autograd.grad, so gradients are accumulated and taken away
        problem.loss(adapted, task.query).backward()
        found = tuple(p.grad for p in problem.model.parameters() if p.grad is not None)
        problem.model.zero_grad()
        return found

    return lambda: mean_over_tasks(problem, one)


def naive(problem: Problem) -> Call:
    return _call(problem, torch_maml.NaiveMAML)


def checkpointed(problem: Problem) -> Call:
    return _call(problem, torch_maml.GradientCheckpointMAML, checkpoint_steps=1)
