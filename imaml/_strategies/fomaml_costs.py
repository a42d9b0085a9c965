"""What first-order MAML costs."""

from __future__ import annotations

from typing import ClassVar

from imaml._curvature.product import Graph
from imaml.planning._costs import ChunkUse, Costs, Facts, Work


class FOMAMLCosts(Costs):
    """The inner loop, then the gradient of the query loss."""

    acts_through: ClassVar[tuple[str, ...]] = ()

    def peak(self, chunk: ChunkUse) -> float:
        """See the class."""
        return max(self.inner_peak(chunk), self.query_peak(chunk))

    def work(self, facts: Facts) -> Work:
        """K + 1 gradients."""
        gradients, hvps = self.inner_counts(facts)
        equivalents = facts.gradient * (gradients + 1) + facts.product(Graph.KEPT) * hvps
        return Work(gradients=gradients + 1, hvps=hvps, equivalents=equivalents)
