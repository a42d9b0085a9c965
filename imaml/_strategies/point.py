"""One inner step, as the reverse sweep meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from imaml._curvature.agreement import Outputs
from imaml._curvature.curvature import Curvature
from imaml._curvature.product import Graph, HvpMode
from imaml._engine.problem import Problem
from imaml._engine.whole_steps import at_once, in_two
from imaml.inner._inner_problem import State


@dataclass
class Pulled:
    """What a step makes of the cotangents of the state after it."""

    state: list[Tensor]
    """The cotangents of phi and of the optimiser's buffers before it."""
    norm: Tensor
    """Norms of the first, `(tasks,)`."""
    by_pull: Tensor | None
    """Minus the cotangent of theta in the proximal term; None without one."""
    mixed: Tensor | None
    """What is added to the cotangent of the shared parameters."""
    rates: dict[str, Tensor]
    """The cotangents of the learned hyper-parameters."""


@dataclass
class Point:
    """The step s_{k+1} = U(s_k, g_k)."""

    problem: Problem
    state: State
    """s_k."""
    step: int
    mode: HvpMode
    """How Hessian-vector products are computed."""
    curvature: Curvature | None = None
    """Curvature of the support loss at phi_k, with the graph of the gradient there; None: made when it is needed."""
    gradient: Tensor | None = None
    """g_k of the inner objective, where the derivative of U depends on it."""
    then: Callable[..., Outputs] | None = None
    """What makes of the cotangents after the step those before it, compiled with the step itself; None: nothing is."""

    @classmethod
    def taken(cls, problem: Problem, state: State, step: int, mode: HvpMode) -> tuple[Point, State]:
        """One whose step is taken, and that keeps what its derivative needs, with the state after it."""
        if mode in ("auto", "reverse-over-reverse"):
            size, mixed = len(state), bool(problem.snapshot.shared)
            function = partial(_take, mode=mode, mixed=mixed)
            found = in_two(problem, f"linearised-step {mixed}", function, step, state, late=size, first=size + 1)
            if found is not None:
                (*following, losses), then = found
                assert losses is not None
                problem.remember(state[0], step, losses)
                return cls(problem, state, step, mode, then=then), tuple(t for t in following if t is not None)
        point, gradient = cls.with_gradient(problem, state, step, mode)
        return point, problem.update(state, gradient, step)

    @classmethod
    def with_gradient(cls, problem: Problem, state: State, step: int, mode: HvpMode) -> tuple[Point, Tensor]:
        """One that keeps the graph of the gradient, with the gradient: the graph serves the product at the step too."""
        curvature = problem.curvature(state[0], step, mode, Graph.ONCE)
        gradient = problem.gradient(state[0], step, curvature.take_gradient())
        needed = gradient if problem.stepper.needs_gradient else None
        return cls(problem, state, step, mode, curvature, needed), gradient

    def evaluated(self) -> Point:
        """This point with its curvature, whose graph a product builds, unless the gradient is needed before."""
        if self.curvature is not None:
            return self
        at = (self.problem, self.state, self.step, self.mode)
        if self.problem.stepper.needs_gradient:
            return self.with_gradient(*at)[0]
        return Point(*at, self.problem.curvature(self.state[0], self.step, self.mode, Graph.REBUILT))

    def pull(self, cotangents: list[Tensor], *, mixed: bool) -> Pulled:
        """Come from the state after the step to that before it.

        Args:
            cotangents: Cotangents of phi and of the optimiser's buffers after it; the list is emptied, and they may be
                written over.
            mixed: Whether the mixed product is wanted.

        Returns:
            The cotangents before it.
        """
        if self.then is not None:
            return _collected(self.then(*cotangents), len(cotangents), self.problem)
        if self.curvature is None and self.mode in ("auto", "reverse-over-reverse"):
            function = partial(_pull, mode=self.mode, mixed=mixed)
            found = at_once(self.problem, f"product {mixed}", function, self.step, (*self.state, *cotangents))
            if found is not None:
                return _collected(found, len(cotangents), self.problem)
        return self.evaluated().pull_as_it_is(cotangents, mixed=mixed)

    def pull_as_it_is(self, cotangents: list[Tensor], *, mixed: bool) -> Pulled:
        """What `pull` does, uncompiled; the point has its curvature."""
        before, w, rates = self.pull_through_update(tuple(cotangents))
        cotangents.clear()  # a product holds most of all
        phi, by_shared = self.add_product(before, w, mixed=mixed)
        damping = self.problem.damping
        pull = None if damping is None else damping * w
        if pull is not None:
            phi.add_(pull)
        return Pulled([phi, *before[1:]], torch.linalg.vector_norm(phi, dim=-1), pull, by_shared, rates)

    def pull_through_update(self, cotangents: State) -> tuple[State, Tensor, dict[str, Tensor]]:
        """The cotangents of s_k, of g_k and of the learned hyper-parameters."""
        problem, state, gradient = self.problem, self.state, self.gradient
        if gradient is None:  # a linear step: its derivative is the same anywhere
            gradient = cotangents[0].new_zeros(()).expand_as(cotangents[0])
            state = (gradient,) * len(cotangents)
        before, w, rates = problem.stepper.pull_back(state, gradient, cotangents, self.step)
        if "regularization" in problem.hyper.learned:
            rates["regularization"] = w * (self.state[0] - problem.theta)
        return before, w, rates

    def add_product(self, cotangents: State, w: Tensor, *, mixed: bool) -> tuple[Tensor, Tensor | None]:
        """H w + a, and the mixed product with w.

        Args:
            cotangents: a and those of the optimiser's buffers, as `pull_through_update` gives them. The sum is put in
                the place of a, where that shares no memory: a vector less.
            w: The cotangent of g_k.
            mixed: Whether the mixed product is wanted.

        Returns:
            The cotangent of phi_k, and the mixed product.
        """
        self.gradient = None  # it has served
        mine, *others = cotangents
        pointer = mine.untyped_storage().data_ptr()
        if 0 in mine.stride() or any(pointer == t.untyped_storage().data_ptr() for t in (w, *others)):
            mine = mine.clone(memory_format=torch.contiguous_format)
        assert self.curvature is not None
        return self.curvature.product(w, mixed=mixed, into=mine)


