"""What the engine's modes of Hessian-vector products give at one point, and how well they obey what products obey."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from imaml._curvature.curvature import Curvature
from imaml._curvature.derivatives import Derivatives
from imaml._curvature.product import Graph, HvpMode
from imaml._leaves import wrapped
from imaml._losses.loss import Loss
from imaml._losses.record import Record
from imaml._losses.replay import Role
from imaml._losses.slice import Slice
from imaml._losses.snapshot import Snapshot
from imaml._objective.objective import Objective
from imaml._torch import tree_map
from imaml.verify._reference import draws

MODES: dict[str, tuple[HvpMode, Graph]] = {
    "reverse-over-reverse, linearised": ("reverse-over-reverse", Graph.KEPT),
    "reverse-over-reverse, rebuilt": ("reverse-over-reverse", Graph.REBUILT),
    "forward-over-reverse": ("forward-over-reverse", Graph.REBUILT),
    "finite-difference": ("finite-difference", Graph.REBUILT),
}
"""Mode, and what becomes of its graph."""


@dataclass(frozen=True)
class Found:
    """The products H u `(directions, n + m)` of a mode, mixed products for m shared parameters included."""

    mode: str
    products: Tensor
    nonlinearity: float
    """|H(sum c_i u_i) - sum c_i H u_i| / |sum c_i H u_i|."""
    asymmetry: float
    """Root mean square of u'Hv - v'Hu over pairs, relative to that of u'Hv."""
    admitted: float = 0.0
    """The relative error that the mode itself reports, as `Report.hvp_error`."""

    @property
    def is_exact(self) -> bool:
        """Whether the mode errs by rounding alone."""
        return self.mode != "finite-difference"


def find(mode: str, objective: Objective, batch: Any, directions: Tensor, seed: int) -> Found | str:
    """The products of a mode along `(directions, n)`, or the reason why the model does not support it.

    Args:
        mode: A key of `MODES`.
        objective: At whose own parameters.
        batch: The support set of one task, without task dimension.
        directions: Along which.
        seed: Seed of the random draws, which are the same in every product.

    Returns:
        What was found.
    """
    with draws(seed):
        return _find(mode, objective, batch, directions)


def _find(mode: str, objective: Objective, batch: Any, directions: Tensor) -> Found | str:
    snapshot, record, derivatives = Snapshot.of(objective), Record(), Derivatives()
    one = tree_map(lambda t: t.unsqueeze(0), wrapped(batch))
    loss = Loss(Slice(snapshot, record, one, tasks=1, start=0, role=Role.SUPPORT))
    phi = snapshot.theta.unsqueeze(0)
    derivatives.gradient(loss, phi, 0)  # learns whether random numbers are drawn
    name, graph = MODES[mode]
    weights = torch.linspace(-1.5, 2.0, len(directions)).to(directions)
    try:
        curvature = Curvature(derivatives, loss, phi, 0, mode=name, graph=graph)
        rows = []
        for w in (*directions, weights @ directions):
            product, mixed = curvature.product(w.unsqueeze(0), mixed=bool(snapshot.shared))
            rows.append(product[0] if mixed is None else torch.cat([product[0], mixed]))
    except RuntimeError as error:
        return str(error.__cause__ or error).splitlines()[0]
    *each, combined = rows
    products = torch.stack(each)
    nonlinearity, asymmetry = ratio(combined - weights @ products, combined), unsymmetric(directions, products)[1]
    return Found(mode, products, nonlinearity, asymmetry, admitted=record.difference_error or 0.0)


def unsymmetric(directions: Tensor, products: Tensor) -> tuple[float, float]:
    """The norm of u'Hv - v'Hu over pairs of directions, and the same relative to that of u'Hv."""
    pairs = directions @ products[:, : directions.shape[1]].T
    difference = (pairs - pairs.T).triu(1)
    return difference.norm().item(), ratio(difference, pairs.triu(1))


def ratio(difference: Tensor, of: Tensor) -> float:
    """|difference| / |of|, and 0 for 0 / 0."""
    above, below = difference.norm().item(), of.norm().item()
    return above / below if below else math.inf if above else above
