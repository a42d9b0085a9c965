"""learn2learn's MAML wrapper.

Its package imports gym, text and vision helpers that need compiled extensions. The algorithm itself is pure Python, so
the two packages above it are entered without running their `__init__`.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.rivals import Call, mean_over_tasks
from benchmarks.workloads import Problem
from imaml import Task


def _enter(name: str, path: list[str] | None) -> list[str]:
    """Put the package `name` in place without its contents, and return where its modules are."""
    found = PathFinder.find_spec(name, path)
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = list(found.submodule_search_locations)
    sys.modules.setdefault(name, module_from_spec(spec))
    return list(found.submodule_search_locations)


def prepare(problem: Problem) -> Call:
    _enter("learn2learn.algorithms", _enter("learn2learn", None))
    from learn2learn.algorithms.maml import MAML

    learner: Any = MAML(problem.model, lr=problem.lr)

    def one(task: Task) -> tuple[Tensor, ...]:
        clone = learner.clone()
        for _ in range(problem.steps):
            clone.adapt(problem.loss(clone, task.support))
        return torch.autograd.grad(problem.loss(clone, task.query), list(problem.model.parameters()))

    return lambda: mean_over_tasks(problem, one)
