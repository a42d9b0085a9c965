"""Is this meta-gradient right?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from imaml._objective.objective import Objective
from imaml._strategies.meta_gradient import MetaGradient
from imaml.inner import InnerSolver
from imaml.inner._hyper import Hyper
from imaml.verify._argmin import NoMinimum
from imaml.verify._claims import along, as_function, claim_of, damping_of, delta_of, inner_of, name_of
from imaml.verify._comparison import compare
from imaml.verify._recomputed import recomputed_wrongly
from imaml.verify._reference import Reference, Values, draws, moved
from imaml.verify._subject import (
    Subject,
    Tasks,
    call,
    check_copied,
    check_own,
    evaluated,
    in_double,
    is_random,
    is_update_random,
    snapshot,
    why_calls_differ,
)
from imaml.verify._suspects import cause_of
from imaml.verify._verification import Status, Verification, judge

SINGLE_TOLERANCE = 1e-3
"""A subject that returns float32 or less is off by rounding alone: measured up to 1e-3 through BatchNorm and ReLU."""


def meta_gradient(
    engine_or_function: Subject,
    objective: Objective,
    tasks: Tasks,
    *,
    against: str | None = None,
    inner: InnerSolver | None = None,
    regularization: Hyper | None = None,
    damping: float | None = None,
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Verification:
    """Compare a meta-gradient with finite differences of what it claims to be the derivative of.

    The derivative of the mean query loss along random unit directions d of all parameters (adapted or not) is found by
    extrapolated central differences in float64, without any second derivative, and compared with gradient * d. The
    query loss is taken

    - "maml": after the inner loop from theta + t d;
    - "implicit": at the minimum of L_support + lambda/2 |phi - theta - t d|^2, found by Newton's method to rounding;
      L_support is the mean over the source where there are minibatches, or over `curvature_batches` of it;
    - "damped": likewise, with delta lambda/2 |phi - phi*|^2 added, where phi* is the minimum for t = 0: its derivative
      solves (I + H / lambda + delta I) u = v. `bias` says how far that is from "implicit";
    - "fomaml": at phi + t d, with phi adapted from theta.

    The relative error is that over all directions together. Where the subject fails, its result is compared with the
    results of known mistakes, and `cause` names the one that it equals.

    Where activations are recomputed, the gradients of the first task's losses are compared with those without
    recomputation too, and a block that makes them differ is named.

    Cost: some 16 to 60 inner loops of all tasks, for "implicit" with the minimisation instead.

    Args:
        engine_or_function: A strategy, or `function(objective, tasks)` that returns a dict of gradients by parameter
            name, or one tensor in the order of `objective.parameters()`: the gradient of the mean over tasks. It gets a
            deep copy of the objective in float64 and the tasks in float64; the user's are not touched.
        objective: Model and loss.
        tasks: A few tasks with shapes as in use; two or more show a wrong mean.
        against: What is claimed. Known for the library's strategies: "damped" for `ImplicitMAML(damping=...)`.
        inner: The inner loop that was used, an `InnerOptimizer`, whose `update` defines it. Known for strategies;
            "implicit" and "damped" only start from it, and take any.
        regularization: lambda that was used. Known for strategies; 0 for "maml" and "fomaml".
        damping: delta that was used, for "damped". Known for strategies, where it is a number.
        tolerance: The largest relative error that passes; raised to 1e-3 for a subject that returns less than float64.
        seed: Seed of the directions, and of random draws (dropout).

    Returns:
        The verdict. "passed" is an error within the tolerance, or within the resolution of finite differences where
        kinks (ReLU) make that coarser; never where they resolve less than 1e-3, which is "inconclusive".

    Raises:
        TypeError: The model cannot be copied, or the subject returns something else than gradients.
        ValueError: The claim is not known, wrong shapes, NaN, or a loss that is not deterministic.
    """
    claim = claim_of(engine_or_function, against)
    used = inner_of(engine_or_function, inner, claim)
    if not isinstance(objective, Objective):
        raise TypeError(f"Expected an Objective(model, loss). Got {type(objective).__name__}.")
    delta = delta_of(engine_or_function, damping, claim)
    copied, doubled = objective.double(), in_double(tasks)
    as_given, tasks = partial(evaluated, objective, tasks[0]), doubled
    weights = damping_of(engine_or_function, regularization, copied.adapted, claim)
    given = regularization if regularization is not None else getattr(engine_or_function, "regularization", None)
    outer_steps = getattr(engine_or_function, "outer_steps", None)
    batches = getattr(engine_or_function, "curvature_batches", None)
    reference = Reference(copied, list(tasks), used, weights, as_function(given), outer_steps, batches, delta)
    values = reference.values()
    random = is_random(reference, seed, as_given)
    check_copied(reference, objective.model, seed)
    check_own(reference, seed)
    random = random or is_update_random(reference, seed)

    own = objective.double()
    before = snapshot(own)
    got, is_double = call(engine_or_function, own, tasks, seed)
    again, _ = call(engine_or_function, own, tasks, seed)
    tolerance = tolerance if is_double else max(tolerance, SINGLE_TOLERANCE)
    drift = ((got - again).norm() / got.norm().clamp(min=1e-300)).item()

    bias: float | None = None

    def verification(status: Status, error: float, resolution: float, cause: str | None) -> Verification:
        return Verification(
            subject=f"{name_of(engine_or_function)} against {claim}",
            status=status,
            relative_error=error,
            resolution=resolution,
            cause=cause,
            tolerance=tolerance,
            bias=bias,
        )

    wrong = recomputed_wrongly(reference, seed, tolerance) if isinstance(engine_or_function, MetaGradient) else None
    if wrong:
        return verification("failed", wrong[0], 0.0, wrong[1])
    if random and claim != "maml":
        drawn = "the loss (dropout) or the update draws random numbers: verify with model.eval(), and without noise"
        return verification("inconclusive", math.nan, math.inf, drawn)
    try:
        if random and isinstance(engine_or_function, MetaGradient):
            functions = _of_engine(engine_or_function, objective.double(), tasks, seed)
        else:
            functions = along(reference, claim, seed)
    except NoMinimum as error:
        return verification("inconclusive", math.nan, math.inf, str(error))
    if delta:
        undamped = compare(along(replace(reference, delta=0.0), claim, seed), got, values, tolerance, seed, 0.0)
        bias = undamped[0]
    relative_error, resolution, reason = compare(functions, got, values, tolerance, seed, reference.rounding())
    status = judge(relative_error, resolution, tolerance)
    if drift > tolerance:
        cause = f"two calls with equal arguments and seed differ by {drift:.2g}: {why_calls_differ(own, before)}"
        return verification("failed", max(relative_error, drift), resolution, cause)
    if status == "failed":

        def again_on(some: Tasks) -> Tensor:
            return call(engine_or_function, objective.double(), some, seed)[0]

        reason = cause_of(reference, claim, got, again_on, tasks, random=random, seed=seed, tolerance=tolerance)
    return verification(status, relative_error, resolution, None if status == "passed" else reason)


def _of_engine(
    engine: MetaGradient, objective: Objective, tasks: Tasks, seed: int
) -> Callable[[Values], Callable[[float], float]]:
    """The engine's own query loss after adaptation: only it knows which random draws it replays."""
    parameters = objective.parameters()
    start = {n: p.detach().clone() for n, p in parameters.items()}

    def at(d: Values) -> Callable[[float], float]:
        def after(t: float) -> float:
            with torch.no_grad(), draws(seed):
                for name, value in moved(start, d, t).items():
                    parameters[name].copy_(value)
                return engine(objective, tasks).loss.item()

        return after

    return at
