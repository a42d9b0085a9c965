"""Memory and time of one Hessian-vector product, in gradients of the same model.

    python -m benchmarks.products [--models W3 deep] [--hvp auto forward-over-reverse] [--small]

The product is the engine's, as the sweep of `MAML` takes it: with nothing kept from the inner loop. Its result counts;
the point and the vector were there before it. Peak by the allocator's account, processor time, one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.ratios import HEADER, Cost, gradient
from benchmarks.workloads import WORKLOADS
from imaml import GradientDescent, MetaGradient, Objective, Pullback
from imaml._curvature.product import Graph, HvpMode
from imaml._engine.problem import Problem

LAYERS = [nn.TransformerEncoderLayer]
SETTINGS: dict[str, tuple[list[type[nn.Module]], int | None]] = {
    "as it is": ([], None),
    "`microbatch_size=1`": ([], 1),
    "layers recomputed": (LAYERS, None),
    "layers recomputed, `microbatch_size=4`": (LAYERS, 4),
    "layers recomputed, `microbatch_size=1`": (LAYERS, 1),
}


@dataclass(frozen=True, kw_only=True)
class OneProduct(MetaGradient):
    """A strategy that measures a product with H, and returns it in the place of a meta-gradient."""

    hvp: HvpMode
    costs: list[Cost] = field(default_factory=list)

    def pull_back(self, problem: Problem) -> Pullback:
        phi = problem.adapt()
        query = problem.judge(phi)

        def product() -> Tensor:
            return problem.curvature(phi, 0, self.hvp, Graph.REBUILT).product(query.adapted)[0]

        self.costs.append(Cost.of(product))
        return Pullback(product(), query.shared, problem.outcome(query))


def table(workload: str, modes: list[HvpMode]) -> Iterator[str]:
    problem = WORKLOADS[workload].problem(1)
    unit = gradient(problem)
    yield f"{WORKLOADS[workload].title}:\n\n{HEADER}"
    yield unit.row("one gradient, by torch", unit)
    for mode in modes:
        for name, (blocks, size) in SETTINGS.items():
            engine = OneProduct(
                inner=GradientDescent(lr=problem.lr, steps=0), hvp=mode, microbatch_size=size, chunk_size=1
            )
            engine.value_and_grad(Objective(problem.model, problem.criterion, recompute=blocks), problem.tasks)
            yield engine.costs[0].row(f"product, {name}, {mode}", unit)
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=WORKLOADS, default=["W3", "deep"])
    parser.add_argument("--hvp", nargs="+", choices=get_args(HvpMode), default=["auto"])
    parser.add_argument("--small", action="store_true", help="a small model, to try the script")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    for name in ["small"] if options.small else options.models:
        for line in table(name, options.hvp):
            print(line, flush=True)


if __name__ == "__main__":
    main()
