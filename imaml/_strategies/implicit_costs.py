"""What implicit MAML costs."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from imaml._engine.problem import Problem
from imaml.planning._costs import GAUSS_NEWTON, INEXACT, LINEARISED, REBUILT, Chunk, Costs, Facts, Stages, Work
from imaml.planning._solver import Solve, solve

_LANCZOS_VECTORS, _LANCZOS_STEPS = 3, 10


class ImplicitCosts(Costs):
    """The inner loop, the gradient of the query loss, the solve, and the error bound's evaluation elsewhere.

    During the solve it holds phi, the query gradient, the solver's vectors, and a product or the graph behind all of
    them; during the evaluation elsewhere the solution, the displaced point and the direction besides.
    """

    acts_through: ClassVar[tuple[str, ...]] = ("regularization",)

    def variants(self, device: torch.device) -> list[dict[str, Any]]:
        """A graph that is kept during the solve, or none."""
        engine = self.engine
        rebuilds = engine.hvp not in ("auto", "reverse-over-reverse") or engine.microbatch_size is not None
        if rebuilds or engine.curvature == "ggn" or not engine.linearize:
            return [{}]
        return [{"linearize": True}, {"linearize": False}]

    def measured(self, device: torch.device) -> list[dict[str, Any]]:
        """See `Costs`."""
        return self.variants(device)[1:]

    @property
    def _kind(self) -> str:
        return "kept" if self.engine.linearize else "rebuilt"

    @property
    def _with_bound(self) -> bool:
        engine = self.engine
        return engine.error_bound and engine.curvature == "hessian" and engine.regularization is not None

    def _measure(self, problem: Problem, stages: Stages) -> None:
        kind, mixed = self._kind, bool(problem.snapshot.shared)
        if stages.missing(f"{kind} curvature"):
            phi = stages.after
            with stages.account.stage(f"{kind} curvature"):
                curvature, gradient = self.engine._curvature(problem, phi)
            stages.product(f"{kind} product", curvature, torch.ones_like(phi), mixed=False)
            if mixed:
                stages.product(f"{kind} mixed", curvature, torch.ones_like(phi), mixed=True)
            del curvature, gradient

    def solve(self, theta: Tensor) -> Solve:
        """See `Costs`."""
        like = theta.new_empty(0, dtype=self.engine.solver_dtype or theta.dtype)
        return solve(self.engine.solver, len(theta), like, starts=self.engine.warm_start)

    def peak(self, chunk: Chunk) -> float:
        """See the class."""
        curvature, product, vector = chunk[f"{self._kind} curvature"], chunk[f"{self._kind} product"], chunk.vector
        query, solved, like = chunk["query"], chunk.facts.solve, self.engine.solver_dtype or chunk.facts.dtype
        assert solved is not None
        cast = chunk.tasks * chunk.facts.adapted * like.itemsize if like != chunk.facts.dtype else 0
        given = cast + 2 * vector * self.engine.warm_start  # b in the solver's dtype, and the start
        judged = vector + query.held
        graph = curvature.held - vector  # the gradient is given back, or becomes the slope
        slope = vector * self._with_bound
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
            peaks.append(solution + vector + chunk[f"{self._kind} mixed"].peak)
        if self._with_bound:
            there = judged + slope + 3 * vector  # the solution, the direction, and the point along it
            if not solved.has_eigenvalue:
                peaks.append(solution + _LANCZOS_VECTORS * vector + scaled + product.peak)
            peaks += [
                there + query.peak,
                there + vector + curvature.peak,
                there + graph + scaled + product.peak,
            ]
        return max(peaks)

    def work(self, facts: Facts) -> Work:
        """K + 2 gradients and the solver's products, and two gradients and a product for the error bound."""
        gradients, inner_hvps = self.inner_counts(facts)
        solved = facts.solve
        assert solved is not None
        hvps = solved.products + (2 if self.engine.warm_start else 0)
        if self._with_bound:
            hvps += 1 + (0 if solved.has_eigenvalue else min(_LANCZOS_STEPS, facts.adapted))
        gradients += 4 if self._with_bound else 2
        each = LINEARISED if self.engine.linearize else REBUILT
        if facts.mode == "finite-difference":
            each = INEXACT
        elif self.engine.curvature == "ggn":
            each = GAUSS_NEWTON
        mixed = REBUILT if self.engine.curvature == "ggn" else each
        equivalents = gradients + LINEARISED * inner_hvps + each * hvps + mixed * bool(facts.shared)
        return Work(gradients=gradients, hvps=inner_hvps + hvps + bool(facts.shared), equivalents=equivalents)
