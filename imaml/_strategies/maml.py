"""Exact MAML: the adjoint of the inner loop, written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from imaml._curvature.curvature import HvpMode, check_mode
from imaml._engine.problem import Problem
from imaml._engine.report import Pullback
from imaml._numbers import check_integer
from imaml._strategies.maml_costs import MAMLCosts
from imaml._strategies.meta_gradient import MetaGradient
from imaml._strategies.point import Point
from imaml._strategies.states import most_states, states_backwards
from imaml._strategies.storage import Storage, Store, store
from imaml.inner import InnerOptimizer
from imaml.inner._inner_problem import State
from imaml.planning._costs import Costs


@dataclass(frozen=True, kw_only=True)
class MAML(MetaGradient):
    """Exact second-order MAML (Finn et al. 2017): (d phi_K / d theta)' v with v the gradient of L_query at phi_K.

    Computed by a reverse sweep over the inner steps, never through a K-step graph. With a the cotangent of s_{k+1} =
    U(s_k, g_k), g_k = grad L_support(phi_k) + Lambda (phi_k - theta) and phi_k in the optimiser's state s_k: pull a
    through U to get its cotangents (a, w) for (s_k, g_k), then a_phi <- a_phi + H_k w + Lambda w, one
    Hessian-vector product a step. Exact for learned hyper-parameters and whatever else the losses use too.

    Cost per task: K + 1 gradients and K Hessian-vector products; where U is not linear or a step size is learned, the
    sweep evaluates K gradients again. Memory: one product plus the K states, `(n,)` a vector of each; with
    `checkpoints=m` at most m states, and the steps between them are recomputed on the binomial schedule that minimises
    recomputation (Griewank & Walther 2000, Algorithm 799); with `linearize=True` the graphs of all K steps, for a
    forward and a backward pass less a step.

    Args:
        inner: An `InnerOptimizer`; for the rest see `MetaGradient`, as for `regularization` and `chunk_size`.
        truncate: Differentiate the last m steps only, as if the state before them were theta plus a constant: m
            products, and the states of m steps. Biased (Shaban et al. 2019): what the earlier steps would have changed
            is ignored, for step sizes as for theta; 0 is `FOMAML`. None: all steps.
        checkpoints: How many inner states are kept at most besides theta, >= 0; None: all of them.
        storage: Where the states wait for the sweep, which reads them back bit for bit. "device": where they are.
            "cpu": in pinned memory, for parameters on a CUDA device, with copies that run beside the computation; the
            same as "device" elsewhere. "disk": in a file of the temporary folder (TMPDIR) that no name leads to, so
            that nothing is left behind; an OSError says how much room is missing. The device then holds the state at
            hand, whatever K.
        linearize: Keep the graph of each inner step, so that its product costs about one gradient less; False evaluates
            the step anew. None: where `chunk_size`, `checkpoints` and `storage` are left open and the graphs are
            small, at most 192 MiB. The modes other than reverse-over-reverse always evaluate anew.
        hvp: How Hessian-vector products are computed. "auto" uses "reverse-over-reverse", or "finite-difference" where
            the model has an operation without second derivatives; the report says which. "forward-over-reverse" is
            exact too. Finite differences are inexact, and useless in float32 for a convolutional network with ReLU:
            docs/numerics.md has figures.
    """

    _costs: ClassVar[type[Costs] | None] = MAMLCosts

    truncate: int | None = None
    checkpoints: int | None = None
    storage: Storage = "device"
    linearize: bool | None = None
    hvp: HvpMode = "auto"

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        super().__post_init__()
        check_mode(self.hvp)
        if not isinstance(self.inner, InnerOptimizer):
            raise TypeError(
                "MAML differentiates the steps of its inner loop. Expected GradientDescent, Adam, AdamW, RMSprop or "
                f"another InnerOptimizer. Got {self.inner!r}: use ImplicitMAML, which needs the result alone."
            )
        if type(self.inner).run is not InnerOptimizer.run:
            raise TypeError(
                "MAML differentiates `update`, step by step. Expected an inner optimiser that leaves `run` as it is. "
                f"Got {type(self.inner).__name__}, whose own `run` would be ignored: write it as `update` and `start`, "
                "or use ImplicitMAML, which needs the result alone."
            )
        if self.inner.stationarity is not None:
            raise ValueError(
                "MAML differentiates a known number of inner steps. Expected an inner loop with stationarity=None. Got "
                f"{self.inner.stationarity}: use ImplicitMAML to stop early."
            )
        if self.truncate is not None:
            check_integer("`truncate`, unless None,", self.truncate, least=0)
        if self.storage not in get_args(Storage):
            raise ValueError(f"`storage` must be one of {', '.join(get_args(Storage))}. Got {self.storage!r}.")
        if self.linearize and self.storage != "device":
            raise ValueError(
                "linearize=True keeps the graphs of all inner steps on the device. Expected storage='device'. "
                f"Got {self.storage!r}: use one of the two."
            )
        if self.linearize and self.microbatch_size is not None:
            raise ValueError(
                "linearize=True keeps graphs, of which microbatch_size holds one slice at a time. Expected "
                f"microbatch_size=None. Got {self.microbatch_size}: use one of the two."
            )
        if self.checkpoints is not None:
            check_integer("`checkpoints`, unless None,", self.checkpoints, least=0)
            if self.linearize:
                raise ValueError(
                    "linearize=True keeps the graphs of all inner steps. Expected checkpoints=None. "
                    f"Got {self.checkpoints}: use one of the two."
                )

    def pull_back(self, problem: Problem) -> Pullback:
        states = most_states(problem.inner.steps - self._first, self.checkpoints)
        with store(self.storage, problem.support.context.like.device, states) as kept:
            return self._sweep(problem, kept)

    @property
    def _first(self) -> int:
        """The first inner step that is differentiated."""
        return 0 if self.truncate is None else max(0, self.inner.steps - self.truncate)

    @property
    def _states(self) -> int:
        if self.storage != "device":
            return 0
        assert isinstance(self.inner, InnerOptimizer)
        return most_states(self.inner.steps - self._first, self.checkpoints) * (1 + self.inner.buffers)

    def _sweep(self, problem: Problem, kept: Store) -> Pullback:
        phi, points = self._adapt(problem, kept)
        query = problem.judge(phi)
        cotangent, fixed, damping, outcome = query.adapted, query.fixed, problem.damping, problem.outcome(query)
        buffers = (torch.zeros_like(cotangent),) * problem.optimizer.buffers
        del query, phi  # they would live through the sweep
        pulled_by_theta = 0 if damping is None else torch.zeros_like(cotangent)
        for point in points:
            (cotangent, *rest), w = point.pull_through_update((cotangent, *buffers))
            buffers = tuple(rest)
            product, mixed = point.curvature.product(w, mixed=fixed is not None)
            cotangent = product.add_(cotangent)
            if damping is not None:
                cotangent.addcmul_(w, damping)
                pulled_by_theta -= damping * w
            if fixed is not None and mixed is not None:
                fixed.add_(mixed)
        if self._first == 0:
            cotangent = problem.optimizer.pull_through_start(lambda: problem.theta, (cotangent, *buffers))
        return Pullback(cotangent + pulled_by_theta, fixed, outcome)

    def _adapt(self, problem: Problem, kept: Store) -> tuple[Tensor, Iterator[Point]]:
        """phi_K, and the inner steps to differentiate, the last first."""
        steps, first = problem.inner.steps, self._first
        before = _before(problem, first)
        keeps_graphs = problem.plan.keeps_graphs if self.linearize is None else self.linearize
        if keeps_graphs and self.checkpoints is None and self.storage == "device":
            linearised, state = [], before()
            for step in range(first, steps):
                point, gradient = Point.with_gradient(problem, state, step, self.hvp)
                linearised.append(point)
                state = problem.update(state, gradient, step)
            return state[0], (linearised.pop() for _ in range(first, steps))
        states = states_backwards(problem, before, first, self.checkpoints, kept)
        return next(states)[0], (
            Point.at(problem, state, step, self.hvp)
            for step, state in zip(reversed(range(first, steps)), states, strict=True)
        )


def _before(problem: Problem, step: int) -> Callable[[], State]:
    """The state before an inner step; that before the first is gathered whenever it is asked for, and held by none."""

    def start() -> State:
        return problem.optimizer.start(problem.theta)

    if step == 0:
        return start
    state = start()
    for taken in range(step):
        state = problem.step(state, taken)
    return lambda: state
