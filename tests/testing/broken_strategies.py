"""Strategies with one defect each. Those on `MAML` claim to be it, those on `ImplicitMAML` likewise."""

import dataclasses

import torch

from imaml import FOMAML, MAML, Dense, GradientDescent, ImplicitMAML, Pullback
from imaml._curvature.product import Graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class SumOverTasks(MAML):
    def pull_back(self, problem):
        pulled = super().pull_back(problem)
        return Pullback(pulled.theta * len(problem.theta), pulled.shared, pulled.outcome)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneStepTooFew(MAML):
    def pull_back(self, problem):
        return super().pull_back(
            dataclasses.replace(problem, inner=GradientDescent(lr=problem.inner.lr, steps=problem.inner.steps - 1))
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetsTheFixedParameters(MAML):
    def pull_back(self, problem):
        pulled = super().pull_back(problem)
        return Pullback(pulled.theta, None if pulled.shared is None else pulled.shared * 0, pulled.outcome)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetsTheInitialParameters(MAML):
    def pull_back(self, problem):
        pulled = super().pull_back(problem)
        problem.direct = None
        return pulled


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetsTheOuterSteps(MAML):
    def pull_back(self, problem):
        return MAML.pull_back(dataclasses.replace(self, outer_steps=None), problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HessianAtTheLastStateOnly(MAML):
    """Right for quadratics, whose Hessian is the same everywhere."""

    def pull_back(self, problem):
        phi = problem.adapt()
        query = problem.judge(phi)
        hessian = problem.curvature(phi, problem.inner.steps, "auto", Graph.KEPT)
        cotangent = query.adapted
        for _ in range(problem.inner.steps):
            cotangent = cotangent - problem.inner.lr * hessian.product(cotangent)[0]
        return Pullback(cotangent, query.shared, problem.outcome(query))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReversedReport(MAML):
    def pull_back(self, problem):
        pulled = super().pull_back(problem)
        losses = pulled.outcome.query_loss.flip(0)
        return Pullback(pulled.theta, pulled.shared, dataclasses.replace(pulled.outcome, query_loss=losses))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WritesGrad(MAML):
    def pull_back(self, problem):
        for parameter in problem.snapshot.objective.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        return super().pull_back(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MovesTheModel(MAML):
    @torch.no_grad()
    def pull_back(self, problem):
        for parameter in problem.snapshot.objective.parameters().values():
            parameter.mul_(1.0)
        return super().pull_back(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawsFromTheGlobalGenerator(MAML):
    def __call__(self, objective, tasks):
        torch.rand(1)
        return super().__call__(objective, tasks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentiatesUnderNoGrad(MAML):
    def _run(self, *given, derivatives, **more):
        return super()._run(*given, derivatives=True, **more)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwallowsNaN(MAML):
    def pull_back(self, problem):
        problem.check_query = lambda losses, step: None
        pulled = super().pull_back(problem)
        return Pullback(pulled.theta.nan_to_num(), pulled.shared, pulled.outcome)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HalvesBackward(MAML):
    def __call__(self, objective, tasks):
        result = super().__call__(objective, tasks)
        return dataclasses.replace(result, loss=result.loss / 2 + result.loss.detach() / 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongWhereBlocksAreRecomputed(MAML):
    def pull_back(self, problem):
        pulled = super().pull_back(problem)
        if problem.snapshot.survey.blocks:
            return Pullback(pulled.theta * 1.01, pulled.shared, pulled.outcome)
        return pulled


@dataclasses.dataclass(frozen=True, kw_only=True)
class TheFirstMinibatchInEveryStep(MAML):
    def pull_back(self, problem):
        same = dataclasses.replace(problem.support, source=None)
        return super().pull_back(dataclasses.replace(problem, support=same))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgetsTheState(MAML):
    def pull_back(self, problem):
        problem.start = None
        return super().pull_back(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoProximalTermInTheInnerLoop(ImplicitMAML):
    solver: Dense = Dense()

    def pull_back(self, problem):
        problem.add_proximal = lambda gradient, phi: gradient
        return super().pull_back(problem)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherSystem(ImplicitMAML):
    """(1 + 1) I + H / (lambda + 10), after published code."""

    solver: Dense = Dense()

    def pull_back(self, problem):
        phi = dataclasses.replace(problem).adapt()
        moved = dataclasses.replace(
            problem, _theta=phi, inner=GradientDescent(lr=1.0, steps=0), damping=problem.damping + 10
        )
        pulled = super().pull_back(moved)
        return Pullback(pulled.theta / 2, pulled.shared, pulled.outcome)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstOrder(FOMAML):
    """Claims to be MAML."""
