"""The diagonal as a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml_solvers._dense import assemble
from imaml_solvers._operator import LinearOperator
from imaml_solvers._preconditioner import Preconditioner, probe
from imaml_solvers._vectors import largest_entry


@dataclass(frozen=True, kw_only=True)
class Jacobi(Preconditioner):
    r"""Preconditions by the diagonal of A, estimated from products with random signs.

    $$M = \mathrm{diag}(d)^{-1}, \quad d = \text{mean of } v * A v \text{ over probes v of random signs}$$

    An entry of $d$ is unbiased, with the variance $\sum_{j \ne i} a_{ij}^2 / probes$. It is not trusted below its own
    standard error, and raised to that: so M is positive definite. For n <= probes the diagonal is exact, from products
    with the unit vectors. Negative entries, of indefinite A, count by their size, and zeros as the largest entry.

    Cost: `probes` products, n if that is less. Memory: three vectors, of which one stays.

    For a badly scaled A whose entries beside the diagonal are small. Elsewhere d is noise, which slows CG down (two to
    four times for I + H / lambda of small convolutional networks).

    Source: Bekas, Kokiopoulou & Saad 2007.

    Args:
        probes: How many probes, at least 2.
        seed: Seed of the signs.
    """

    probes: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields; raises ValueError."""
        if self.probes < 2:
            raise ValueError(f"`probes` must be >= 2. Got {self.probes}.")

    def build(self, op: LinearOperator, like: Tensor) -> LinearOperator:
        """See `Preconditioner`."""
        diagonal = self._diagonal(op, like).abs()
        largest = largest_entry(diagonal).unsqueeze(-1)
        inverse = largest / diagonal.where(diagonal > 0, largest)  # the scale of M is of no account
        inverse = inverse.where((largest > 0) & torch.isfinite(largest), 1)
        return LinearOperator(lambda r: inverse * r)

    def _diagonal(self, op: LinearOperator, like: Tensor) -> Tensor:
        if like.shape[-1] <= self.probes:
            return assemble(op, like).diagonal(dim1=-2, dim2=-1)
        mean, spread = torch.zeros_like(like), torch.zeros_like(like)
        for count, noise in enumerate(probe(like, self.seed, self.probes).unbind(-1), start=1):
            signs = noise.sign().to(like.dtype).expand_as(like)
            change = signs * op.mv(signs) - mean
            mean = mean + change / count
            spread = spread + change.square() * ((count - 1) / count)
        return mean.abs().maximum((spread / (self.probes * (self.probes - 1))).sqrt())
