"""What a strategy has to say of its costs, in terms of a few stages that are measured for few tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from imaml._curvature.curvature import Curvature
from imaml._curvature.product import Graph
from imaml._engine.problem import Problem
from imaml.inner import InnerOptimizer, InnerSolver
from imaml.planning._account import Account, Use
from imaml.planning._solve import NO_SOLVE, Solve

_FEW = (2, 3)
"""Steps of an inner solver that are measured: what the last one adds, every further one is taken to add."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call computes for a task."""

    gradients: int
    hvps: int
    equivalents: float
    """Both, in gradients."""
    judged: int = 1
    """How many of the gradients are those of the query loss."""
    transfer: float = 0.0
    """What moving states costs, as that of a gradient whose graph has so many bytes."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the costs depend on besides the engine."""

    adapted: int
    """n, the entries of the adapted parameters."""
    shared: int
    """m, those of the shared ones that get a meta-gradient."""
    dtype: torch.dtype
    device: torch.device
    """Device of the adapted parameters, as a flat vector."""
    mode: str
    """How Hessian-vector products are computed."""
    damped: bool
    """Whether there is a proximal term."""
    scaled: bool
    """Whether its weight differs from entry to entry."""
    needs_gradient: bool
    """Whether the derivative of an inner step needs the gradient there."""
    is_vectorised: bool = True
    """Whether chunks run under `vmap`."""
    solve: Solve = NO_SOLVE
    """What a linear system takes, where the strategy solves any."""
    per_step: tuple[float, float] = (1, 0)
    """Gradients and products of an inner step."""
    fetched: int = 0
    """Bytes of the batch that an inner step fetches, of all tasks; 0 where it is there."""
    without_path: Collection[str] = ()
    """Meta-parameters that no derivative leads to."""
    recomputes: bool = False
    """Whether modules, taken for the whole model, are recomputed."""
    is_forward: bool = False
    """Whether products with them that keep no graph are by forward-over-reverse."""

    @property
    def gradient(self) -> float:
        """What a gradient costs, in gradients that recompute nothing."""
        return 4 / 3 if self.recomputes else 1

    def product(self, graph: Graph) -> float:
        """What a product with the Hessian costs, in gradients that recompute nothing."""
        # One pass back through a computation costs twice that computation. So with a forward pass of 1 a gradient is 3,
        # and its own derivative 6 more, or 9 where the graph is rebuilt. Finite differences are two gradients. With
        # blocks that are recomputed a gradient is 4, and a product about 15, by the flops of residual blocks, or 12 by
        # forward-over-reverse, which rebuilds it.
        if self.mode == "finite-difference":
            return 2 * self.gradient
        if graph is not Graph.REBUILT:
            return (5 if self.recomputes else 3) - self.gradient
        return (4 if self.is_forward else 5) if self.recomputes else 3


@dataclass(frozen=True, kw_only=True)
class ChunkUse:
    """What the stages of a chunk of tasks take."""

    tasks: int
    uses: Mapping[str, Use]
    facts: Facts

    @property
    def vector(self) -> float:
        """Bytes of `(tasks, n)`."""
        return self.tasks * self.theta

    @property
    def theta(self) -> float:
        """Bytes of `(n,)`, which all tasks share before the first step."""
        return self.facts.adapted * self.facts.dtype.itemsize

    def __getitem__(self, stage: str) -> Use:
        return self.uses[stage]


@dataclass
class Stages:
    """Measures stages, each once, at parameters that are there as long as it is.

    Some modules (LSTM) hold on to those of their last evaluation, which a stage must not be seen to give back.
    """

    account: Account
    before: Tensor
    """Parameters before an inner step, `(tasks, n)`: before the first of them all tasks share one vector, and the
    operations of a vectorised model copy less."""
    after: Tensor
    """Parameters after the last inner step."""
    done: set[str] = field(default_factory=set)
    per_step: tuple[float, float] = (1, 0)
    """Gradients and products of an inner step of a task, where these were counted."""

    @classmethod
    def of(cls, account: Account, problem: Problem) -> Stages:
        """The stages of a chunk."""
        theta, steps = problem.theta, problem.inner.steps
        own = theta.clone() if steps else theta
        return cls(account, own if steps > 1 else theta, own)

    def missing(self, name: str) -> bool:
        """Whether this one has still to be measured; it is from now on taken to be."""
        missing = name not in self.done
        self.done.add(name)
        return missing

    def product(self, name: str, curvature: Curvature, w: Tensor, *, mixed: bool) -> None:
        """A Hessian-vector product."""
        with self.account.stage(name):
            product = curvature.product(w, mixed=mixed)
        del product


