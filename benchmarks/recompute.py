"""Memory and time of second derivatives whose activations are recomputed, in gradients of the same model.

`python -m benchmarks.recompute` prints a table in Markdown, for one task of W3 (a transformer of four layers): the peak
by the allocator's account and the processor time of products and meta-gradients, as ratios to those of one plain
gradient, measured in the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.workloads import WORKLOADS
from imaml import CG, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective
from imaml.measure import peak_memory

LAYERS = [nn.TransformerEncoderLayer]


def engines() -> dict[str, tuple[MetaGradient, Any]]:
    """Strategies, each with the modules that are recomputed."""
    few, many = (GradientDescent(lr=0.01, steps=steps) for steps in (4, 16))

    def implicit(**options: Any) -> ImplicitMAML:
        solver = CG(max_steps=5, rtol=0.0)
        return ImplicitMAML(inner=few, solver=solver, error_bound=False, on_failure="ignore", chunk_size=1, **options)

    states: dict[str, Any] = {"chunk_size": 1, "linearize": False}
    return {
        "`MAML`, 4 steps": (MAML(inner=few, **states), ()),
        "the same, layers recomputed": (MAML(inner=few, **states), LAYERS),
        "the same, and `microbatch_size=1`": (MAML(inner=few, microbatch_size=1, **states), LAYERS),
        "`MAML`, 16 steps, `checkpoints=4`": (MAML(inner=many, checkpoints=4, **states), ()),
        "16 steps, layers recomputed": (MAML(inner=many, checkpoints=4, **states), LAYERS),
        "`ImplicitMAML`, 5 CG steps": (implicit(), ()),
        "5 CG steps, layers recomputed": (implicit(), LAYERS),
    }


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    torch.set_num_threads(1)
    problem = WORKLOADS["W3"].problem(4)
    tasks, parameters = problem.tasks[:1], list(problem.parameters.values())
    inputs, target = tasks.support[0][0], tasks.support[1][0]

    def gradient() -> object:  # by the fused kernels of attention
        return torch.autograd.grad(problem.criterion(problem.model(inputs), target), parameters)

    gradient()
    unit_seconds, unit_bytes = min(seconds(gradient) for _ in range(3)), peak_memory(gradient)
    print("| | peak, in gradients | time, in gradients | MB |\n|---|---:|---:|---:|")
    print(f"| one gradient, by torch | 1.00 | 1.0 | {unit_bytes / 1e6:.0f} |")
    for name, (engine, blocks) in engines().items():
        objective = Objective(problem.model, problem.criterion, recompute=blocks)

        def call(engine: MetaGradient = engine, objective: Objective = objective) -> object:
            return engine.value_and_grad(objective, tasks)

        call()
        taken, peak = min(seconds(call) for _ in range(2)), peak_memory(call)
        print(f"| {name} | {peak / unit_bytes:.2f} | {taken / unit_seconds:.1f} | {peak / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
