"""One measurement in a process of its own: prints one JSON object, or ends with the exception that a method raised.

python -m benchmarks.one METHOD WORKLOAD STEPS {check,memory,count,time,first} [--threads N] [--repeats N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.pipes import cpu_seconds
from benchmarks.reference import flat, reference, support_gradients, support_products
from benchmarks.rivals import METHODS, Method
from benchmarks.rivals.jax import Elsewhere
from benchmarks.workloads import WORKLOADS, Workload
from imaml.measure import counted, peak_memory, timed


def check(method: Method, workload: Workload, steps: int, repeats: int) -> dict[str, Any]:
    """Relative errors against the float64 reference, computed in float64 and in float32."""
    exact = reference(workload.problem(steps, torch.float64), method.family)
    errors = {}
    for name, dtype in (("error", torch.float64), ("error_float32", torch.float32)):
        found = flat(method.prepare(workload.problem(steps, dtype))())
        errors[name] = ((found - exact).norm() / exact.norm()).item()
    return errors


def memory(method: Method, workload: Workload, steps: int, repeats: int) -> dict[str, Any]:
    """Peak bytes of a call, of one plain gradient and of one Hessian-vector product, and those of the parameters.

    A call with one step goes before, so that what torch sets up once is not counted.
    """
    problem = workload.problem(steps)
    call = method.prepare(problem)
    if not isinstance(call, Elsewhere):
        method.prepare(workload.problem(1))()
    return {
        "bytes": call.peak_memory() if isinstance(call, Elsewhere) else peak_memory(call),
        "gradient_bytes": peak_memory(lambda: support_gradients(problem)),
        "product_bytes": peak_memory(lambda: support_products(problem)),
        "theta_bytes": sum(p.numel() * p.element_size() for p in problem.parameters.values()),
    }


def count(method: Method, workload: Workload, steps: int, repeats: int) -> dict[str, Any]:
    """Operations of a call, and its arithmetic beside that of one plain gradient; no clock is read."""
    problem = workload.problem(steps)
    call = method.prepare(problem)
    if isinstance(call, Elsewhere):  # torch dispatches nothing there
        return {}
    counts = counted(call)
    unit = counted(lambda: support_gradients(problem, math=True))
    return {"operations": counts.operations, "flops": counts.flops, "unit_flops": unit.flops}


def time(method: Method, workload: Workload, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds of a call, and of one plain support gradient of the same tasks."""
    problem = workload.problem(steps)
    unit = timed(lambda: support_gradients(problem), repeats=repeats)
    call = method.prepare(problem)
    timing = call.timed(repeats) if isinstance(call, Elsewhere) else timed(call, repeats=repeats)
    return {"seconds": timing.median, "spread": timing.spread, "unit_seconds": unit.median}


def first(method: Method, workload: Workload, steps: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of the first call, with all that is compiled for it; nothing is on disk to begin with."""
    problem = workload.problem(steps)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # this process measures nothing else
        begun = cpu_seconds()
        call = method.prepare(problem)
        if isinstance(call, Elsewhere):
            return {"first": call.start()["cpu"]}
        call()
        return {"first": cpu_seconds() - begun}


PASSES: dict[str, Callable[[Method, Workload, int, int], dict[str, Any]]] = {
    "check": check,
    "memory": memory,
    "count": count,
    "time": time,
    "first": first,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("steps", type=int)
    parser.add_argument("kind", choices=PASSES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of the rivals, about torch functions that have moved
    with contextlib.redirect_stdout(sys.stderr):
        found = PASSES[options.kind](
            METHODS[options.method], WORKLOADS[options.workload], options.steps, options.repeats
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
