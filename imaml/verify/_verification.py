"""The outcome of a verification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found."""

    subject: str
    """What was verified, for people."""
    status: Status
    """"passed" within the tolerance, "failed" beyond it; "inconclusive" where the comparison had no resolving power."""
    relative_error: float
    """Root mean square over directions of the error of the directional derivative, relative to that of the derivative."""
    resolution: float
    """What finite differences could resolve: the estimate of their own relative error, in the same measure."""
    cause: str | None
    """The likeliest cause of a failure, or the reason why there is no verdict; None after a pass."""
    tolerance: float
    """The largest relative error that passes."""
    details: tuple[str, ...] = ()
    """Further findings, one line each."""

    def __str__(self) -> str:
        """A few lines to read."""
        lines = [
            f"{self.subject}: {self.status}",
            f"relative error {self.relative_error:.2g} (tolerance {self.tolerance:.2g}, finite differences resolve "
            f"{self.resolution:.2g})",
        ]
        return "\n".join([*lines, *([f"cause: {self.cause}"] if self.cause else []), *self.details])


def judge(error: float, resolution: float, tolerance: float) -> Status:
    """The verdict: a difference only counts where finite differences resolve it."""
    if resolution > tolerance:
        return "failed" if error > max(0.1, 10 * resolution) else "inconclusive"
    return "passed" if error <= tolerance else "failed"