@dataclass(frozen=True)
class Costs(ABC):
    """What one engine costs."""

    acts_through: ClassVar[tuple[str, ...] | None] = None
    """Hyper-parameters that the meta-gradient differentiates; None for all."""

    engine: Any
    graphs: int = 0
    """How many graphs a chunking keeps, where the engine leaves it open."""

    @property
    def numbers_of_graphs(self) -> list[int]:
        """How many a chunking may keep; several where the engine leaves it open."""
        return [0]

    def variants(self, device: torch.device) -> list[dict[str, Any]]:
        """Settings of what the user left open, besides the size of chunks; the first holds the most and is fastest."""
        return [{}, *self.trials]

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Settings that `imaml bench` measures in the chunks that the engine chooses, besides the engine as it is."""
        return []

    def measure(self, problem: Problem, stages: Stages) -> Facts:
        """Measure the stages of a chunk that this engine consists of."""
        record, facts = problem.record, self._inner_loop(problem, stages)
        if stages.missing("query"):
            with stages.account.stage("query"):
                judged = problem.query_gradient(stages.after, shared=True, metric=True)
            del judged
        self._measure(problem, stages)
        hyper = problem.hyper
        through = hyper.leads(hyper.learned if self.acts_through is None else self.acts_through)
        return replace(
            facts,
            mode=record.mode or facts.mode,
            is_vectorised=record.is_vectorised,
            without_path=record.without_path(problem.snapshot.objective.meta, through),
            recomputes=bool(problem.snapshot.survey.recomputed),
            is_forward=record.mode == "forward-over-reverse" or problem.derivatives.is_forward,
        )

    def _inner_loop(self, problem: Problem, stages: Stages) -> Facts:
        snapshot, record, inner = problem.snapshot, problem.record, problem.inner
        n, m = (sum(layout.sizes) for layout in (snapshot.layout, snapshot.shared_layout))
        facts = Facts(
            adapted=n,
            shared=m,
            dtype=snapshot.like.dtype,
            device=snapshot.like.device,
            mode="reverse-over-reverse",
            damped=problem.damping is not None,
            scaled=problem.damping is not None and problem.damping.ndim > 0,
            needs_gradient=isinstance(inner, InnerOptimizer) and problem.stepper.needs_gradient,
        )
        if inner.steps == 0:
            return facts
        if isinstance(inner, InnerOptimizer):
            if stages.missing("step"):
                state = inner.start(stages.before)
                with stages.account.stage("step"):
                    following = problem.step(state, 0)
                del following
            return facts
        for steps in sorted({min(inner.steps, few) for few in _FEW}):
            if stages.missing(f"adapt {steps}"):
                few, before = replace(inner, steps=steps), (record.gradients, record.products)
                with stages.account.stage(f"adapt {steps}"):
                    phi = few.run(replace(problem, inner=few, support_losses=[]))
                del phi
                gradients, hvps = record.gradients - before[0], record.products - before[1]
                stages.per_step = gradients / problem.tasks / steps, hvps / problem.tasks / steps
        return replace(facts, per_step=stages.per_step)

    def inner_peak(self, chunk: ChunkUse) -> float:
        """The peak of the inner loop, where nothing but its result is kept, and theta for a proximal term."""
        inner: InnerSolver = self.engine.inner
        if inner.steps == 0:
            return chunk.theta
        if not isinstance(inner, InnerOptimizer):
            last = chunk[f"adapt {min(inner.steps, _FEW[1])}"].peak
            if inner.steps <= _FEW[1]:
                return last
            return last + (inner.steps - _FEW[1]) * max(0.0, last - chunk[f"adapt {_FEW[0]}"].peak)
        state, most = chunk.vector * (1 + inner.buffers), chunk["step"].peak
        if inner.stationarity is not None:
            most = max(most, 2 * state + chunk.vector)  # the step taken, and what of it counts
        if inner.steps == 1:
            return most + chunk.theta
        return most + state + chunk.theta * chunk.facts.damped

    def solve(self, theta: Tensor) -> Solve:
        """What a linear system of the size of theta takes, if any is solved."""
        return NO_SOLVE

    def query_peak(self, chunk: ChunkUse) -> float:
        """The peak of the query gradient, with the parameters that it is taken at."""
        return chunk["query"].peak + (chunk.vector if self.engine.inner.steps else chunk.theta)

    def _measure(self, problem: Problem, stages: Stages) -> None:  # noqa: B027
        """Measure the strategy's own stages."""

    @abstractmethod
    def peak(self, chunk: ChunkUse) -> float:
        """The most bytes that a chunk holds at once."""

    def once(self, chunk: ChunkUse) -> float:
        """What the first chunk of a call holds besides."""
        return 0.0

    @abstractmethod
    def work(self, facts: Facts) -> Work:
        """The most that a task takes."""

    def inner_counts(self, facts: Facts) -> tuple[int, int]:
        """Gradients and products of the inner loop."""
        gradients, hvps = facts.per_step
        return round(self.engine.inner.steps * gradients), round(self.engine.inner.steps * hvps)
