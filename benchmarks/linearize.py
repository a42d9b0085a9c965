"""Memory and cost of exact MAML between no graph of an inner step and all of them.

    python -m benchmarks.linearize [--time] [--small]

W3, a transformer of four layers, one task, float32, one thread: the peak by the allocator's account, with its layers
recomputed and not, and the arithmetic in gradients as `MetaGradient.plan` counts it. With `--time` the processor time
too. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.storage import problem
from imaml import MAML, GradientDescent, Objective
from imaml.measure import peak_memory

GRAPHS: dict[tuple[int, int | None], tuple[int, ...]] = {
    (4, None): (0, 1, 2, 3, 4),
    (16, 4): (0, 2, 4, 8),
}
"""By the number of steps, and of checkpoints."""


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="measure the time too, on a machine that is idle")
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain, tasks = problem(options.small)
    objectives = [plain, Objective(plain.model, plain.loss, recompute=[nn.TransformerEncoderLayer])]
    for objective in objectives:  # what torch sets up once
        MAML(inner=GradientDescent(lr=0.01, steps=1)).value_and_grad(objective, tasks)
    names = ["K", "`checkpoints`", "`linearize`", "cost, in gradients", "MB", "layers recomputed, MB"]
    names += ["s", "layers recomputed, s"] if options.time else []
    print("| " + " | ".join(names) + " |\n|" + "---:|" * len(names))
    for (steps, checkpoints), numbers in GRAPHS.items():
        for graphs in numbers:
            inner = GradientDescent(lr=0.01, steps=steps)
            engine = MAML(inner=inner, chunk_size=1, linearize=graphs, checkpoints=checkpoints)
            [setting] = [each for each in engine.plan(plain, tasks).settings if not each.options]
            calls = [lambda of=of, engine=engine: engine.value_and_grad(of, tasks) for of in objectives]
            cells = [f"{peak_memory(call) / 1e6:.0f}" for call in calls]
            if options.time:
                cells += [f"{min(seconds(call) for _ in range(2)):.2f}" for call in calls]
            row = [steps, checkpoints or "", graphs, f"{setting.gradient_equivalents:.0f}", *cells]
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
