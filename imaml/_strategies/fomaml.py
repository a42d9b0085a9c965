"""First-order MAML."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from imaml._engine.problem import Problem
from imaml._engine.report import Pullback
from imaml._strategies.fomaml_costs import FOMAMLCosts
from imaml._strategies.meta_gradient import MetaGradient
from imaml.planning._costs import Costs


@dataclass(frozen=True, kw_only=True)
class FOMAML(MetaGradient):
    r"""Computes the first-order meta-gradient: that of the query loss at the adapted parameters, as if they were theta.

    Formula: $\nabla L_{query}(\phi)$, with $\partial \phi / \partial \theta$ taken for $I$. Other parameters that
    require grad get the direct part of their gradient only.

    Equal to `MAML` where the support Hessian is zero and there is no proximal term. Elsewhere it is biased, the more so
    the larger `lr * steps`.

    Cost per task: K + 1 gradients. Memory: one gradient, whatever K.

    Not for learning parameters that act through the support loss or the inner optimiser alone, whose gradient is zero
    here: use `MAML` or `ImplicitMAML`.

    Source: Finn et al. 2017, section 5.2. For the arguments see `MetaGradient`.
    """

    _manages_without_second_derivatives: ClassVar[bool] = True
    _costs: ClassVar[type[Costs] | None] = FOMAMLCosts
    _without_path: ClassVar[str] = (
        "FOMAML differentiates the query loss alone, and this acts through the inner loop or not at all; MAML, or "
        "ImplicitMAML for what the support loss uses, differentiates that"
    )

    def pull_back(self, problem: Problem) -> Pullback:
        query = problem.judge(problem.adapt())
        return Pullback(query.adapted, query.shared, problem.outcome(query))
