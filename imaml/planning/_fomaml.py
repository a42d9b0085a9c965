"""What first-order MAML costs."""

from __future__ import annotations

from collections.abc import Collection

from imaml._problem import Problem
from imaml.planning._costs import LINEARISED, Chunk, Costs, Facts, Work


class FOMAMLCosts(Costs):
    """The inner loop, then the gradient of the query loss."""

    def _through_hyper(self, problem: Problem) -> Collection[str]:
        return ()

    def peak(self, chunk: Chunk) -> float:
        """See the class."""
        return max(self.inner_peak(chunk), self.query_peak(chunk))

    def work(self, facts: Facts) -> Work:
        """K + 1 gradients."""
        gradients, hvps = self.inner_counts(facts)
        return Work(gradients=gradients + 1, hvps=hvps, equivalents=gradients + 1 + LINEARISED * hvps)
