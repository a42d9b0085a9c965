"""Peak memory and time of exact MAML with many steps and few checkpoints, beside those of the unrolled loop.

    python -m benchmarks.loop [--cases "W3, 64 steps" ...] [--small]

The loop keeps one graph of all steps, so what it takes grows linearly with their number: it is measured at two numbers
of steps that fit, and its figures at more are those of the line through them. `MAML(checkpoints=4)` is measured as it
is, with the model's layers recomputed, with slices of one example besides, and for a HuggingFace model by its own
gradient checkpointing. Its time is that of all steps. Its peak is that of 6, where it has all the states that it ever
has, since the profiler keeps the events of a call: those of 64 steps take more than 20 GB. Peak by the allocator's
account, processor time, one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from benchmarks.ratios import Cost, seconds
from benchmarks.rivals import METHODS
from benchmarks.workloads import WORKLOADS, Problem, Sentences
from imaml import MAML, GradientDescent, Objective
from imaml.measure import peak_memory

CHECKPOINTS = 4
HEADER = "| | MB | of the loop's memory | of the loop's time |\n|---|---:|---:|---:|"


@dataclass(frozen=True, kw_only=True)
class Case:
    workload: str
    steps: int
    few: tuple[int, int]
    """Numbers of steps at which the loop is measured."""
    layers: str
    """Which modules are recomputed."""


CASES = {
    "W3, 16 steps": Case(workload="W3", steps=16, few=(4, 8), layers="encoder.layers.*"),
    "W3, 64 steps": Case(workload="W3", steps=64, few=(4, 8), layers="encoder.layers.*"),
    "W4, 16 steps": Case(workload="W4", steps=16, few=(2, 4), layers="encoder.layers.*"),
    "MiniLM, 16 steps": Case(workload="MiniLM", steps=16, few=(2, 4), layers="body.encoder.layer.*"),
}
SMALL = Case(workload="small", steps=3, few=(1, 2), layers="encoder.layers.*")


def loop(case: Case, problem: Problem) -> Cost:
    """The loop at the steps of a case, along the line through two measurements."""
    first, last = (
        Cost.of(METHODS["create_graph loop"].prepare(replace(problem, steps=steps)), repeats=1) for steps in case.few
    )
    further = (case.steps - case.few[0]) / (case.few[1] - case.few[0])
    return Cost(
        bytes=round(first.bytes + further * (last.bytes - first.bytes)),
        seconds=first.seconds + further * (last.seconds - first.seconds),
    )


def settings(case: Case, problem: Problem) -> Iterator[tuple[str, MAML, Objective]]:
    """Engines by name, each with the objective that it is to be called with."""
    engine = MAML(inner=GradientDescent(lr=problem.lr, steps=case.steps), checkpoints=CHECKPOINTS, chunk_size=1)
    model, criterion = problem.model, problem.criterion
    recomputed = Objective(model, criterion, recompute=[case.layers])
    yield f"`MAML`, `checkpoints={CHECKPOINTS}`", engine, Objective(model, criterion)
    yield "the same, layers recomputed", engine, recomputed
    yield "the same, and `microbatch_size=1`", replace(engine, microbatch_size=1), recomputed
    if isinstance(model, Sentences):
        model.body.gradient_checkpointing_enable()
        model.train()  # HuggingFace's models recompute in training mode alone
        yield "`gradient_checkpointing_enable()` instead", engine, Objective(model, criterion)


def table(name: str, case: Case) -> Iterator[str]:
    problem = WORKLOADS[case.workload].problem(case.steps)
    found = loop(case, problem)
    at = " and ".join(map(str, case.few))
    yield f"{name} of {WORKLOADS[case.workload].title}:\n\n{HEADER}"
    yield f"| one graph of all steps, from {at} steps | {found.bytes / 1e6:.0f} | 1 | 1 |"
    for setting, engine, objective in settings(case, problem):
        few = replace(engine, inner=replace(engine.inner, steps=min(case.steps, CHECKPOINTS + 2)))
        few.value_and_grad(objective, problem.tasks)  # what is only loaded or looked at once
        peak = peak_memory(partial(few.value_and_grad, objective, problem.tasks))
        time = seconds(partial(engine.value_and_grad, objective, problem.tasks)) / found.seconds
        yield f"| {setting} | {peak / 1e6:.0f} | 1/{found.bytes / peak:.1f} | {time:.2f} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    cases = {"3 steps": SMALL} if options.small else {name: CASES[name] for name in options.cases}
    for name, case in cases.items():
        for line in table(name, case):
            print(line, flush=True)


if __name__ == "__main__":
    main()
