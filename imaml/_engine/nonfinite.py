"""Tasks without a finite meta-gradient: found, and left out where that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from imaml._engine.report import Pullback
from imaml._errors import DivergenceError, NonFiniteError
from imaml.inner._hyper import Hyperparameters
from imaml_solvers import Status

OnNonfinite = Literal["raise", "skip"]
T = TypeVar("T")


def check_on_nonfinite(given: object) -> None:
    """Raise ValueError unless it is one of the two."""
    if given not in get_args(OnNonfinite):
        raise ValueError(f"`on_nonfinite` must be 'raise' or 'skip'. Got {given!r}.")


def skipping(
    compute: Callable[[list[int]], T], positions: list[int], mark: Callable[[], Callable[[], None]]
) -> list[tuple[list[int], T]]:
    """Compute a chunk, and anew without the tasks that its error names, until there is none.

    What the tasks of a chunk share are sums, which a single NaN spoils. Where the error names them all, each is
    computed by itself: a sum does not say whose the NaN was.

    Args:
        compute: From the positions of tasks to a result.
        positions: Positions of the chunk's tasks.
        mark: Returns what takes back all that a computation adds elsewhere from then on.

    Returns:
        The positions that are left, and their results.

    Raises:
        NonFiniteError: It is not of single tasks.
        DivergenceError: It is not of single tasks.
    """
    undo = mark()
    try:
        return [(positions, compute(positions))]
    except (NonFiniteError, DivergenceError) as error:
        if not error.tasks:
            raise
        rest = [position for position in positions if position not in error.tasks]
    undo()  # after the except block, which keeps the graphs of the failed computation alive
    if rest:
        return skipping(compute, rest, mark)
    if len(positions) == 1:
        return []
    return [found for position in positions for found in skipping(compute, [position], mark)]


EXPLOSION = 1e6
"""A support loss that grows by this factor has diverged, finite or not."""


def check_history(losses: Tensor, positions: list[int], smaller: str) -> None:
    """Raise where a support loss was NaN or infinite, or exploded.

    Args:
        losses: Before each inner step, `(steps, tasks)`.
        positions: Positions of the tasks.
        smaller: Than what an inner step size should be, for the message.

    Raises:
        NonFiniteError: Before the first step.
        DivergenceError: Later.
    """
    if bool(losses.abs().max() <= EXPLOSION):  # as a rule; not with a NaN
        return
    bad = ~torch.isfinite(losses) | (losses.abs() > EXPLOSION * losses[0].abs().clamp(min=1))
    if not bad.any():
        return
    step, column = (int(i) for i in bad.nonzero()[0])
    tasks = _marked(positions, bad.any(0))
    where, first, loss = f"task {positions[column]}", losses[0, column].item(), losses[step, column].item()
    if step == 0:
        raise NonFiniteError(
            f"The support loss of {where} is {loss} at inner step 0, before any adaptation: look for NaN or "
            "infinite values in the task's data or the model's parameters.",
            tasks,
        )
    raise DivergenceError(
        f"The inner loop of {where} diverged: its support loss went from {first:.4g} at inner step 0 to {loss:.4g} "
        f"at inner step {step}. Use a smaller inner step size{smaller}",
        tasks,
    )


def is_finite(values: Tensor) -> bool:
    """Whether all of them are: as a rule their sum is, which says so for a single pass."""
    return bool(values.sum().isfinite()) or bool(values.isfinite().all())


def check_query(losses: Tensor, positions: list[int], steps: int, smaller: str) -> None:
    """Raise NonFiniteError where a query loss `(tasks,)` is NaN or infinite."""
    if not is_finite(losses):
        bad = ~torch.isfinite(losses)
        column = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"The query loss of task {positions[column]} is {losses[column].item()} after {steps} inner steps: look "
            f"for NaN or infinite values in its query data, or use a smaller inner step size{smaller}.",
            _marked(positions, bad),
        )


def _marked(positions: list[int], marks: Tensor) -> list[int]:
    return [position for position, mark in zip(positions, marks.tolist(), strict=True) if mark]


def check_chunk(
    pullback: Pullback, direct: Tensor | None, positions: list[int], hyper: Hyperparameters, how: OnNonfinite
) -> None:
    """Raise unless what a strategy made of a chunk is finite.

    A solve that met NaN left its last good iterate, which may be zero: `on_failure` has the say, unless such tasks are
    to be skipped.

    Args:
        pullback: What it made.
        direct: The derivative of the query losses by theta itself, which goes past it.
        positions: Positions of the tasks.
        hyper: Hyper-parameters, with what has been added up for them.
        how: As the engine has it.

    Raises:
        NonFiniteError: It is not; of all tasks where a sum over them is not.
    """
    status, tasks = pullback.outcome.solver_status, list[int]()
    if not is_finite(pullback.theta):
        tasks = _marked(positions, ~pullback.theta.isfinite().all(-1))
    if how == "skip" and status is not None:
        tasks = sorted({*tasks, *_marked(positions, status == Status.NONFINITE)})
    if tasks:
        raise NonFiniteError(
            f"The meta-gradient of task {tasks[0]} is not finite although its losses are: look for an operation with "
            "an infinite second derivative, such as sqrt or norm at 0.",
            tasks,
        )
    if direct is not None and not is_finite(direct):
        raise NonFiniteError(
            f"The derivative of the query losses of tasks {positions[0]} to {positions[-1]} by `initial` is not finite "
            "although the losses are: look for an operation with an infinite derivative, such as sqrt or norm at 0.",
            positions,
        )
    if pullback.shared is not None and not (is_finite(pullback.shared) and hyper.is_finite):
        raise NonFiniteError(
            f"The meta-gradient of tasks {positions[0]} to {positions[-1]} for a parameter that does not adapt is not "
            "finite although their losses are: look for an operation with an infinite derivative, such as sqrt at 0.",
            positions,
        )


def check_some(tasks: int, skipped: int) -> None:
    """Raise unless there is a task to take the mean over.

    Args:
        tasks: How many tasks count, on all ranks.
        skipped: How many do not.

    Raises:
        NonFiniteError: All were skipped.
        ValueError: There was none.
    """
    if tasks:
        return
    if not skipped:
        raise ValueError("Expected at least one task on some rank. Got none on any.")
    raise NonFiniteError(
        f"No task is left: all {skipped} were skipped, since their losses or meta-gradients are NaN or infinite or "
        "their inner loops diverged. on_nonfinite='raise' says why."
    )
