"""Implicit meta-gradients with a known mistake in them, as suspects for a wrong one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from imaml._minibatches import Minibatches, batch_at
from imaml._torch import load_forward_ad
from imaml.verify._argmin import InnerProblem
from imaml.verify._mistakes import Suspect, hessian_product, reverse_over_forward
from imaml.verify._plain_cg import NegativeCurvature, Product, iterates
from imaml.verify._reference import Reference, Values, flat, unflat

DENSE = 400
"""The largest number of parameters for which a whole Hessian is computed."""


@dataclass(frozen=True)
class Place:
    """Where the systems are built: the parameters of every task, and in which words."""

    adapted: Sequence[Values]
    words: str


def places(reference: Reference) -> list[Place]:
    """The minima, and what the inner loop reaches with and without its proximal term."""
    start = reference.values()
    reached = [reference.adapt(start, task.support) for task in reference.tasks]
    minima = []
    for task, values in zip(reference.tasks, reached, strict=True):
        problem = InnerProblem(reference, start, task.support)
        minima.append(problem.values(problem.minimise(flat({n: values[n] for n in reference.adapted}))))
    free = replace(reference, damping=dict.fromkeys(reference.adapted, 0.0))
    found = [Place(minima, "")]
    if reference.steps:
        size = stationarity(reference, reached)
        words = f"unconverged inner solution: after {reference.steps} steps its gradient is still {size:.2g}"
        found.append(Place(reached, words))
        omitted = [free.adapt(start, task.support) for task in reference.tasks]
        found.append(Place(omitted, "the proximal term is missing in the inner steps"))
        opposite = replace(reference, damping={n: -w for n, w in reference.damping.items()})
        omitted = [opposite.adapt(start, task.support) for task in reference.tasks]
        found.append(Place(omitted, "the proximal term has the wrong sign in the inner steps"))
    return found


def stationarity(reference: Reference, adapted: Sequence[Values]) -> float:
    """The largest norm of the gradient of the inner objective."""
    start, sizes = reference.values(), []
    for task, values in zip(reference.tasks, adapted, strict=True):
        grads = reference.gradient(partial(_inner_loss, reference, start, task.support), values)
        sizes.append(flat({n: grads[n] for n in reference.adapted}).norm().item())
    return float(max(sizes))


def _inner_loss(reference: Reference, centre: Values, batch: Any, values: Values) -> Tensor:
    return reference.inner_loss(values, centre, batch)


class System:
    """The linear system of one task at a place: ((1 + delta) I + H Lambda^-1) u = v, and what its solution leads to."""

    def __init__(self, reference: Reference, values: Values, task: int, product: Callable[..., Values]) -> None:
        self._reference, self._values, self._batch = reference, values, reference.tasks[task].support
        self._query, self._product = reference.tasks[task].query, product
        grads = reference.gradient(lambda v: reference.loss(v, self._query, outer=True), values)
        self.v = flat({n: grads[n] for n in reference.adapted})
        self._fixed = {n: g for n, g in grads.items() if n not in reference.adapted}
        like = {n: values[n] for n in reference.adapted}
        self.damping = flat({n: torch.full_like(t, reference.damping[n]) for n, t in like.items()})
        self._like = like

    def curved(self, w: Tensor, *, query: bool = False, step: int | None = None) -> Values:
        """The derivative of g'w by every parameter; of the minibatch of an inner step, where one is given."""
        batch = self._query if query else self._batch if step is None else batch_at(self._batch, step)
        return self._product(self._reference, self._values, unflat(w, self._like), batch)

    def hessian(self, w: Tensor, *, query: bool = False, step: int | None = None) -> Tensor:
        """H w, likewise."""
        found = self.curved(w, query=query, step=step)
        return flat({n: found[n] for n in self._like})

    def full(self, u: Tensor, *, fixed: bool = True, step: int | None = None) -> Tensor:
        """The meta-gradient of all parameters for a solution u (the part of the fixed ones without it: first order)."""
        named = dict(unflat(u, self._like)) | self._fixed
        if self._fixed and fixed:
            mixed = self.curved(u / self.damping, step=step)
            named |= {n: g - mixed[n] for n, g in self._fixed.items()}
        return flat({n: named[n] for n in self._values})

    def iterates(self, mv: Product, most: int, rtol: float = 1e-14) -> Iterator[Tensor]:
        """Iterates of conjugate gradients for mv(u) = v, made symmetric by Lambda; none after negative curvature."""
        root = self.damping.sqrt()
        try:
            for x in iterates(lambda p: mv(p * root) / root, self.v / root, rtol=rtol, most=most):
                yield x * root
        except NegativeCurvature:
            return

    def solution(self, mv: Product) -> Tensor:
        """The last iterate: the solution of mv(u) = v."""
        u = torch.zeros_like(self.v)
        for u in self.iterates(mv, 5 * len(self.v) + 50, rtol=1e-12):  # noqa: B007
            pass
        return u

    def right(self, u: Tensor) -> Tensor:
        """((1 + delta) I + H Lambda^-1) u."""
        return (1 + self._reference.delta) * u + self.hessian(u / self.damping)

    def residual(self, u: Tensor) -> float:
        """|v - ((1 + delta) I + H Lambda^-1) u| / |v|."""
        return float((self.v - self.right(u)).norm() / self.v.norm())


