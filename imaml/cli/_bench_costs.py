"""What a meta-gradient of a user's problem costs in every setting, measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from imaml import MetaGradient
from imaml.cli._exact_gradient import exact_gradient, flat
from imaml.cli._factory import Made
from imaml.cli._options import Strategy
from imaml.inner import InnerOptimizer
from imaml.measure import peak_memory, timed_in_turn

RAISED = (TypeError, ValueError, RuntimeError, FloatingPointError)
"""By a problem that a strategy is not for."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute a meta-gradient: an engine, and the name of its setting."""

    strategy: Strategy
    setting: str
    engine: MetaGradient


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one setting was measured to cost; None: not measured."""

    strategy: Strategy
    setting: str
    bytes: int | None = None
    seconds: float | None = None
    spread: float | None = None
    equivalents: float | None = None
    error: float | None = None
    reason: str | None = None
    """Why something was not measured, in a few words."""
    failure: str | None = None
    """What the setting raised, or the exact derivative that it is compared with."""


def measure(
    made: Made, candidates: Sequence[Candidate], *, memory: float | None, repeats: int, console: Console
) -> list[Cost]:
    """Memory first; then times, in turn, of what stays within the limit; then errors.

    Args:
        made: The problem.
        candidates: Ways to compute its meta-gradient.
        memory: The limit, in MB; None for none.
        repeats: Rounds of timing.
        console: Shows what is being measured.

    Returns:
        One cost for each, in their order.

    Raises:
        RuntimeError: The problem fails in every setting, or no plain gradient of it can be taken.
    """
    costs: dict[str, Cost] = {}
    for one in candidates:
        with console.status(f"{one.setting}: memory"):
            costs[one.setting] = _peak(made, one, memory)
    failures = [cost.failure for cost in costs.values() if cost.failure]
    if len(failures) == len(costs):
        raise RuntimeError(failures[0])
    ran = [one for one in candidates if costs[one.setting].reason is None]
    with console.status("Timing"):
        calls = [_call(made, one.engine) for one in ran]
        unit, *timings = timed_in_turn([partial(_support_gradients, made), *calls], repeats=repeats)
    exact: dict[str, Tensor | None] = {}
    for one, timing in zip(ran, timings, strict=True):
        cost = replace(
            costs[one.setting],
            seconds=timing.median,
            spread=timing.spread,
            equivalents=timing.median / unit.median,
        )
        with console.status(f"{one.setting}: error"):
            try:
                costs[one.setting] = replace(cost, error=_error(made, one.engine, exact))
            except RAISED as error:
                costs[one.setting] = replace(cost, reason="unknown", failure=f"in float64, {_sentence(error)}")
    return list(costs.values())


def _call(made: Made, engine: MetaGradient) -> Callable[[], object]:
    return partial(engine.value_and_grad, made.objective, made.tasks)


def _peak(made: Made, candidate: Candidate, limit: float | None) -> Cost:
    cost, call = Cost(strategy=candidate.strategy, setting=candidate.setting), _call(made, candidate.engine)
    try:
        call()  # what torch sets up once is not counted
        size = peak_memory(call, device=made.device)
    except torch.OutOfMemoryError:
        return replace(cost, reason="out of memory")
    except RAISED as error:
        return replace(cost, reason="failed", failure=_sentence(error))
    return replace(cost, bytes=size, reason=f"over {limit:g} MB" if limit is not None and size > 1e6 * limit else None)


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split())


def _error(made: Made, engine: MetaGradient, exact: dict[str, Tensor | None]) -> float | None:
    """Relative, against the exact derivative; `exact` holds those that are known."""
    key = repr((engine.inner, engine.regularization))
    if key not in exact:
        differentiable = isinstance(engine.inner, InnerOptimizer) and engine.inner.stationarity is None
        exact[key] = exact_gradient(engine, made.objective, made.tasks, chunk_size=1) if differentiable else None
    true = exact[key]
    if true is None:
        return None
    found = flat(engine.value_and_grad(made.objective, made.tasks)[1])
    return float((found - true).norm() / true.norm())


def _support_gradients(made: Made) -> None:
    """One plain gradient of every task's support loss, the unit of gradient-equivalents."""
    values = {name: value.detach() for name, value in made.objective.parameters().items()}
    wanted = [values[name].requires_grad_() for name in made.objective.adapted]
    for task in made.tasks:
        loss, _ = made.objective.evaluate(values | made.objective.constants(), task.support)
        torch.autograd.grad(loss, wanted, allow_unused=True)
