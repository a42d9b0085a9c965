"""Errors and warnings of the engine, beside Python's own TypeError and ValueError for bad arguments."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


class _TaskError(FloatingPointError):
    def __init__(self, message: str = "", tasks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.tasks = tuple(tasks)
        """The positions of the tasks in question; empty where it is not of single tasks."""


class NonFiniteError(_TaskError):
    """A loss or a meta-gradient is NaN or infinite; the message names the task and the inner step."""


class DivergenceError(_TaskError):
    """The inner loop diverged: the support loss was finite at first and exploded, so the step size is too large."""


class SolverError(RuntimeError):
    """A linear solve failed and `on_failure="raise"`."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another run or computation."""


class SolverWarning(UserWarning):
    """A linear solve failed and `on_failure="warn"`; given once per engine, every count is in the report."""


class DriftWarning(UserWarning):
    """States that a sweep of `MAML(check_states=True)` took again are others than on the way; given once per engine."""


class PrecisionWarning(UserWarning):
    """Rounding leaves little or nothing of a meta-gradient; given once per engine, every figure is in the report."""


class CompileWarning(UserWarning):
    """An engine with `compile=True` goes on uncompiled; the message says why."""


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line that called the library."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].partition(".")[0] == "imaml":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