def _pull(problem: Problem, step: int, *tensors: Tensor, mode: HvpMode, mixed: bool) -> Outputs:
    """What `pull` finds, as tensors, for the state before a step and the cotangents of that after it."""
    size = len(tensors) // 2
    cotangents = [t.clone() for t in tensors[size:]]  # whose places are written over
    pulled = Point(problem, tensors[:size], step, mode).evaluated().pull_as_it_is(cotangents, mixed=mixed)
    return _outputs(pulled, problem)


def _take(problem: Problem, step: int, *tensors: Tensor, mode: HvpMode, mixed: bool) -> Outputs:
    """The state after a step and the support losses, and what `_pull` finds, for cotangents and a state."""
    size = len(tensors) // 2
    cotangents, state = [t.clone() for t in tensors[:size]], tensors[size:]
    curvature = problem.curvature(state[0], step, mode, Graph.ONCE)
    support = curvature.take_gradient()
    if support is None:  # there is no graph
        support = problem.derivatives.gradient(problem.support, state[0], step)
    gradient = problem.add_proximal(support.adapted, state[0])
    following = problem.update(state, gradient, step)
    point = Point(problem, state, step, mode, curvature, gradient if problem.stepper.needs_gradient else None)
    return (*following, support.losses, *_outputs(point.pull_as_it_is(cotangents, mixed=mixed), problem))


def _outputs(pulled: Pulled, problem: Problem) -> Outputs:
    rates = [pulled.rates.get(name) for name in sorted(problem.hyper.learned)]
    return (*pulled.state, pulled.norm, pulled.by_pull, pulled.mixed, *rates)


def _collected(found: Outputs, size: int, problem: Problem) -> Pulled:
    state, (norm, by_pull, mixed, *rates) = [t for t in found[:size] if t is not None], found[size:]
    assert norm is not None
    named = zip(sorted(problem.hyper.learned), rates, strict=True)
    return Pulled(state, norm, by_pull, mixed, {name: rate for name, rate in named if rate is not None})
