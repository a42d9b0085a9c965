"""Which modules of a model are worth recomputing, by what a forward pass of one task saves inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from imaml._curvature.agreement import agree
from imaml._engine.chunking import ONE_BY_ONE, saved_for, storages
from imaml._engine.inner_state import InnerState
from imaml._engine.problem import Problem
from imaml._engine.strategy import Strategy
from imaml._objective.blocks import Blocks, blocks_of
from imaml._objective.objective import Objective
from imaml._objective.recompute import Swapped
from imaml._sharding.runs import run_of
from imaml._tasks import TaskBatch
from imaml._torch import is_functorch_wrapped_tensor, tree_leaves

PAYS = 0.75
"""What recomputed blocks leave of a gradient's graph, at most, where they are worth a probe."""
_MOST = 2
"""Candidates that are tried: the next best one where the best is refused."""
REFUSALS = (ValueError, RuntimeError)
"""What a block raises that is no function of its arguments and of the modules that it holds."""


def worth_recomputing(
    engine: Strategy, objective: Objective, batch: TaskBatch, start: InnerState | None = None
) -> Iterator[Blocks]:
    """Look for modules whose recomputation saves memory and gives the same gradient.

    Candidates are the types of modules, and what a list or a sequence of them holds.

    Args:
        engine: Any engine.
        objective: Model and loss.
        batch: Tasks, of which the first is looked at: one forward pass of its support set, and for each candidate two
            gradients.
        start: Where the inner trainings go on from; None: from theta.

    Yields:
        Values of `recompute`, the leanest first; none where the engine, the objective or the model says what is
        recomputed, and where nothing can be: in a function, sharded or compiled.
    """
    if objective.model is None or engine.recompute is not None or engine.compile:
        return
    with torch.inference_mode(False), torch.no_grad():
        candidates = _candidates(engine, objective, batch, objective.model, start)
        expected = _gradient(engine, objective, batch, start) if candidates else None
        for blocks in candidates:
            try:
                found = _gradient(replace(engine, recompute=blocks), objective, batch, start)
            except REFUSALS:  # as the engine has just run, these are about the blocks
                continue
            # A block may depend on what is hidden from us, such as random numbers of Python's own.
            if expected is not None and agree(found, expected, torch.finfo(found.dtype).eps ** 0.5):
                yield blocks


def _first(engine: Strategy, objective: Objective, batch: TaskBatch, start: InnerState | None) -> Problem:
    run = run_of(engine, objective, derivatives=True, start=start)
    return run.problem([0], batch[:1], ONE_BY_ONE)


def _gradient(engine: Strategy, objective: Objective, batch: TaskBatch, start: InnerState | None) -> Tensor:
    """The gradient of the first task's support loss."""
    one = _first(engine, objective, batch, start)
    try:
        return one.derivatives.gradient(one.support, one.theta, 0).adapted
    finally:
        one.snapshot.replay.undo()


@dataclass
class _Call:
    """One call of a module."""

    module: nn.Module
    given: list[Tensor]
    first: int
    """How many tensors were saved before it,"""
    last: int = 0
    """and after it."""


@dataclass
class _Watch:
    """What a forward pass saves, and which calls of modules it consists of."""

    saved: list[Tensor] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)

    def called(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In the place of a module's forward pass."""
        tensors = [t.detach() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        given = [t for t in tensors if not is_functorch_wrapped_tensor(t)]
        call = _Call(module, given, len(self.saved))
        self.calls.append(call)
        try:
            return forward(*args, **kwargs)
        finally:
            call.last = len(self.saved)


def _candidates(
    engine: Strategy, objective: Objective, batch: TaskBatch, model: nn.Module, start: InnerState | None = None
) -> list[Blocks]:
    one, watch = _first(engine, objective, batch, start), _Watch()
    survey = one.snapshot.survey
    if survey.blocks or survey.is_sharded:
        return []
    named = {name: module for name, module in model.named_modules() if name}
    watched = [(m.__dict__, "forward", partial(watch.called, m, m.forward)) for m in named.values()]
    try:
        with Swapped(watched):
            known = saved_for(one.support.slices[0][1], one.theta, watch.saved)
    finally:
        one.snapshot.replay.undo()
    if known is None or survey.recomputed:
        return []
    rows = (n for n, m in {"": model, **named}.items() if isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m))
    entries: list[Blocks] = [(kind,) for kind in dict.fromkeys(map(type, named.values()))]
    entries += [(f"{name}.*" if name else "*",) for name in rows]
    left: dict[frozenset[nn.Module], tuple[int, Blocks]] = {}
    for blocks in entries:
        modules = frozenset(blocks_of(model, blocks))
        left.setdefault(modules, (_left(watch, modules, known), blocks))
    whole = _left(watch, frozenset(), known)
    found = sorted((each for each in left.values() if each[0] <= PAYS * whole), key=lambda each: each[0])
    return [blocks for _, blocks in found[:_MOST]]


def _left(watch: _Watch, modules: frozenset[nn.Module], known: list[Tensor]) -> int:
    """Bytes of a gradient's graph where modules are recomputed: their inputs, what lies outside, the largest block."""
    aside = storages(known).keys()

    def size(tensors: list[Tensor]) -> int:
        return sum(size for pointer, size in storages(tensors).items() if pointer not in aside)

    calls = [call for call in watch.calls if call.module in modules]
    inside = {i for call in calls for i in range(call.first, call.last)}
    outside = [tensor for i, tensor in enumerate(watch.saved) if i not in inside]
    largest = max((size(watch.saved[call.first : call.last]) for call in calls), default=0)
    return largest + size([*outside, *(tensor for call in calls for tensor in call.given)])
