"""The likeliest cause of a wrong meta-gradient: the known mistake that leads to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from imaml.verify._argmin import NoMinimum
from imaml.verify._claims import IMPLICIT, Claim
from imaml.verify._implicit_mistakes import Place, fitted, mean, of_implicit, places, systems
from imaml.verify._mistakes import Suspect, of_maml, unrolled
from imaml.verify._reference import Reference, draws
from imaml.verify._subject import Tasks

EXPLAINS = 0.05
"""A suspect explains a result that is this many times nearer to it than to the right one."""
UNTRUE = (
    "autograd's gradient of this loss is not its derivative: the result equals plain automatic differentiation and "
    "differs from finite differences; look for padding_idx, .detach(), a straight-through estimator, spectral_norm in "
    "training mode, or a wrong backward"
)
EXACT = 1e-5
"""And no other is asked once one is as near as this."""


def cause_of(
    reference: Reference,
    claim: Claim,
    got: Tensor,
    call: Callable[[Tasks], Tensor],
    tasks: Tasks,
    *,
    random: bool,
    seed: int,
    tolerance: float,
) -> str:
    """A sentence on the likeliest cause; one that says that none is known where none explains the result.

    Args:
        reference: The problem.
        claim: What the result claims to be.
        got: The wrong result.
        call: The subject, on other tasks.
        tasks: The tasks.
        random: Whether the loss draws random numbers.
        seed: Seed of the random draws.
        tolerance: What a right result may be off.

    Returns:
        The cause.
    """
    with draws(seed):
        if not bool(got.any()):
            return "the result is zero: no gradient flows back, or a solver returned its start"
        if not reference.is_plain or claim in IMPLICIT and not all(reference.damping.values()):
            return "unknown: known mistakes are looked for with plain gradient descent and fixed numbers alone"
        try:
            right, suspects, found = _right_and_suspects(reference, claim)
        except (RuntimeError, NoMinimum) as error:
            return f"unknown: the right meta-gradient could not be computed to compare with ({error})"
        if (got - right).norm() <= EXPLAINS * tolerance * right.norm():
            return UNTRUE
        factor = _factor(got, right, len(reference.tasks), reference)
        if factor:
            return factor
        explained = _nearest(got, right, suspects)
        if explained:
            return explained
        if claim in IMPLICIT:
            return _of_system(reference, found, call(tasks[:1]), tolerance)
    if random:
        return (
            "dropout (or another random draw) is not the same in every evaluation of an inner step, or is drawn in "
            "another order than one forward pass per inner step, task by task; verify with model.eval() to tell"
        )
    return f"unknown: no known mistake leads to these numbers. {_worst(reference, got, right)}"


def _right_and_suspects(reference: Reference, claim: Claim) -> tuple[Tensor, Iterable[Suspect], list[Place]]:
    suspects: list[Suspect]
    if claim in IMPLICIT:
        found = places(reference)
        right = mean([s.full(s.solution(s.right)) for s in systems(reference, found[0])])
        suspects = [*of_implicit(reference, found)]
        if reference.delta:
            text = "the damping is missing: this solves the system without it"
            plain = systems(replace(reference, delta=0.0), found[0])
            suspects.append((text, lambda: mean([s.full(s.solution(s.right)) for s in plain])))
        text = "this is the gradient of exact MAML, through the steps of the inner loop"
        return right, [*suspects, (text, lambda: unrolled(reference))], found
    first = unrolled(reference, second_order=False)
    if claim == "maml":
        right = unrolled(reference)
        return right, of_maml(reference, right), []
    suspects = [("this is the second-order gradient of exact MAML", lambda: unrolled(reference))]
    return first, [*suspects, *of_maml(reference, None)], []


def _factor(got: Tensor, right: Tensor, tasks: int, reference: Reference) -> str | None:
    factor = (torch.dot(got, right) / torch.dot(right, right)).item()
    if (got - factor * right).norm() > 1e-3 * got.norm() or abs(factor - 1) < 1e-2 or factor == 0:
        return None
    lambdas = set(reference.damping.values())
    known = {float(tasks): "the sum over tasks instead of the mean", 1 / tasks: "the mean over tasks is taken twice"}
    known |= {-1.0: "the wrong sign"}
    for weight in lambdas - {0.0}:
        known |= {weight: "lambda is multiplied in", 1 / weight: "lambda is divided out"}
    for value, text in known.items():
        if abs(factor - value) < 1e-2 * abs(value):
            return f"a factor of {factor:.4g}: {text}"
    return f"a factor of {factor:.4g} too much"


def _nearest(got: Tensor, right: Tensor, suspects: Iterable[Suspect]) -> str | None:
    best, words = EXPLAINS * (got - right).norm().item(), None
    for text, make in suspects:
        try:
            suspect = make()
        except (RuntimeError, NotImplementedError, ValueError):  # ValueError: no minibatch for one step more
            continue
        distance = (got - suspect).norm().item()
        if distance < best and (suspect - right).norm() > 10 * distance:
            best, words = distance, text
        if best <= EXACT * (got - right).norm():
            break
    return words


def _of_system(reference: Reference, found: list[Place], got: Tensor, tolerance: float) -> str:
    """What system a result solves: found by a fit of a I + b H, on the first task alone."""
    one = reference.only(0)
    weights = set(reference.damping.values())
    named = dict(zip(one.values(), got.split([t.numel() for t in one.values().values()]), strict=True))
    u = torch.cat([named[n] for n in reference.adapted])
    least, words = float("inf"), ""
    for place in found:
        system = systems(one, Place(place.adapted[:1], place.words))[0]
        residual = system.residual(u)
        at = f" ({place.words})" if place.words else ""
        a, b, left = fitted(system, u)
        if left < max(tolerance, EXACT * residual) and len(weights) == 1:
            (weight,) = weights
            right = 1 + reference.delta
            if abs(a - right) + abs(b * weight - 1) < 10 * tolerance:
                return f"{UNTRUE} (the result solves the right linear system){at}"
            delta = a / (b * weight) - 1 if b > 0 else 0.0
            damped = f", which damps by delta = {delta:.4g} (see `damping`)" if delta > 10 * tolerance else ""
            return (
                f"another linear system is solved: {a:.4g} I + {b:.4g} H where I + H / lambda"
                + (" + delta I" if reference.delta else "")
                + f" is {f'{right:.4g} ' if reference.delta else ''}I + {1 / weight:.4g} H{damped}{at}"
            )
        if residual < least:
            least, words = (
                residual,
                f"unconverged solve: the linear system is left with a relative residual of {residual:.2g}{at}",
            )
    return words


def _worst(reference: Reference, got: Tensor, right: Tensor) -> str:
    sizes = [t.numel() for t in reference.values().values()]
    pairs = zip(reference.values(), (got - right).split(sizes), right.split(sizes), strict=True)
    name, error, part = max(pairs, key=lambda pair: pair[1].norm().item())
    return (
        f"The largest error is in {name!r}: {error.norm().item():.2g} where the gradient is {part.norm().item():.2g}."
    )
