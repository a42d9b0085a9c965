"""Bilevel problems in general."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from imaml._objective.meta import Given
from imaml._objective.objective import Objective
from imaml._tasks import Batch

LossFunction = Callable[[dict[str, Tensor], dict[str, Any], Any], Tensor]


def bilevel(
    inner_loss: LossFunction,
    outer_loss: LossFunction,
    *,
    inner: Mapping[str, Tensor],
    meta: Given,
    metric: Callable[[dict[str, Tensor], Batch], Tensor] | None = None,
) -> Objective:
    r"""Make an objective of a bilevel problem: an outer loss of the minimiser of an inner loss.

    Formula: $\min_{meta} L_{outer}(w^*, meta)$ with $w^* = \arg\min_w L_{inner}(w, meta)$.

    The objective is for any strategy. Its tasks hold the inner loss's data as `support` and the outer's as `query`; one
    problem is a list of one `Task`.

    `result.loss.backward()` puts the hyper-gradient into the `.grad` of `meta`:

    - `ImplicitMAML(regularization=None)`: d_meta L_outer - (d_meta d_w L_inner)' H^-1 d_w L_outer, with H the Hessian
      of the inner loss, which must be strongly convex near w*. With `regularization` > 0 it is the hyper-gradient of
      the inner problem with a proximal term about the start.
    - `MAML`: the derivative through the inner steps; with `truncate=m` through the last m.
    - `FOMAML`: d_meta L_outer alone.

    Args:
        inner_loss: `(inner, meta, batch) -> 0-dim tensor`.
        outer_loss: The loss that w* is judged by, of the same form.
        inner: The inner variables by name, where they start.
        meta: The meta-parameters, see `Objective`: leaves that require grad, or tensors that a network produced.
        metric: `(inner, batch) -> 0-dim tensor` of the outer batch, for `report.metric`.

    Returns:
        The objective; `engine.adapt(objective, support)` returns w*.

    Raises:
        TypeError: A loss that is not callable, or a tensor of a wrong kind.
        ValueError: No inner variable, or names that are both.
    """

    def of_inner(params: dict[str, Tensor], batch: Batch, meta: dict[str, Any]) -> Tensor:
        return inner_loss(params, meta, batch)

    def of_outer(params: dict[str, Tensor], batch: Batch, meta: dict[str, Any]) -> Tensor:
        return outer_loss(params, meta, batch)

    for name, loss in (("inner_loss", inner_loss), ("outer_loss", outer_loss)):
        if not callable(loss):
            raise TypeError(f"`{name}` must be callable. Got {type(loss).__name__}.")
    return Objective.from_function(of_inner, inner, outer_loss=of_outer, meta=meta, metric=metric)
