"""What a call costs: its time, the most memory it holds at once, and its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry, shape_wrapper

from imaml._torch import TorchDispatchMode


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Says how many seconds a call took.

    Args:
        median: Median over the repeats, in seconds.
        spread: Slowest minus fastest repeat, in seconds.
    """

    median: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Says how much work a call did, which depends neither on the machine nor on what else runs on it.

    Args:
        operations: Operations that torch dispatched.
        flops: Additions and multiplications of its matrix products and convolutions; fused attention is not counted on
            a CPU.
    """

    operations: int
    flops: int


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
    return timed_in_turn([fn], repeats=repeats)[0]


def timed_in_turn(calls: Sequence[Callable[[], object]], *, repeats: int = 5) -> list[Timing]:
    """Time calls that are to be compared, in turn, so that a machine's slow minute meets all of them.

    Args:
        calls: As `fn` of `timed`.
        repeats: Number of rounds, after one that is not counted.

    Returns:
        Median and spread of each.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1. Got {repeats}.")
    seconds: list[list[float]] = [[] for _ in calls]
    for counts in [False] + [True] * repeats:
        for fn, taken in zip(calls, seconds, strict=True):
            _synchronize()
            start = perf_counter()
            fn()
            _synchronize()
            if counts:
                taken.append(perf_counter() - start)
    return [Timing(median=median(taken), spread=max(taken) - min(taken)) for taken in seconds]


def peak_memory(fn: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Measure the most bytes that a call has allocated and not yet released.

    On the CPU every allocation and release of torch's allocator is recorded by `torch.profiler`, and the peak of their
    running sum is returned: exact, unlike the resident set of the process. It slows the call, so do not time and
    measure at once.

    Memory that other libraries take is not seen, nor the release of what was held before the call.

    On CUDA it is `torch.cuda.max_memory_allocated` less what was held before.

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


def counted(fn: Callable[[], object]) -> Counts:
    """Count what a call does, by way of torch's dispatcher.

    Every operation passes through Python, some 10 microseconds each. Compiled code is not seen.

    Args:
        fn: Called once; its return value is dropped.

    Returns:
        The counts.
    """
    with _Operations() as operations:  # type: ignore[no-untyped-call]
        fn()
    return Counts(operations=operations.count, flops=operations.flops)


class _Operations(TorchDispatchMode):
    # torch's own FlopCounterMode hooks into modules besides, which no task of a vectorised pass survives.
    count = flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        found = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func.overloadpacket)
        self.flops += 0 if formula is None else formula(*args, **(kwargs or {}), out_val=found)
        return found


def _convolution_flops(grad: Any, x: Any, weight: Any, *rest: Any, out_shape: Any, **_: Any) -> int:
    """Each gradient of a convolution costs as much as itself; torch's own formula forgets that groups divide that."""
    transposed, mask = rest[4], rest[7]
    outputs = torch.Size(x if transposed else grad).numel()
    per_output = torch.Size(weight[1:]).numel()
    return 2 * outputs * per_output * (bool(mask[0]) + bool(mask[1]))


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten.convolution_backward: shape_wrapper(_convolution_flops),
}
