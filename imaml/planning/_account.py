"""What stages of a computation hold at once, by the allocator's own account."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import profiler

from imaml._torch import is_profiling

_PREFIX = "imaml.planning:"
_QUIET = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class Use:
    """Bytes that a stage takes above what it found."""

    peak: float
    """The most at once."""
    held: float
    """What it leaves."""

    def scaled(self, factor: float) -> Use:
        """What `factor` such stages take at once."""
        return Use(factor * self.peak, factor * self.held)

    def plus(self, other: Use) -> Use:
        """Both together."""
        return Use(self.peak + other.peak, self.held + other.held)


class Account:
    """Records every allocation within it, stage by stage; stages follow each other.

    On a CPU by torch's profiler, which sees the work space of kernels too; on CUDA by the allocator's statistics.

    Args:
        device: Where the stages allocate.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self.uses = device, dict[str, Use]()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it, stages are recorded; their `uses` are known after it.

        Raises:
            RuntimeError: A profiler is recording already.
        """
        if self._device.type != "cpu":
            yield
            return
        if is_profiling():
            raise RuntimeError(
                "A forecast of memory records allocations by torch's profiler, which is in use. Plan before profiling, "
                "or give `chunk_size` as a number."
            )
        recorded = profiler.profile(use_cpu=True, profile_memory=True)
        with _quiet():
            recorded.__enter__()
        try:
            yield
        finally:
            recorded.__exit__(None, None, None)
        self.uses = _by_stage(recorded)

    def stage(self, name: str) -> AbstractContextManager[object]:
        """A stage; `name` is its key in `uses`."""
        if self._device.type == "cpu":
            return profiler.record_function(_PREFIX + name)
        return self._measured(name) if self._device.type == "cuda" else nullcontext()

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        torch.cuda.synchronize(self._device)
        after, peak = torch.cuda.memory_allocated(self._device), torch.cuda.max_memory_allocated(self._device)
        self.uses[name] = Use(peak - before, after - before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler from announcing itself on stderr, where its first use reads how loud it may be."""
    before = os.environ.get(_QUIET)
    os.environ.setdefault(_QUIET, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_QUIET]


def _by_stage(recorded: profiler.profile) -> dict[str, Use]:
    assert recorded.kineto_results is not None
    events: list[Any] = sorted(recorded.kineto_results.events(), key=lambda event: event.start_ns())
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    uses: dict[str, Use] = {}
    for event in events:
        if event.name().startswith(_PREFIX):
            level = peak = 0
            for when, size in changes:
                if event.start_ns() <= when <= event.end_ns():
                    level += size
                    peak = max(peak, level)
            uses[event.name().removeprefix(_PREFIX)] = Use(peak, level)
    return uses
