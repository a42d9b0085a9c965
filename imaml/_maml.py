"""Exact MAML: the adjoint of the inner loop, written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from imaml._curvature import Curvature, HvpMode, check_mode
from imaml._numbers import check_integer
from imaml._problem import Problem
from imaml._states import states_backwards
from imaml._strategy import MetaGradient, Pullback


@dataclass(frozen=True, kw_only=True)
class MAML(MetaGradient):
    """Exact second-order MAML (Finn et al. 2017): (d phi_K / d theta)' v with v the gradient of L_query at phi_K.

    Computed by a reverse sweep over the inner steps, never through a K-step graph. With a the cotangent of phi_{k+1} =
    U(phi_k, g_k) and g_k = grad L_support(phi_k) + Lambda (phi_k - theta): pull a through the elementwise U to get its
    cotangents (a, w) for (phi_k, g_k), then a <- a + H_k w + Lambda w, one Hessian-vector product a step.

    Cost per task: K + 1 gradients and K Hessian-vector products. Memory: one product plus the K states, `(n,)` each;
    with `checkpoints=m` at most m states, and the steps between them are recomputed on the binomial schedule that
    minimises recomputation (Griewank & Walther 2000, Algorithm 799); with `linearize=True` the graphs of all K steps,
    for a forward and a backward pass less a step.

    Args:
        inner: See `MetaGradient`, as for `regularization` and `chunk_size`.
        checkpoints: How many inner states are kept at most besides theta, >= 0; None: all of them.
        linearize: Keep the graph of each inner step, so that its product costs about one gradient less; False evaluates
            the step anew. None: where `chunk_size` and `checkpoints` are left open and the graphs are small, at most
            192 MiB. The modes other than reverse-over-reverse always evaluate anew.
        hvp: How Hessian-vector products are computed. "auto" uses "reverse-over-reverse", or "finite-difference" where
            the model has an operation without second derivatives; the report says which. "forward-over-reverse" is
            exact too. Finite differences are inexact and can be of no use below float64: docs/numerics.md has figures.
    """

    checkpoints: int | None = None
    linearize: bool | None = None
    hvp: HvpMode = "auto"

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_mode(self.hvp)
        if self.linearize and self.microbatch_size is not None:
            raise ValueError(
                "linearize=True keeps graphs, of which microbatch_size holds one slice at a time. Expected "
                f"microbatch_size=None. Got {self.microbatch_size}: use one of the two."
            )
        if self.checkpoints is not None:
            check_integer("`checkpoints`, unless None,", self.checkpoints, least=0)
            if self.linearize:
                raise ValueError(
                    "linearize=True keeps the graphs of all inner steps. Expected checkpoints=None. "
                    f"Got {self.checkpoints}: use one of the two."
                )

    def _pull_back(self, problem: Problem) -> Pullback:
        phi, curvatures = self._adapt(problem)
        query = problem.judge(phi)
        cotangent, fixed, damping, outcome = query.adapted, query.fixed, problem.damping, problem.outcome(query)
        del query, phi  # they would live through the sweep
        pulled_by_theta = 0 if damping is None else torch.zeros_like(cotangent)
        for curvature in curvatures:
            cotangent, w = problem.inner.pullback(cotangent)
            product, mixed = curvature.product(w, mixed=fixed is not None)
            cotangent = product.add_(cotangent)
            if damping is not None:
                cotangent.addcmul_(w, damping)
                pulled_by_theta -= damping * w
            if fixed is not None and mixed is not None:
                fixed.add_(mixed)
        return Pullback(cotangent + pulled_by_theta, fixed, outcome)

    def _adapt(self, problem: Problem) -> tuple[Tensor, Iterator[Curvature]]:
        """phi_K, and the curvature of the support loss at the states before it, the last first."""
        steps = problem.inner.steps
        keeps_graphs = problem.plan.keeps_graphs if self.linearize is None else self.linearize
        if keeps_graphs and self.checkpoints is None:
            phi, kept = problem.theta, []
            for step in range(steps):
                kept.append(Curvature(problem.support, phi, step, mode=self.hvp, graph="once"))
                phi = problem.inner.update(phi, problem.gradient(phi, step, kept[-1].take_gradient()))
            return phi, (kept.pop() for _ in range(steps))
        states = states_backwards(problem, self.checkpoints)
        return next(states), (
            Curvature(problem.support, phi, step, mode=self.hvp, graph="rebuild")
            for step, phi in zip(reversed(range(steps)), states, strict=True)
        )
