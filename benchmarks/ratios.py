"""What a call costs in gradients: its peak and its time, beside those of one plain gradient of the same model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.workloads import Problem
from imaml.measure import peak_memory

HEADER = "| | peak, in gradients | time, in gradients | MB |\n|---|---:|---:|---:|"


@dataclass(frozen=True)
class Cost:
    """Of one call: the peak of the allocator's own account in bytes, and processor time in seconds."""

    bytes: int
    seconds: float

    @classmethod
    def of(cls, call: Callable[[], object], *, repeats: int = 2) -> Cost:
        """Measured after a call that is not counted, the time as the least of some."""
        call()
        return cls(bytes=peak_memory(call), seconds=min(seconds(call) for _ in range(repeats)))

    def row(self, name: str, unit: Cost) -> str:
        """A row below `HEADER`."""
        return (
            f"| {name} | {self.bytes / unit.bytes:.2f} | {self.seconds / unit.seconds:.1f} | {self.bytes / 1e6:.0f} |"
        )


def gradient(problem: Problem) -> Cost:
    """One plain gradient of the first task's support loss by torch, with the fused kernels of attention."""
    parameters, (inputs, target) = list(problem.parameters.values()), problem.tasks[0].support
    return Cost.of(lambda: torch.autograd.grad(problem.criterion(problem.model(inputs), target), parameters), repeats=3)


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start
