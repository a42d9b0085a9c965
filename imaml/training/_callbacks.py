"""Who follows a training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

from imaml.training._trainer import StepRecord

_logger = logging.getLogger("imaml.training")


class Callback(Protocol):
    """Follows a training, such as to draw its curves elsewhere.

    `TensorBoard` and `WandB` are two. The calls come in this order, from the process of rank 0 alone: `start` once,
    `log` after every meta-step, and `end` once, however the training ends.
    """

    def start(self, config: dict[str, Any], step: int) -> None:
        """Begin, or go on.

        Args:
            config: The configuration of the run, nested plain values.
            step: Meta-steps that are done. What was logged of later ones, by a process that was lost, comes again.
        """

    def log(self, record: StepRecord) -> None:
        """Take the record of a meta-step."""

    def end(self, result: dict[str, Any] | None) -> None:
        """Write what is left to write.

        Args:
            result: The final test, as in `result.json`; None where the training stopped before.
        """


class Callbacks:
    """Calls several callbacks, and keeps the training from what goes wrong in one.

    One that fails in `start` stops the training before its first meta-step. One that fails later is left out from then
    on, and the training goes on: that is logged as an error, once.

    Args:
        callbacks: Called in this order.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = list(callbacks)

    def start(self, config: dict[str, Any], step: int) -> None:
        """Call `start` of each.

        Args:
            config: As of `Callback.start`.
            step: As of `Callback.start`.

        Raises:
            ValueError: One failed; those before it have ended.
        """
        for number, callback in enumerate(self._callbacks):
            try:
                callback.start(config, step)
            except Exception as error:  # a callback is the user's, or a service's: it may raise anything
                self._callbacks = self._callbacks[:number]
                self.end(None)
                raise ValueError(
                    f"{type(callback).__name__} cannot follow the training ({type(error).__name__}: {error}). Nothing "
                    "was trained: see to it, or leave it out."
                ) from error

    def log(self, record: StepRecord) -> None:
        """Call `log` of each."""
        self._each("log", record)

    def end(self, result: dict[str, Any] | None) -> None:
        """Call `end` of each, the first time."""
        self._each("end", result)
        self._callbacks = []

    def _each(self, method: str, argument: object) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, method)(argument)
            except Exception as error:  # so may it here
                self._callbacks.remove(callback)
                name = type(callback).__name__
                _logger.error("%s failed and is left out (%s: %s).", name, type(error).__name__, error)


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The numbers among nested values, by names joined with slashes, such as "val/mean"."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}/{inner}": number for inner, number in numbers(value).items()}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[name] = value
    return found


def of_test(result: dict[str, Any]) -> dict[str, float]:
    """What a result says of the test, by the names of a log."""
    return numbers({"test": {name: result[name] for name in ("mean", "interval", "tasks", "skipped")}})
