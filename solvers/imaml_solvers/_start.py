"""What iterative solvers share: where a solve starts, in units in which squares neither overflow nor underflow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._operator import LinearOperator
from imaml_solvers._solution import Status
from imaml_solvers._vectors import largest_entry, norm, power_of_two

RUNNING = -1
"""The status of a system that still iterates."""


def check_stopping(max_steps: int | None, rtol: float | None, atol: float) -> None:
    """Check the fields that say when to stop; raises ValueError."""
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"`max_steps` must be >= 1. Got {max_steps}.")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"`{name}` must be finite and >= 0. Got {value}.")


def default_stopping(max_steps: int | None, rtol: float | None, b: Tensor) -> tuple[int, float]:
    """`max_steps` and `rtol`; by default 10 n steps, and 1e-5, or 0 where the steps are the budget."""
    default = 1e-5 if max_steps is None else 0.0
    return 10 * b.shape[-1] if max_steps is None else max_steps, default if rtol is None else rtol


@dataclass(frozen=True)
class Start:
    """A batch of systems before the first step; b, x, r and the tolerance are in multiples of `unit`."""

    b: Tensor
    x: Tensor
    r: Tensor
    """b - A x."""
    unit: Tensor
    """A power of two per system, `(*batch, 1)`: scaling by it is exact."""
    tolerance: Tensor
    """max(rtol |b|, atol), or the rounding unit times |b| where both are zero, `(*batch,)`."""
    status: Tensor
    """RUNNING, CONVERGED where x is within the tolerance, or NONFINITE."""


def start(op: LinearOperator, b: Tensor, x0: Tensor | None, rtol: float, atol: float) -> Start:
    """The start at x0, or at 0: without a product if x0 is None."""
    x = torch.zeros_like(b) if x0 is None else x0.masked_fill((b == 0).all(-1, keepdim=True), 0)
    r = b if x0 is None else b - op.mv(x)
    bad = ~(torch.isfinite(largest_entry(x)) & torch.isfinite(largest_entry(r))).unsqueeze(-1)
    x = x.masked_fill_(bad, 0)
    if x0 is not None:
        r = torch.where(bad, b, r, out=r)
    unit = power_of_two(largest_entry(b).maximum(largest_entry(r)).unsqueeze(-1))
    b, x = b / unit, x.div_(unit)
    r = b if x0 is None else r.div_(unit)
    least = torch.finfo(b.dtype).eps if rtol == atol == 0 else rtol
    tolerance = (least * norm(b)).maximum(atol / unit.squeeze(-1))
    status = torch.full(b.shape[:-1], RUNNING, device=b.device)
    status = status.masked_fill(norm(r) <= tolerance, Status.CONVERGED).masked_fill(bad.squeeze(-1), Status.NONFINITE)
    return Start(b, x, r, unit, tolerance, status)
