"""The outcome of a verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "inconclusive"]

RESOLVING = 1e-3
"""A comparison that resolves less than this has no power: published defects start at some 1e-3."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Says what a verification found: a verdict, how far off the subject is, and the likeliest cause of a failure.

    `print(verification)` shows a few lines.
    """

    subject: str
    """What was verified, for people."""
    status: Status
    """See `judge`; "inconclusive" where the comparison had no resolving power."""
    relative_error: float
    """Root mean square over directions of the error of the directional derivative, relative to that of the latter."""
    resolution: float
    """What finite differences could resolve: the estimate of their own relative error, in the same measure."""
    cause: str | None
    """The likeliest cause of a failure, or the reason why there is no verdict; None after a pass."""
    tolerance: float
    """The largest relative error that passes."""
    bias: float | None = None
    """Relative error against the meta-gradient without damping, in the same measure; None for what claims none."""
    details: tuple[str, ...] = ()
    """Further findings, one line each."""

    def __str__(self) -> str:
        """A few lines to read."""
        lines = [
            f"{self.subject}: {self.status}",
            f"relative error {self.relative_error:.2g} (tolerance {self.tolerance:.2g}, finite differences resolve "
            f"{self.resolution:.2g})",
        ]
        if self.bias is not None:
            lines.append(f"bias {self.bias:.2g}: the relative error against the meta-gradient without damping")
        return "\n".join([*lines, *([f"cause: {self.cause}"] if self.cause else []), *self.details])


def judge(error: float, resolution: float, tolerance: float) -> Status:
    """The verdict: a difference counts only where finite differences resolve it, and agreement only where they can.

    Args:
        error: The relative error.
        resolution: The estimate of the relative error of finite differences.
        tolerance: The largest error that passes.

    Returns:
        "failed" where the error is above the tolerance and three times the resolution; else "passed" where the
        resolution is within the tolerance or 1e-3, or "inconclusive".
    """
    limit = max(tolerance, 3 * resolution)
    if error > limit:
        return "failed"
    return "passed" if resolution <= max(tolerance, RESOLVING) else "inconclusive"
