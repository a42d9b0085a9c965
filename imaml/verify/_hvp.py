"""Are the Hessian-vector products of this model right?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imaml._objective.objective import Objective
from imaml._tasks import Task
from imaml.inner import GradientDescent
from imaml.verify._modes import MODES, find
from imaml.verify._products import differences
from imaml.verify._products_verdict import verdict
from imaml.verify._recomputed import recomputed_wrongly
from imaml.verify._reference import Reference, draws, flat, unflat
from imaml.verify._subject import check_copied, check_own, evaluated, in_double, is_random
from imaml.verify._verification import Verification

DIRECTIONS = 3


def hvp(
    objective: Objective,
    params: Mapping[str, Tensor] | None,
    batch: Any,
    *,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Verification:
    """Check every mode of Hessian-vector products at one point of one model, in float64.

    H is the Hessian of the loss by the adapted parameters. Along random unit directions u, v each mode must be

    - linear: H(a u + b v) = a H u + b H v;
    - symmetric: u'H v = v'H u;
    - equal to central differences of the plain autograd gradient, extrapolated to step 0. The details show the errors
      of the differences with steps h, h/4, h/16, ... and their order, which is 2 for a smooth loss;
    - equal to the other exact modes.

    Derivatives of the gradient by parameters that require grad and do not adapt (mixed products) are compared along
    with H u.

    Where activations are recomputed, the gradient must equal that without recomputation too; a block that makes them
    differ is named.

    The finite-difference mode is inexact: it must come within 1e-3, or within the error that it reports itself. A mode
    that the model does not support is listed with the reason, and fails nothing.

    Cost: 6 gradients a level of differences, 3 to 9 levels, and 4 products a mode.

    Args:
        objective: Model and loss; a deep copy in float64 is used.
        params: Tensors by parameter name, such as `engine.adapt` returns; the objective's own values for those left
            out, or all with None.
        batch: The support set of one task, without task dimension.
        tolerance: The largest relative error that passes.
        seed: Seed of the directions, and of random draws (dropout), which are the same in all evaluations.

    Returns:
        The verdict, of which `details` has one line a mode. "inconclusive" where H is zero, or finite differences
        resolve less than the tolerance.

    Raises:
        TypeError: The model cannot be copied, or an argument is of the wrong type.
        ValueError: Wrong names or shapes of `params`, a tolerance that is not positive, or a loss that is not finite or
            not deterministic.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"Expected an Objective(model, loss). Got {type(objective).__name__}.")
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be positive. Got {tolerance}.")
    objective.check()
    copied = _at(objective.double(), params)
    given = Task(support=batch, query=batch)
    (task,) = in_double([given])
    reference = Reference(copied, [task], GradientDescent(lr=1.0, steps=0), damping={})
    values = reference.values()
    random = is_random(reference, seed, partial(evaluated, objective, given))
    check_copied(reference, objective.model, seed)
    check_own(reference, seed)
    adapted = {n: values[n] for n in copied.adapted}

    def gradient(phi: Tensor) -> Tensor:
        with draws(seed):
            return flat(reference.gradient(lambda v: reference.loss(v, task.support), values | unflat(phi, adapted)))

    phi = flat(adapted)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(DIRECTIONS, len(phi), generator=generator, dtype=torch.float64).to(phi.device)
    directions /= directions.norm(dim=1, keepdim=True)
    found = {mode: find(mode, copied, task.support, directions, seed) for mode in MODES}
    eps = reference.rounding()
    right = differences(gradient, phi, directions, tolerance / 100, eps)
    found_out = verdict(found, right, directions, tolerance, random=random, eps=eps)
    wrong = recomputed_wrongly(reference, seed, tolerance)
    return replace(found_out, status="failed", cause=wrong[1]) if wrong else found_out


def _at(copied: Objective, params: Mapping[str, Tensor] | None) -> Objective:
    """The objective with these values in it."""
    own = copied.parameters()
    if params is None:
        return copied
    if not isinstance(params, Mapping):
        raise TypeError(f"`params` must be a dict of tensors by parameter name, or None. Got {type(params).__name__}.")
    unknown = sorted(map(str, set(params) - set(own)))
    if unknown:
        raise ValueError(f"`params` must name parameters among {list(own)}. Got {unknown}.")
    for name, value in params.items():
        if not isinstance(value, Tensor) or value.shape != own[name].shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"`params[{name!r}]` must be a tensor of shape {tuple(own[name].shape)}. Got {got}.")
        with torch.no_grad():
            own[name].copy_(value)
    return copied
