"""What the figures of an inner training come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from imaml.verify._training import Training

USABLE = 1e-3
"""A meta-gradient that the outer loss follows over less than this is of no use."""
AGREES = 3.0
"""By which factor a slope over a distance may differ from that at the start."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of a training."""

    errors: dict[str, float]
    """Relative errors by rounding."""
    agreement: dict[str, dict[float, float]]
    """What is left of the slope, by distance."""

    @classmethod
    def of(cls, training: Training) -> Figures:
        """Compute all of them."""
        agreement = training.agreement()  # first: it says so where nothing runs in float64
        return cls(errors=training.rounding(), agreement=agreement)

    @property
    def worst(self) -> str:
        """What has the largest error."""
        return max(self.errors, key=lambda name: self.errors[name])

    @property
    def error(self) -> float:
        """The largest error."""
        return self.errors[self.worst]

    @property
    def roughest(self) -> str:
        """What the outer loss follows over the shortest distance."""
        return min(self.agreement, key=lambda name: reach(self.agreement[name]))

    @property
    def reach(self) -> float:
        """How far the roughest part of the gradient can be followed, as a relative distance."""
        return reach(self.agreement[self.roughest]) if self.agreement else 0.0

    @property
    def is_rough(self) -> bool:
        """Whether that is too short to be of use."""
        return self.reach < USABLE


def reach(ratios: Mapping[float, float]) -> float:
    """The longest distance over which, and over the next shorter, the slope is that at the start, to a factor of 3.

    Over one distance alone a rough loss would agree by luck.

    Args:
        ratios: What is left of the slope, by distance.

    Returns:
        The distance; 0 for none.
    """
    found, before = 0.0, True
    for distance, ratio in sorted(ratios.items()):
        agrees = 1 / AGREES <= ratio <= AGREES
        if agrees and before:
            found = distance
        before = agrees
    return found
