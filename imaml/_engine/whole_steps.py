"""What happens at an inner step, as one function of tensors, where such functions are compiled."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from imaml._curvature.agreement import Outputs
from imaml._curvature.derivatives import Derivatives
from imaml._engine.course import Course
from imaml._losses.loss import Loss, MeanLoss
from imaml._losses.slice import Slice
from imaml.inner import InnerOptimizer

OfStep = Callable[..., Outputs]
"""A function of a problem, the number of a step as a tensor, and tensors `(tasks, n)`."""
_OWN = ("update", "pullback", "clipped")


def at_once(
    problem: Any, name: str, function: OfStep, step: int, tensors: tuple[Tensor, ...], *, losses: int | None = None
) -> Outputs | None:
    """What a function makes of a problem at a step, compiled as a whole.

    A gradient or a product alone would leave the update and the Python between them to every step.

    Args:
        problem: The `Problem`, which knows this file; the function gets one whose values are arguments.
        name: What the function computes, for people and as a key.
        function: It depends on nothing else.
        step: The step.
        tensors: Its arguments, the parameters first.
        losses: Which of the outputs the support losses are, by which the compiled function is known again; None: none.

    Returns:
        The outputs; None where it is not compiled as a whole.
    """
    frame = _Frame.of(problem, function, step)
    if frame is None:
        return None
    given = (*tensors, *frame.values)
    return frame.derivatives.whole(frame.part, name, frame.plain, given, step, key=frame.key, losses=losses)


def in_two(
    problem: Any, name: str, function: OfStep, step: int, tensors: tuple[Tensor, ...], *, late: int, first: int
) -> tuple[Outputs, Callable[..., Outputs]] | None:
    """What `at_once` does, for a function of which some arguments come later.

    Args:
        problem: The `Problem`.
        name: What the function computes.
        function: A function of the problem, the number of the step, what comes later and the tensors.
        step: The step.
        tensors: The arguments that are there.
        late: How many others come later, of the shape of the first of these.
        first: How many of the outputs depend on none of them; the last of these are the support losses.

    Returns:
        These outputs, and what makes the others of what comes later; None where it is not compiled as a whole.
    """
    frame = _Frame.of(problem, function, step)
    if frame is None:
        return None
    given, losses = (*tensors, *frame.values), first - 1
    return frame.derivatives.whole_in_two(
        frame.part, name, frame.plain, given, step, late=late, first=first, key=frame.key, losses=losses
    )


@dataclass(frozen=True)
class _Frame:
    """A function of a problem at a step as one of tensors alone."""

    derivatives: Derivatives
    part: Slice
    plain: Callable[..., Outputs]
    """The function, of the slice, of its own tensors and of the values."""
    values: tuple[Tensor, ...]
    """What else it depends on: the number of the step, the proximal term, and hyper-parameters that may change."""
    key: Hashable
    """What is frozen in it."""

    @classmethod
    def of(cls, problem: Any, function: OfStep, step: int) -> _Frame | None:
        """The function with what it depends on; None where that is not to be compiled."""
        derivatives, hyper = problem.derivatives, problem.hyper
        if not (derivatives.compiles and problem.is_traceable):
            return None
        loss = problem.support_at(step)  # which may fetch a batch
        if not _is_one_slice(loss):
            return None
        at, damping = hyper.at(problem.first + step), problem.damping
        named = hyper.tensors_of(at)
        proximal = () if damping is None else (damping, problem.theta[0])
        values = (problem.numbers[step], *proximal, *named.values())

        def plain(part: Slice, *given: Tensor) -> Outputs:
            own, rest = given[: -len(values)], iter(given[-len(values) :])
            number = next(rest)
            inside = replace(
                problem,
                support=Loss(part),
                derivatives=derivatives.uncompiled,
                damping=None if damping is None else next(rest),
                support_losses=[],
                course=Course(),
                first=0,
                watch=None,
            )
            inside._is_over = True  # nothing is remembered
            inside._theta = None if damping is None else next(rest)
            inside.hyper = hyper.at_one_step(at.replaced(dict(zip(named, rest, strict=True))))
            return function(inside, number, *own)

        key = (hyper.learned, *hyper.numbers.items(), *named)
        return cls(derivatives, loss.slices[0][1], plain, values, key)


def is_traceable(problem: Any) -> bool:
    """Whether a trace of a step depends on nothing that it does not show.

    The update is then the library's own. One of long vectors goes block by block, uncompiled.

    Args:
        problem: The `Problem`.

    Returns:
        Whether it is.
    """
    optimizer = problem.inner
    return (
        isinstance(optimizer, InnerOptimizer)
        and all(str(getattr(optimizer, name).__module__).startswith("imaml.") for name in _OWN)
        and bool(optimizer.said_of_update("is_deterministic"))
        and not optimizer._blocks(
            (problem.snapshot.like.new_empty(()).expand(problem.tasks, sum(problem.layout.sizes)),)
        )
        and not problem.statistics
    )


def _is_one_slice(loss: Loss) -> bool:
    inexact = loss.record.mode == "finite-difference"
    return not inexact and not isinstance(loss, MeanLoss) and len(loss.slices) == 1
