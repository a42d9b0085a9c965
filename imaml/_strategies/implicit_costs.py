"""What implicit MAML costs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from imaml._curvature.product import Graph
from imaml._engine.problem import Problem
from imaml._strategies.error_bound import LANCZOS_STEPS, LANCZOS_VECTORS
from imaml.planning._costs import ChunkUse, Costs, Facts, Stages, Work
from imaml.planning._solve import Solve, solve

_GAUSS_NEWTON = 1
"""What a product with J'BJ costs, in gradients: three passes through a model that is kept as a linear map. One whose
blocks are recomputed is kept as little as for a product with H."""


class ImplicitCosts(Costs):
    """The inner loop, the gradient of the query loss, the solve, and the error bound's evaluation elsewhere.

    During the solve it holds phi, the query gradient, the solver's vectors, and a product or the graph behind all of
    them; during the evaluation elsewhere the solution, the displaced point and the direction besides.
    """

    acts_through: ClassVar[tuple[str, ...]] = ("regularization",)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """No graph that is kept during the solve, where there is one."""
        return [{"linearize": False}] if self.engine._may_rebuild else []

    def _measure(self, problem: Problem, stages: Stages) -> None:
        graph: Graph = self.engine._graph
        if stages.missing(graph.value):
            phi = stages.after
            if graph is Graph.REBUILT:
                problem.settle(self.engine.hvp)
            with stages.account.stage(graph.value):
                curvature, gradient = self.engine._curvature(problem, phi)
            stages.product(f"{graph.value} product", curvature, torch.ones_like(phi), mixed=False)
            if problem.snapshot.shared:
                stages.product(f"{graph.value} mixed", curvature, torch.ones_like(phi), mixed=True)
            del curvature, gradient

    def solve(self, theta: Tensor) -> Solve:
        """See `Costs`."""
        like = theta.new_empty(0, dtype=self.engine.solver_dtype or theta.dtype)
        return solve(self.engine.solver, len(theta), like, starts=self.engine.warm_start)

    def peak(self, chunk: ChunkUse) -> float:
        """See the class."""
        kind, with_bound, vector = self.engine._graph.value, self.engine._has_bound, chunk.vector
        curvature, product = chunk[kind], chunk[f"{kind} product"]
        query, solved, like = chunk["query"], chunk.facts.solve, self.engine.solver_dtype or chunk.facts.dtype
        cast = chunk.tasks * chunk.facts.adapted * like.itemsize if like != chunk.facts.dtype else 0
        given = cast + 2 * vector * self.engine.warm_start  # b in the solver's dtype, and the start
        given += 2 * vector * (self.engine.damping == "auto")  # of a solve that is taken again, b and the solution
        judged = vector + query.held
        graph = curvature.held - vector  # the gradient is given back, or becomes the slope
        slope = vector * with_bound
        scaled = vector * (chunk.facts.scaled or like != chunk.facts.dtype)  # what a product is taken of
        solving = judged + graph + slope
        peaks: list[float] = [
            self.inner_peak(chunk),
            self.query_peak(chunk),
            judged + curvature.peak,
            solving + given + chunk.tasks * solved.peak,
            solving + given + chunk.tasks * solved.at_product + scaled + product.peak,
        ]
        solution = solving + vector
        if chunk.facts.shared:
            peaks.append(solution + vector + chunk[f"{kind} mixed"].peak)
        if self.engine.damping and self.engine.error_bound:
            peaks.append(solution + scaled + product.peak)
        if with_bound:
            there = judged + slope + 3 * vector  # the solution, the direction, and the point along it
            if not solved.has_eigenvalue:
                peaks.append(solution + LANCZOS_VECTORS * vector + scaled + product.peak)
            peaks += [
                there + query.peak,
                there + vector + curvature.peak,
                there + graph + scaled + product.peak,
            ]
        # After the inner loop batch after batch is fetched, beside that of the last step, and products are summed up.
        return max(peaks) + (chunk.facts.fetched + vector if chunk.facts.fetched else 0)

    def work(self, facts: Facts) -> Work:
        """K + 2 gradients and the solver's products, and two gradients and a product for the error bound."""
        gradients, inner_hvps = self.inner_counts(facts)
        hvps = facts.solve.products + (2 if self.engine.warm_start else 0)
        # solves that "auto" takes again are not foreseen
        hvps += bool(self.engine.damping) and self.engine.error_bound
        if self.engine._has_bound:
            hvps += 1 + (0 if facts.solve.has_eigenvalue else min(LANCZOS_STEPS, facts.adapted))
        gradients += 4 if self.engine._has_bound else 2
        each = mixed = facts.product(self.engine._graph)
        if self.engine.curvature == "ggn":
            each = facts.product(Graph.KEPT) if facts.recomputes else _GAUSS_NEWTON
            mixed = facts.product(Graph.REBUILT)
        inner = facts.gradient * gradients + facts.product(Graph.KEPT) * inner_hvps
        equivalents = inner + each * hvps + mixed * bool(facts.shared)
        return Work(gradients=gradients, hvps=inner_hvps + hvps + bool(facts.shared), equivalents=equivalents)
