"""Memory and time of meta-gradients whose activations are recomputed, in gradients of the same model.

    python -m benchmarks.recompute [--small]

Prints a table in Markdown, for one task of W3 (a transformer of four layers): the peak by the allocator's account and
the processor time, as ratios to those of one plain gradient, measured in the same run on one thread. Single products
are measured by `benchmarks.products`.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from benchmarks.ratios import HEADER, Cost, gradient
from benchmarks.workloads import WORKLOADS
from imaml import CG, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective

LAYERS = [nn.TransformerEncoderLayer]


def engines(*steps: int) -> dict[str, tuple[MetaGradient, Any]]:
    """Strategies with few or many steps, each with the modules that are recomputed."""
    few, many = (GradientDescent(lr=0.01, steps=number) for number in steps)

    def implicit(**options: Any) -> ImplicitMAML:
        solver = CG(max_steps=5, rtol=0.0)
        return ImplicitMAML(inner=few, solver=solver, error_bound=False, on_failure="ignore", chunk_size=1, **options)

    states: dict[str, Any] = {"chunk_size": 1, "linearize": False}
    return {
        f"`MAML`, {few.steps} steps": (MAML(inner=few, **states), ()),
        "the same, layers recomputed": (MAML(inner=few, **states), LAYERS),
        "the same, and `microbatch_size=4`": (MAML(inner=few, microbatch_size=4, **states), LAYERS),
        "the same, and `microbatch_size=1`": (MAML(inner=few, microbatch_size=1, **states), LAYERS),
        f"`MAML`, {many.steps} steps, `checkpoints=4`": (MAML(inner=many, checkpoints=4, **states), ()),
        f"{many.steps} steps, layers recomputed": (MAML(inner=many, checkpoints=4, **states), LAYERS),
        "the same, `microbatch_size=4`": (MAML(inner=many, checkpoints=4, microbatch_size=4, **states), LAYERS),
        "`ImplicitMAML`, 5 CG steps": (implicit(), ()),
        "5 CG steps, layers recomputed": (implicit(), LAYERS),
        "5 CG steps, layers recomputed, `linearize=False`": (implicit(linearize=False), LAYERS),
        "5 CG steps, layers recomputed, `microbatch_size=4`": (implicit(microbatch_size=4), LAYERS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload, steps = ("small", (1, 3)) if options.small else ("W3", (4, 16))
    problem = WORKLOADS[workload].problem(steps[0])
    unit = gradient(problem)
    print(HEADER)
    print(unit.row("one gradient, by torch", unit))
    for name, (engine, blocks) in engines(*steps).items():
        objective = Objective(problem.model, problem.criterion, recompute=blocks)

        def call(engine: MetaGradient = engine, objective: Objective = objective) -> object:
            return engine.value_and_grad(objective, problem.tasks)

        print(Cost.of(call).row(name, unit), flush=True)


if __name__ == "__main__":
    main()
