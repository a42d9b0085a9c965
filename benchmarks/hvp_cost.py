"""Time and peak memory of a meta-gradient, by Hessian-vector product mode, relative to FOMAML's in the same run.

    python -m benchmarks.hvp_cost

The transformer of `benchmarks.memory`, one task, one inner step, float32, one thread.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional as F

from benchmarks.memory import MIB, Transformer
from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, Objective, TaskBatch
from imaml.measure import peak_memory, timed


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(vocabulary=1000, width=256, layers=4)
    support, query = ((torch.randint(1000, (1, 8, 128)), torch.randint(5, (1, 8))) for _ in range(2))
    tasks, objective = TaskBatch(support=support, query=query), Objective(model, F.cross_entropy)
    inner, solver = GradientDescent(lr=0.01, steps=1), CG(max_steps=5)
    implicit = partial(ImplicitMAML, inner=inner, solver=solver, on_failure="ignore", error_bound=False)
    engines = {
        "`FOMAML`": FOMAML(inner=inner),
        "`MAML`, reverse-over-reverse": MAML(inner=inner, hvp="reverse-over-reverse"),
        "`MAML`, forward-over-reverse": MAML(inner=inner, hvp="forward-over-reverse"),
        "`MAML`, finite-difference": MAML(inner=inner, hvp="finite-difference"),
        "`ImplicitMAML`, 5 CG steps": implicit(),
        "`ImplicitMAML`, 5 CG steps, `linearize=False`": implicit(linearize=False),
    }
    seconds = {name: timed(partial(engine, objective, tasks), repeats=5).median for name, engine in engines.items()}
    print("| engine | time, in FOMAMLs | peak MiB |\n|---|---:|---:|")
    for name, engine in engines.items():
        peak = peak_memory(partial(engine, objective, tasks))
        print(f"| {name} | {seconds[name] / seconds['`FOMAML`']:.2f} | {peak / MIB:.1f} |")


if __name__ == "__main__":
    main()