def systems(reference: Reference, place: Place, product: Callable[..., Values] = hessian_product) -> list[System]:
    """One system per task."""
    return [System(reference, values, i, product) for i, values in enumerate(place.adapted)]


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """The mean over tasks."""
    return torch.stack(list(vectors)).mean(0)


def of_implicit(reference: Reference, found: Sequence[Place]) -> Iterator[Suspect]:
    """Mistakes in the implicit meta-gradient."""
    for place in found:
        yield from _of_place(reference, place)
    if len(flat(reference.values())) <= DENSE:
        for place in found[:2]:
            for words, product in (("grad of jvp", reverse_over_forward), ("torch.func.hessian", func_hessian)):
                if _differs(reference, place, product):
                    text = f"second derivatives by {words}, which torch gets wrong for affine normalisation layers"
                    yield text, partial(_with, reference, place, product)


def _of_place(reference: Reference, place: Place) -> Iterator[Suspect]:
    known = systems(reference, place)
    at = f" ({place.words})" if place.words else ""

    def every(make: Callable[[System], Tensor], *, fixed: bool = True) -> Callable[[], Tensor]:
        return lambda: mean([s.full(make(s), fixed=fixed) for s in known])

    if place.words:
        yield place.words, every(lambda s: s.solution(s.right))
    text = "first-order: the query gradient is returned, no linear system is solved"
    yield text + at, every(lambda s: s.v)
    yield text + at, every(lambda s: s.v, fixed=False)
    text = "the Hessian is that of the query loss, not of the support loss"
    yield text + at, every(lambda s: s.solution(lambda u: u + s.hessian(u / s.damping, query=True)))
    if reference.steps and any(isinstance(task.support, Minibatches) for task in reference.tasks):
        text = "the Hessian is that of the last minibatch, not of the mean over their source"
        last = reference.steps - 1

        def by_last(mixed: int | None) -> Tensor:
            found = [s.solution(lambda u, s=s: u + s.hessian(u / s.damping, step=last)) for s in known]  # type: ignore[misc]
            return mean([s.full(u, step=mixed) for s, u in zip(known, found, strict=True)])

        yield text + at, partial(by_last, last)
        yield text + at, partial(by_last, None)
    for k, vectors in _iterates(known):
        residual = max(s.residual(u) for s, u in zip(known, vectors, strict=True))
        text = (
            f"unconverged solve: the iterate after {k} steps of conjugate gradients, relative residual {residual:.2g}"
        )
        result = partial(_mean_of, known, vectors)
        yield f"{place.words}; {text}" if place.words else text, result


def _mean_of(known: Sequence[System], solutions: Sequence[Tensor]) -> Tensor:
    return mean([s.full(u) for s, u in zip(known, solutions, strict=True)])


def _differs(reference: Reference, place: Place, product: Callable[..., Values]) -> bool:
    """Whether a product is wrong at a place at all; one that torch cannot compute is not."""
    try:
        wrong, right = systems(reference, place, product)[0], systems(reference, place)[0]
        w = torch.ones_like(right.v)
        return bool((wrong.hessian(w) - right.hessian(w)).norm() > 1e-6 * right.hessian(w).norm())
    except (RuntimeError, NotImplementedError):
        return False


def _with(reference: Reference, place: Place, product: Callable[..., Values]) -> Tensor:
    vectors = []
    for s, exact in zip(systems(reference, place, product), systems(reference, place), strict=True):
        eye = torch.eye(len(s.v), dtype=s.v.dtype, device=s.v.device)
        matrix = torch.stack([s.right(e) for e in eye], dim=1)
        vectors.append(exact.full(torch.linalg.solve(matrix, s.v)))
    return mean(vectors)


def func_hessian(reference: Reference, values: Values, w: Values, batch: Any) -> Values:
    """Products with the matrix of `torch.func.hessian`, which puts a vmap between the derivatives."""
    load_forward_ad()
    like = {n: values[n] for n in reference.adapted}
    matrix = torch.func.hessian(lambda p: reference.loss(values | unflat(p, like), batch))(flat(like))
    return {n: torch.zeros_like(t) for n, t in values.items()} | unflat(matrix @ flat(w), like)


def _iterates(known: Sequence[System], most: int = 12) -> Iterator[tuple[int, list[Tensor]]]:
    runs = [list(s.iterates(s.right, most)) for s in known]
    for k in range(min(map(len, runs), default=0)):
        yield k + 1, [run[k] for run in runs]


def fitted(system: System, u: Tensor) -> tuple[float, float, float]:
    """The a and b for which (a I + b H) u is closest to v, and the relative distance that is left."""
    columns = torch.stack([u, system.hessian(u)], dim=1)
    if not bool(columns.isfinite().all()):
        return math.nan, math.nan, math.inf
    coefficients = torch.linalg.lstsq(columns, system.v.unsqueeze(1)).solution
    left = (system.v.unsqueeze(1) - columns @ coefficients).norm() / system.v.norm()
    a, b = coefficients.flatten().tolist()
    return a, b, left.item()
