"""One inner step, as the reverse sweep meets it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from imaml._curvature.curvature import Curvature, HvpMode
from imaml._engine.problem import Problem
from imaml.inner._inner_problem import State


def needs_gradient(problem: Problem) -> bool:
    """Whether the derivative of the update depends on where it is taken, and not on the step alone."""
    inner = problem.optimizer
    return not inner.said_of_update("is_linear") or bool(
        problem.support.context.hyper.learned & set(inner.hyperparameters)
    )


@dataclass
class Point:
    """The step s_{k+1} = U(s_k, g_k)."""

    problem: Problem
    state: State
    """s_k."""
    step: int
    curvature: Curvature
    """Of the support loss at phi_k."""
    gradient: Tensor | None
    """g_k of the inner objective, where the derivative of U depends on it."""

    @classmethod
    def with_gradient(cls, problem: Problem, state: State, step: int, mode: HvpMode) -> tuple[Point, Tensor]:
        """One that keeps the graph of the gradient, with the gradient."""
        curvature = Curvature(problem.support, state[0], step, mode=mode, graph="once")
        gradient = problem.gradient(state[0], step, curvature.take_gradient())
        return cls(problem, state, step, curvature, gradient if needs_gradient(problem) else None), gradient

    @classmethod
    def at(cls, problem: Problem, state: State, step: int, mode: HvpMode) -> Point:
        """One that builds the graph in its product, unless it needs the gradient before."""
        if needs_gradient(problem):
            return cls.with_gradient(problem, state, step, mode)[0]
        return cls(problem, state, step, Curvature(problem.support, state[0], step, mode=mode, graph="rebuild"), None)

    def pull_through_update(self, cotangents: State) -> tuple[State, Tensor]:
        """The cotangents of s_k and of g_k; the derivatives by learned hyper-parameters are added up on the way."""
        problem, hyper, state, gradient = self.problem, self.problem.support.context.hyper, self.state, self.gradient
        if gradient is None:
            gradient = cotangents[0].new_zeros(()).expand_as(cotangents[0])
            state = (gradient,) * len(cotangents)
        at, learned = hyper.at(self.step), hyper.learned
        with problem.draws(self.step):
            pullback = problem.optimizer.said_of_update("pullback")
            before, w, rates = pullback(state, gradient, cotangents, self.step, at, learned)
        if "regularization" in learned:
            rates["regularization"] = w * (self.state[0] - problem.theta)
        hyper.add(rates, self.step)
        return before, w
