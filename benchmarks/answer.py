"""A process that answers for one method of `benchmarks.rivals` (`benchmarks.pipes`).

python -m benchmarks.answer METHOD WORKLOAD STEPS [--threads N]
"""

from __future__ import annotations

import argparse
import os
import warnings
from typing import Any

import numpy as np
import torch

from benchmarks.pipes import serve_call
from benchmarks.reference import flat
from benchmarks.rivals import METHODS, Call
from benchmarks.workloads import WORKLOADS
from imaml.measure import peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("steps", type=int)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # of the rivals, about torch functions that have moved
    problem = WORKLOADS[options.workload].problem(options.steps)
    calls: list[Call] = []

    def prepare() -> Call:
        calls.append(METHODS[options.method].prepare(problem))
        return calls[0]

    def save(path: str, found: Any) -> None:
        with open(path, "wb") as file:
            np.save(file, flat(found).numpy())

    serve_call(prepare, save, memory=lambda _: {"bytes": peak_memory(calls[0])})


if __name__ == "__main__":
    main()
