"""Everything that computes a meta-gradient here: this library's strategies, and their rivals.

A method is a function `prepare(problem)` that sets up once and returns a call; the call returns the mean meta-gradient
over the tasks, one tensor per parameter in the model's order. Rivals are imported when they are prepared: they live in
a folder of their own (`benchmarks.rivals.environment`), or are absent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.workloads import Family, Problem
from imaml import Task

Call = Callable[[], list[Tensor]]


@dataclass(frozen=True, kw_only=True)
class Method:
    where: str
    """`module:function` of the `prepare` function, the module within this package."""
    family: Family = "exact"
    """What the method claims to compute, which decides the reference that it is checked against."""
    approximate: bool = False
    """Whether it approximates its family's system by design, so that an error is no mistake of its code."""
    only: tuple[str, ...] = ()
    """Workloads it is limited to; all if empty."""

    def prepare(self, problem: Problem) -> Call:
        module, _, function = self.where.partition(":")
        prepared: Call = getattr(importlib.import_module(f"{__name__}.{module}"), function)(problem)
        return prepared


IN_JAX = ("W1", "W2", "W2-15", "W2-20", "W2-implicit", "W3", "W4", "small", "tiny")
"""Workloads whose models are written in JAX."""

METHODS = {
    "imaml MAML": Method(where="ours:maml"),
    "imaml MAML, compile=True": Method(where="ours:maml_compiled", only=("W1", "W2", "W2-15", "tiny")),
    "imaml MAML, chunk_size=1": Method(where="ours:maml_task_by_task", only=("W1", "W2", "W2-15", "W2-20", "tiny")),
    "imaml MAML, checkpoints=4": Method(where="ours:maml_checkpointed", only=("W3", "W4", "tiny")),
    "imaml MAML, linearize=True": Method(where="ours:maml_with_graphs", only=("W3", "tiny")),
    "create_graph loop": Method(where="create_graph:prepare"),
    "torch.func, vmap inside": Method(where="torch_func:vmap_inside"),
    "torch.func, vmap outside": Method(where="torch_func:vmap_outside"),
    "learn2learn": Method(where="learn2learn:prepare"),
    "higher": Method(where="higher:prepare"),
    "TorchOpt explicit": Method(where="torchopt_explicit:prepare"),
    "torch-maml": Method(where="torch_maml:naive"),
    "torch-maml, checkpointing": Method(where="torch_maml:checkpointed"),
    "JAX": Method(where="jax:reverse", only=IN_JAX),
    "JAX, forward-over-reverse": Method(where="jax:tangents", only=IN_JAX),
    "JAX, leanest": Method(where="jax:lean", only=("W3", "W4", "small")),
    "imaml ImplicitMAML": Method(where="ours:implicit", family="implicit"),
    "imaml ImplicitMAML, linearize=False": Method(where="ours:implicit_rebuilt", family="implicit", only=("W3", "W4")),
    "imaml ImplicitMAML, compile=True": Method(
        where="ours:implicit_compiled", family="implicit", only=("W2-implicit", "tiny")
    ),
    "JAX, implicit": Method(where="jax:implicit", family="implicit", only=IN_JAX),
    "JAX, implicit, leanest": Method(where="jax:implicit_lean", family="implicit", only=("W3", "W4")),
    "TorchOpt implicit": Method(where="torchopt_implicit:prepare", family="implicit"),
    "Betty cg": Method(where="betty:cg", family="implicit"),
    "Betty neumann": Method(where="betty:neumann", family="implicit", approximate=True),
    "Betty darts": Method(where="betty:darts", family="implicit", approximate=True),
    "imaml FOMAML": Method(where="ours:fomaml", family="first-order"),
}


def mean_over_tasks(problem: Problem, one: Callable[[Task], Sequence[Tensor]]) -> list[Tensor]:
    """The mean of `one(task)` over the tasks, computed one after the other; holds two gradients at a time."""
    total: list[Tensor] = []
    for task in problem.tasks:
        found = one(task)
        total = [a.add_(b) for a, b in zip(total, found, strict=True)] if total else [t.detach().clone() for t in found]
    return [t.div_(len(problem.tasks)) for t in total]
