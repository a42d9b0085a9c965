"""The solutions of earlier calls, as starts for tasks that recur."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from imaml._tasks import Batch
from imaml._torch import tree_leaves
from imaml_solvers import Solution, Status

KEPT = 2**30
"""Bytes of solutions that an engine keeps; at least those of one chunk."""
_OVERHEAD = 1024
"""Bytes of a key."""


@dataclass
class WarmStart:
    """The last solution `(n,)` of every task seen of late, recognised by the numbers of its support set."""

    known: dict[Hashable, Tensor] = field(default_factory=dict)

    def of(self, batch: Batch, like: Tensor) -> Tensor | None:
        """Starts `(tasks, n)`, zeros for unknown tasks; None if all are unknown."""
        found = [self.known.get(key) for key in _keys(batch, like)]
        if all(x is None for x in found):
            return None
        return torch.stack([torch.zeros_like(like[0]) if x is None else x for x in found])

    def keep(self, batch: Batch, solution: Solution) -> None:
        """Remember those of solves that did not fail."""
        rows = zip(_keys(batch, solution.x), solution.x.detach().clone(), solution.status.tolist(), strict=True)
        good = {key: x for key, x, status in rows if status in (Status.CONVERGED, Status.BUDGET_SPENT)}
        for key, x in good.items():
            self.known.pop(key, None)
            self.known[key] = x
        most = max(len(good), KEPT // (_OVERHEAD + solution.x[0].numel() * solution.x.element_size()))
        while len(self.known) > most:
            del self.known[next(iter(self.known))]


def _keys(batch: Batch, like: Tensor) -> list[Hashable]:
    """Equal for tasks of equal support sets, up to rounding: a weighted sum of each tensor."""
    columns = []
    for tensor in tree_leaves(batch):
        rows = tensor.reshape(len(tensor), -1).to(torch.float64)
        weights = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device).cos()
        columns.append([f"{value:.9e}" for value in (rows * weights).sum(1).tolist()])
    kind = (like.shape[-1], like.dtype, like.device)
    return [(*kind, *values) for values in zip(*columns, strict=True)]
