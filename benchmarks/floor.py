"""How far a meta-gradient is from what its arithmetic must take.

    python -m benchmarks.floor [--workloads W1 W2] [--steps 5] [--methods "imaml MAML" ...] [--repeats 5]

For every method: the time of a call, where the methods take turns in one process; the *kernels'*, which matrix products
and convolutions take of it (torch.profiler, so a part of a slower call); and the *arithmetic's*, their operations at
the rate of one large matrix product. What is left beside the kernels is elementwise work, copies and dispatch.
Rivals are found where `python -m benchmarks.compare` has put them.
"""

from __future__ import annotations

import argparse
import sys

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.rivals import METHODS, Call, environment
from benchmarks.workloads import WORKLOADS
from imaml.measure import counted, timed, timed_in_turn

KERNELS = (
    *("aten::mkldnn_convolution", "aten::convolution_backward", "aten::_convolution", "aten::_slow_conv2d_forward"),
    *("aten::_conv_depthwise2d", "aten::bmm", "aten::mm", "aten::addmm", "aten::baddbmm"),
)
SIZE = 1024
"""Of the matrices of the product that gives the rate."""


def rate() -> float:
    """Floating-point operations in a second of a large matrix product."""
    a, b = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    return 2 * SIZE**3 / timed(lambda: a @ b, repeats=20).median


def in_kernels(call: Call) -> float:
    """Seconds that one call spends in matrix products and convolutions."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return sum(event.self_cpu_time_total for event in recorded.key_averages() if event.key in KERNELS) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=["W1", "W2"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["imaml MAML", "create_graph loop"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    sys.path.extend(environment.search_path())
    torch.set_num_threads(options.threads)
    per_second = rate()
    table = Table("workload", "method", "ms", "kernels, ms", "arithmetic, ms", box=box.SIMPLE_HEAD)
    for name in options.workloads:
        problem = WORKLOADS[name].problem(options.steps)
        calls = [METHODS[method].prepare(problem) for method in options.methods]
        timings = timed_in_turn(calls, repeats=options.repeats)
        for method, call, timing in zip(options.methods, calls, timings, strict=True):
            kernels, floor = in_kernels(call), counted(call).flops / per_second
            table.add_row(name, method, *(f"{1e3 * s:.3g}" for s in (timing.median, kernels, floor)))
    console = Console()
    console.print(table)
    console.print(f"{per_second / 1e9:.0f} GFLOP/s in a product of {SIZE} x {SIZE} matrices, {options.threads} threads")


if __name__ == "__main__":
    main()
