"""One inner step, as the reverse sweep meets it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imaml._curvature.curvature import Curvature
from imaml._curvature.product import Graph, HvpMode
from imaml._engine.problem import Problem
from imaml.inner._inner_problem import State


@dataclass
class Point:
    """The step s_{k+1} = U(s_k, g_k)."""

    problem: Problem
    state: State
    """s_k."""
    step: int
    curvature: Curvature
    """Curvature of the support loss at phi_k."""
    gradient: Tensor | None
    """g_k of the inner objective, where the derivative of U depends on it."""

    @classmethod
    def with_gradient(cls, problem: Problem, state: State, step: int, mode: HvpMode) -> tuple[Point, Tensor]:
        """One that keeps the graph of the gradient, with the gradient: the graph serves the product at the step too."""
        curvature = problem.curvature(state[0], step, mode, Graph.ONCE)
        gradient = problem.gradient(state[0], step, curvature.take_gradient())
        return cls(problem, state, step, curvature, gradient if problem.stepper.needs_gradient else None), gradient

    @classmethod
    def at(cls, problem: Problem, state: State, step: int, mode: HvpMode) -> Point:
        """One that builds the graph in its product, unless it needs the gradient before."""
        if problem.stepper.needs_gradient:
            return cls.with_gradient(problem, state, step, mode)[0]
        return cls(problem, state, step, problem.curvature(state[0], step, mode, Graph.REBUILT), None)

    def pull_through_update(self, cotangents: State) -> tuple[State, Tensor]:
        """The cotangents of s_k and of g_k; the derivatives by learned hyper-parameters are added up on the way."""
        problem, state, gradient = self.problem, self.state, self.gradient
        if gradient is None:  # a linear step: its derivative is the same anywhere
            gradient = cotangents[0].new_zeros(()).expand_as(cotangents[0])
            state = (gradient,) * len(cotangents)
        before, w, rates = problem.stepper.pull_back(state, gradient, cotangents, self.step)
        if "regularization" in problem.hyper.learned:
            rates["regularization"] = w * (self.state[0] - problem.theta)
        problem.hyper.add(rates, problem.first + self.step)
        return before, w

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
        return self.curvature.product(w, mixed=mixed, into=mine)
