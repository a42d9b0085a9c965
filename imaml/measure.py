"""What a call costs: its time, and the most memory it holds at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds a call took.

    Args:
        median: Median over the repeats, in seconds.
        spread: Slowest minus fastest repeat, in seconds.
    """

    median: float
    spread: float


def timed(fn: Callable[[], object], *, repeats: int = 5) -> Timing:
    """Time a call, after one call that is not counted.

    Waits for CUDA before each reading of the clock where CUDA has been used. Time one thing at a time: two
    programs with OpenMP threads on the same cores slow each other several times.

    Args:
        fn: What to time; its return value is dropped.
        repeats: Number of timed calls.

    Returns:
        Median and spread over the repeats.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1. Got {repeats}.")
    fn()
    seconds = []
    for _ in range(repeats):
        _synchronize()
        start = perf_counter()
        fn()
        _synchronize()
        seconds.append(perf_counter() - start)
    return Timing(median=median(seconds), spread=max(seconds) - min(seconds))


def peak_memory(fn: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """The most bytes that a call has allocated and not yet released.

    On the CPU every allocation and release of torch's allocator is recorded by `torch.profiler`, and the peak
    of their running sum is returned: exact, unlike the resident set of the process. It slows the call, so do
    not time and measure at once. Memory that other libraries take is not seen, nor the release of what was held
    before the call. On CUDA it is `torch.cuda.max_memory_allocated` less what was held before.

    Args:
        fn: What to measure; called once. What it returns is released after the measurement.
        device: Where it allocates: "cpu" or a CUDA device.

    Returns:
        Bytes, 0 or more.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = fn()
    del kept
    kineto = recorded.profiler.kineto_results if recorded.profiler else None
    events = [event for event in kineto.events() if event.name() == "[memory]"] if kineto else []
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes), default=0)


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
