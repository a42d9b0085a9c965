"""Schedules of hyper-parameters: functions of the meta-parameters and of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from imaml._numbers import check_integer, check_number
from imaml.inner._hyper import Hyper, check_hyper

Schedule = Callable[[dict[str, Any], int], Any]


@dataclass(frozen=True)
class _WarmUp:
    """A rise to a peak, along a line, and a decay to a floor, along a curve."""

    peak: Hyper
    warmup: int
    total: int
    floor: float
    curve: Callable[[float], float]
    """What is left of the peak, from 1 to 0, after this share of the decay."""

    def __post_init__(self) -> None:
        if isinstance(self.peak, (list, tuple)):
            raise TypeError(
                "`peak` is one for all steps. Expected a number, one per parameter by name, or a function of the "
                f"meta-parameters that returns either. Got {self.peak!r}."
            )
        check_hyper("peak", self.peak, must="positive")
        check_integer("`warmup`", self.warmup, least=0)
        check_integer("`total`", self.total, least=self.warmup + 1)
        if check_number("`floor`", self.floor) < 0:
            raise ValueError(f"`floor` must be >= 0. Got {self.floor}.")

    def __call__(self, meta: dict[str, Any], step: int) -> Any:
        """The value at a step, of the form of the peak."""
        if step < self.warmup:
            share, base = step / self.warmup, 0.0
        else:
            share, base = self.curve(min(1.0, (step - self.warmup) / (self.total - self.warmup))), self.floor
        peak: Any = self.peak(meta) if callable(self.peak) else self.peak
        if isinstance(peak, Mapping):
            return {name: base + share * (value - base) for name, value in peak.items()}
        return base + share * (peak - base)


def warmup_cosine(peak: Hyper, *, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Makes a schedule that rises along a line from zero to a peak, and falls along a half cosine to a floor.

    For example `AdamW(lr=warmup_cosine(3e-4, warmup=100, total=1000), steps=1000)`. Steps count from 0, so that the
    first has the value 0 where there is a warm-up. After `total` steps it stays at the floor.

    Equal to `get_cosine_schedule_with_warmup` of transformers.

    Args:
        peak: A number, one per parameter by name, or a function of the meta-parameters that returns either: a learned
            peak.
        warmup: Steps of the rise, >= 0.
        total: Steps of rise and fall, > `warmup`.
        floor: The value at the end, >= 0.

    Returns:
        A function of the meta-parameters and the step, for a hyper-parameter of an inner optimiser.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: A number out of range.
    """
    return _WarmUp(peak, warmup, total, floor, _cosine)


def warmup_linear(peak: Hyper, *, warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Makes a schedule that rises along a line from zero to a peak, and falls along a line to a floor.

    Equal to `get_linear_schedule_with_warmup` of transformers.

    Args:
        peak: See `warmup_cosine`, as for `warmup`.
        warmup: Steps of the rise, >= 0.
        total: Steps of rise and fall, > `warmup`.
        floor: The value at the end, >= 0.

    Returns:
        A function of the meta-parameters and the step, for a hyper-parameter of an inner optimiser.

    Raises:
        TypeError: An argument of a wrong type.
        ValueError: A number out of range.
    """
    return _WarmUp(peak, warmup, total, floor, _line)


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


def _line(share: float) -> float:
    return 1 - share
