"""The rows of `results.jsonl`, pooled: one figure for each workload, K and method."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.rivals import METHODS

RIGHT = 1e-6
"""A relative error in float64 above which a meta-gradient is wrong; correct ones agree to 1e-9 and better."""

_AS_MEASURED = (
    "bytes",
    "gradient_bytes",
    "product_bytes",
    "theta_bytes",
    "operations",
    "error",
    "error_float32",
    "first",
    "first_warm",
)


@dataclass(frozen=True, kw_only=True)
class Figure:
    workload: str
    steps: int
    method: str
    seconds: float | None = None
    """Median over the processes of their median; None: not measured."""
    spread: float | None = None
    """The largest spread (slowest less fastest call) within a process, or between the processes."""
    equivalents: float | None = None
    """Seconds over those of one plain support gradient of all tasks, one after the other, in the same process."""
    load: float | None = None
    """The machine's highest load average when these times began to be measured."""
    first: float | None = None
    """Processor seconds of a process's first call, those of compilers included, with nothing on disk to begin with."""
    first_warm: float | None = None
    """The same in a second process, which finds what the first has left on disk."""
    bytes: int | None = None
    gradient_bytes: int | None = None
    """Of one plain support gradient."""
    product_bytes: int | None = None
    """Of one Hessian-vector product by reverse over reverse."""
    theta_bytes: int | None = None
    """Of the parameters."""
    operations: int | None = None
    """Operations that torch dispatched in one call."""
    arithmetic: float | None = None
    """Flops of one call over those of one plain support gradient of all tasks."""
    error: float | None = None
    error_float32: float | None = None
    reason: str | None = None
    """Why something is missing."""

    @property
    def verdict(self) -> str:
        if self.error is None:
            return "unchecked"
        if self.error <= RIGHT:
            return "right"
        return "approximate" if METHODS[self.method].approximate else "wrong"


def read(file: Path) -> list[Figure]:
    """All figures, in the order of the first measurement of each."""
    grouped: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        grouped.setdefault((row["workload"], row["steps"], row["method"]), []).append(row)
    return [_figure(*key, rows) for key, rows in grouped.items()]


def _figure(workload: str, steps: int, method: str, rows: list[dict[str, Any]]) -> Figure:
    timed = [row for row in rows if "seconds" in row]
    times: dict[str, float] = {}
    if timed:
        medians = [row["seconds"] for row in timed]
        between = max(medians) - min(medians)
        times = {
            "seconds": median(medians),
            "spread": max(between, *(row["spread"] for row in timed)),
            "equivalents": median(row["seconds"] / row["unit_seconds"] for row in timed),
            "load": max(row["load"] for row in timed),
        }
    flops, unit = _last(rows, "flops"), _last(rows, "unit_flops")
    return Figure(
        workload=workload,
        steps=steps,
        method=method,
        arithmetic=flops / unit if flops and unit else None,
        reason=_last(list({row["pass"]: row for row in rows}.values()), "reason"),
        **{name: _last(rows, name) for name in _AS_MEASURED},
        **times,
    )


def _last(rows: list[dict[str, Any]], name: str) -> Any:
    return next((row[name] for row in reversed(rows) if name in row), None)
