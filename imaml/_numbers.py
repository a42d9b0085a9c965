"""Checks of numeric fields."""

from __future__ import annotations

import math
from numbers import Real


def check_number(name: str, value: object) -> float:
    """The value of a finite real number.

    Args:
        name: What it is, for the message.
        value: What came.

    Returns:
        The value.

    Raises:
        TypeError: Not a real number.
        ValueError: NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number. Got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite. Got {value}.")
    return float(value)


def check_integer(name: str, value: object, *, least: int) -> None:
    """Raise TypeError or ValueError unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer. Got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be >= {least}. Got {value}.")
