"""What a meta-gradient claims to be the derivative of: a function of one real number per direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from imaml._numbers import check_number
from imaml._strategies.fomaml import FOMAML
from imaml._strategies.implicit import ImplicitMAML
from imaml._strategies.maml import MAML
from imaml._strategies.meta_gradient import MetaGradient
from imaml._tasks import Task
from imaml.inner import GradientDescent, InnerOptimizer, InnerSolver
from imaml.inner._hyper import Hyper
from imaml.verify._argmin import Anchor, InnerProblem
from imaml.verify._reference import Reference, Values, draws, flat, moved

Claim = Literal["maml", "fomaml", "implicit", "damped"]
IMPLICIT: tuple[Claim, ...] = ("implicit", "damped")
"""Claims about the stationary point."""
_CLAIMS: dict[type[MetaGradient], Claim] = {MAML: "maml", FOMAML: "fomaml", ImplicitMAML: "implicit"}


def claim_of(subject: object, against: str | None) -> Claim:
    """What the subject claims to compute; raises ValueError where that is not said."""
    if against is not None:
        for claim in get_args(Claim):
            if claim == against:
                return claim  # type: ignore[no-any-return]
        raise ValueError(f"`against` must be one of {', '.join(get_args(Claim))}. Got {against!r}.")
    for strategy, known in _CLAIMS.items():
        if isinstance(subject, strategy):
            return "damped" if getattr(subject, "damping", 0.0) else known
    raise ValueError(
        f"What {name_of(subject)} claims to compute is not known. Pass against='maml', 'fomaml', 'implicit' or "
        "'damped'."
    )


def delta_of(subject: object, damping: float | None, claim: Claim) -> float:
    """What a damped system has added to it; raises where it is not said, or is no number."""
    if claim != "damped":
        if damping is not None:
            raise ValueError(f"`damping` is of a damped system. Expected against='damped'. Got {claim!r}.")
        return 0.0
    found: Any = getattr(subject, "damping", None) if damping is None else damping
    if found is None:
        raise ValueError(
            f"The damping of {name_of(subject)} is not known. Pass damping=delta, the multiple of the identity that is "
            "added to its linear system."
        )
    if found == "auto":
        raise ValueError(
            "damping='auto' depends on the calls before, and is no function that could be compared. Expected a number, "
            "such as the largest of `report.damping`. Got 'auto'."
        )
    if check_number("`damping`", found) < 0:
        raise ValueError(f"`damping` must be >= 0. Got {found}.")
    return float(found)


def name_of(subject: object) -> str:
    """A name for people."""
    return getattr(subject, "__name__", type(subject).__name__)


def inner_of(subject: object, inner: InnerSolver | None, claim: Claim) -> InnerOptimizer:
    """The inner loop that was used; raises where it is not said."""
    inner = inner if inner is not None else getattr(subject, "inner", None)
    if isinstance(inner, InnerOptimizer):
        return inner
    if claim in IMPLICIT and (inner is None or isinstance(inner, InnerSolver)):
        return GradientDescent(lr=1.0, steps=0)
    raise ValueError(
        f"The inner loop of {name_of(subject)} is not known. Expected inner=GradientDescent(lr=..., steps=...), or "
        f"another InnerOptimizer. Got {inner!r}."
    )


def damping_of(
    subject: object, regularization: Hyper | None, adapted: tuple[str, ...], claim: Claim
) -> dict[str, float]:
    """Lambda of every adapted parameter, zeros where it is learned; raises ValueError where it is not said."""
    if regularization is None:
        regularization = getattr(subject, "regularization", None if claim in IMPLICIT else 0.0)
        if regularization is None and isinstance(subject, MetaGradient):
            return dict.fromkeys(adapted, 0.0)
    if as_function(regularization) is not None:
        return dict.fromkeys(adapted, 0.0)
    if regularization is None:
        raise ValueError(
            f"The regularisation of {name_of(subject)} is not known. Pass regularization=lambda, the weight of the "
            "proximal term."
        )
    if isinstance(regularization, Mapping):
        if set(regularization) != set(adapted):
            raise ValueError(f"`regularization` must name {list(adapted)}. Got {list(regularization)}.")
        damping = {n: float(regularization[n]) for n in adapted}
    else:
        damping = dict.fromkeys(adapted, float(regularization))  # type: ignore[arg-type]
    if min(damping.values()) < 0 or (claim in IMPLICIT and min(damping.values()) == 0):
        raise ValueError(f"`regularization` must be {'>' if claim in IMPLICIT else '>='} 0. Got {regularization}.")
    return damping


def as_function(regularization: Hyper | None) -> Callable[[dict[str, Any]], Any] | None:
    """One that is learned, or has tensors in it, as a function of the meta-parameters; None for numbers."""
    if callable(regularization):
        return regularization
    if isinstance(regularization, Mapping) and not all(isinstance(v, Real) for v in regularization.values()):
        return lambda meta: regularization
    return None


def along(reference: Reference, claim: Claim, seed: int) -> Callable[[Values], Callable[[float], float]]:
    """For a direction d, the function t -> mean query loss whose derivative at 0 is the meta-gradient times d.

    maml: the query loss after the inner loop from theta + t d. fomaml: at phi + t d, with phi adapted from theta.
    implicit: at the minimum of the inner objective about theta + t d. damped: with delta lambda/2 |phi - phi*|^2 added
    to it, about the minimum phi* for t = 0, which adds delta lambda to H + lambda and nothing to the gradient there.

    Args:
        reference: The problem.
        claim: Which.
        seed: Seed of the random draws, the same for every t.

    Returns:
        The function of t for a direction; it raises NoMinimum where the inner problem cannot be solved.
    """
    start = reference.values()
    if claim == "maml":

        def after(values: Values) -> float:
            with draws(seed):
                return reference.after_adaptation(values).item()

        return lambda d: lambda t: after(moved(start, d, t))
    if claim == "fomaml":
        with draws(seed):
            adapted = [reference.adapt(start, task.support) for task in reference.tasks]
        return lambda d: (
            lambda t: _mean_query_loss(reference, [moved(values, d, t) for values in adapted], moved(start, d, t))
        )
    with draws(seed):
        minima = [_minimum(reference, start, task) for task in reference.tasks]
    anchors = [_anchor(reference, start, task, minimum) for task, minimum in zip(reference.tasks, minima, strict=True)]

    def of(d: Values) -> Callable[[float], float]:
        velocities: list[Tensor | None] = [None] * len(minima)

        def at_minimum(t: float) -> float:
            values, adapted = moved(start, d, t), []
            for i, (task, minimum) in enumerate(zip(reference.tasks, minima, strict=True)):
                problem, velocity = InnerProblem(reference, values, task.support, anchors[i]), velocities[i]
                phi = problem.minimise(minimum if velocity is None else minimum + t * velocity)
                velocities[i] = (phi - minimum) / t if t else None
                adapted.append(problem.values(phi))
            return _mean_query_loss(reference, adapted, values)

        return at_minimum

    return of


def _minimum(reference: Reference, start: Values, task: Task) -> Tensor:
    reached = reference.adapt(start, task.support)
    return InnerProblem(reference, start, task.support).minimise(flat({n: reached[n] for n in reference.adapted}))


def _anchor(reference: Reference, start: Values, task: Task, minimum: Tensor) -> Anchor | None:
    if not reference.delta:
        return None
    weights = {n: reference.delta * w for n, w in reference.identity_at(start).items()}
    return Anchor(InnerProblem(reference, start, task.support).values(minimum), weights)


def _mean_query_loss(reference: Reference, adapted: list[Values], initial: Values) -> float:
    losses = [reference.query_loss(v, task, initial) for v, task in zip(adapted, reference.tasks, strict=True)]
    return torch.stack(losses).mean().item()
