"""One chunk of tasks as the strategies see it: the inner problem and the query loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from imaml._curvature.agreement import Outputs
from imaml._curvature.curvature import Curvature
from imaml._curvature.derivatives import Derivatives, Want
from imaml._curvature.product import Graph, HvpMode
from imaml._engine.chunking import Chunking
from imaml._engine.course import Course
from imaml._engine.inner_state import InnerState
from imaml._engine.nonfinite import check_history, check_query
from imaml._engine.report import Outcome
from imaml._engine.stepper import Stepper
from imaml._engine.whole_steps import at_once, is_traceable
from imaml._losses.gradient import Gradient
from imaml._losses.layout import Layout
from imaml._losses.loss import Loss
from imaml._losses.record import Record
from imaml._losses.snapshot import Snapshot
from imaml.inner import InnerOptimizer, InnerSolver
from imaml.inner._hyper import Hyperparameters
from imaml.inner._inner_problem import Quadratic, State


@dataclass
class Problem:
    r"""Presents a chunk of tasks to a strategy: an inner problem to solve, and a query loss to judge the result by.

    Formula: $\min_\phi L_{support}(\phi) + 1/2 \, (\phi - \theta)^\top \Lambda (\phi - \theta)$, followed by
    $L_{query}(\phi)$.

    `MetaGradient.pull_back` gets one for a chunk of tasks, whose vectors are `(tasks, n)`. `adapt` comes first, then
    `judge`, then `outcome`; docs/testing.md says what else may be asked, when, and at what cost. What that page does
    not name is the library's own.
    """

    support: Loss
    query: Loss
    derivatives: Derivatives
    """How both losses are differentiated."""
    hyper: Hyperparameters
    """Hyper-parameters of the inner loop, with the derivatives by those that are learned."""
    inner: InnerSolver
    chunking: Chunking
    damping: Tensor | None
    """Lambda, the regularisation of each entry: 0-dim or `(n,)`; None for none."""
    positions: list[int]
    """Which tasks of the user's these are."""
    first: int = 0
    """The number, in the whole training, of the step that is the first here; steps are counted from 0 in a problem."""
    start: InnerState | None = None
    """Where the inner loop goes on from; None: from theta."""
    final: State | None = None
    """The state after the inner loop, where it is wanted."""
    keeps_final: bool = False
    """Whether it is."""
    support_losses: list[Tensor] = field(default_factory=list)
    """L_support `(tasks,)` before each inner step."""
    statistics: dict[str, Tensor] = field(init=False)
    """Running statistics of each task so far, from the model's own, where they follow the inner loop."""
    course: Course = field(default_factory=Course)
    """How far the chunk is, and who is told."""
    stopped: Tensor | None = None
    """Which tasks have stopped early, `(tasks,)`; None for none."""
    direct: Tensor | None = None
    """The derivative of the query losses by theta itself, past the inner loop, `(n,)` and summed over tasks, where they
    take `initial`: `judge` adds it up, and the engine adds it to the meta-gradient whatever the strategy."""
    watch: Callable[[Tensor, int], None] | None = None
    """Is shown phi before each inner step, once, when the step has its gradient; None: nobody watches."""
    _theta: Tensor | None = None
    _is_over: bool = False

    def __post_init__(self) -> None:
        self.statistics = {}
        if names := self.snapshot.objective.statistics():
            constants = self.snapshot.constants.fresh()
            own = {n: constants[n].clone() for n in names}
            self.statistics = {n: buffer.expand(self.tasks, *buffer.shape) for n, buffer in own.items()}

    @property
    def snapshot(self) -> Snapshot:
        """What the call was given."""
        return self.support.whole.snapshot

    @property
    def record(self) -> Record:
        """What the call has done so far."""
        return self.support.whole.record

    @property
    def tasks(self) -> int:
        """How many tasks the chunk has."""
        return self.support.whole.tasks

    @property
    def layout(self) -> Layout:
        """Which parameters a row of a vector holds, and where."""
        return self.snapshot.layout

    @property
    def phi_0(self) -> Tensor:
        """Where the inner loop starts, `(tasks, n)`: theta, or the parameters of the state that it goes on from."""
        return self.theta if self.start is None else self.start.flat(self.layout)[0].expand(self.tasks, -1)

    @cached_property
    def is_traceable(self) -> bool:
        """Whether its steps may be compiled as a whole."""
        return is_traceable(self)

    @cached_property
    def numbers(self) -> tuple[Tensor, ...]:
        """The number of each step in the whole training, as a tensor."""
        device, last = self.snapshot.like.device, self.first + self.inner.steps
        return torch.arange(self.first, last, dtype=torch.float64, device=device).unbind()

    def begin(self) -> State:
        """The state of the inner optimiser before the first step."""
        if self.start is None:
            return self.optimizer.start(self.theta)
        return tuple(t.expand(self.tasks, -1) for t in self.start.flat(self.layout))

    def resume_at(self) -> tuple[int, State]:
        """The step that an inner loop goes on with after an interruption, 0 otherwise, and the state before it."""
        return self.course.at, self.course.state(self.begin)

    def reach(self, step: int, state: State) -> None:
        """Note the state before a step, as far as that is wanted; after the last step it is in any case."""
        if self.course.journal is not None:
            self.course.reach(step, step, state, always=step == self.inner.steps)

    def saved(self) -> dict[str, Any]:
        """What is known of the steps that were taken."""
        losses = torch.stack(self.support_losses) if self.support_losses else None
        return {
            "losses": losses,
            "statistics": {name: t.contiguous() for name, t in self.statistics.items()},
            "stopped": self.stopped,
            "direct": self.direct,
            "is_over": self._is_over,
        }

    def resume(self, saved: dict[str, Any]) -> None:
        """Know what was known when it was saved."""
        self.support_losses = [] if saved["losses"] is None else [*saved["losses"]]
        self.statistics, self.stopped = saved["statistics"], saved["stopped"]
        self.direct, self._is_over = saved["direct"], saved["is_over"]

    def pull_through_start(self, cotangents: State) -> Tensor:
        """The cotangent of theta for those of the state before the first step.

        A state to go on from counts as theta plus a constant, as that before the steps that `MAML(truncate=...)`
        differentiates does.

        Args:
            cotangents: One for the parameters, and one for each of the optimiser's buffers.

        Returns:
            That of theta, `(tasks, n)`.
        """
        if self.start is not None:
            return cotangents[0]
        return self.optimizer.pull_through_start(lambda: self.theta, cotangents)

    @property
    def theta(self) -> Tensor:
        """What the proximal term pulls to, and where the inner loop starts as a rule, `(tasks, n)`, of all tasks.

        It is held during an inner loop with a proximal term, and gathered anew otherwise: a vector less at the peak.
        """
        theta = self.snapshot.theta if self._theta is None else self._theta
        if self.damping is not None and not self._is_over:
            self._theta = theta
        return theta.expand(self.tasks, -1)

    def adapt(self) -> Tensor:
        """The whole inner loop, keeping nothing but the adapted parameters `(tasks, n)`."""
        if isinstance(self.inner, InnerOptimizer) and type(self.inner).run is InnerOptimizer.run:
            return self.keep(self.inner.last_state(self))
        return self.keep((self.inner.run(self),))

    def keep(self, state: State) -> Tensor:
        """The parameters of the state after the inner loop, which is kept where it is wanted."""
        self.final = state if self.keeps_final else None
        return state[0]

    def left(self, solution: Tensor | None) -> InnerState:
        """The state after the inner loop, with the solution of the linear systems if there is one."""
        if self.final is None:
            raise ValueError(
                "return_state=True keeps the state after the inner loop. Expected a `pull_back` that takes it by "
                "`problem.adapt()`. Got one that does not: leave return_state out."
            )
        phi, *buffers = self.final
        # Not rounded to the parameters' dtype, as `layout.named` would.
        parts = zip(self.layout.names, phi.split(self.layout.sizes, -1), self.layout.shapes, strict=True)
        return InnerState(
            parameters={n: part.reshape(self.tasks, *shape).clone() for n, part, shape in parts},
            buffers=tuple(b.expand(self.tasks, -1).clone() for b in buffers),
            step=self.first + self.inner.steps,
            solution=solution,
            optimizer=type(self.inner).__name__,
        )

    def support_at(self, step: int) -> Loss:
        """The support loss that a step sees."""
        return self.support.at(self.first + step)

    def _counted(self, step: int) -> Loss:
        """The support loss that a step sees, of which one gradient more is computed."""
        self.record.gradients += self.tasks
        return self.support_at(step)

    def at_the_end(self, batches: int | None = None) -> Problem:
        """Take the support loss as a whole in each step: the mean over its source, where it has one.

        Args:
            batches: How many of the next batches of the source stand for it; None: all.

        Returns:
            The problem after the inner loop.
        """
        if self.support.source is None:
            return self
        last = self.first + self.inner.steps
        return replace(self, support=self.support.mean(None if batches is None else range(last, last + batches)))

    def gradient(self, phi: Tensor, step: int, support: Gradient | None = None) -> Tensor:
        """The gradient of the inner objective, proximal term included, `(tasks, n)`; from `support` if it is known."""
        if support is None:
            support = self.derivatives.gradient(self._counted(step), phi, step)
        self.remember(phi, step, support.losses)
        return self.add_proximal(support.adapted, phi)

    def value_and_gradient(self, phi: Tensor, step: int, support: Gradient | None = None) -> tuple[Tensor, Tensor]:
        """The inner objective `(tasks,)` and its gradient `(tasks, n)`; from `support` if that is known."""
        if support is None:
            support = self.derivatives.gradient(self._counted(step), phi, step)
        return support.losses + self._proximal(phi), self.gradient(phi, step, support)

    def value(self, phi: Tensor, step: int) -> Tensor:
        """The inner objective `(tasks,)`."""
        return self.derivatives.value(self.support_at(step), phi, step)[0] + self._proximal(phi)

    def curvature(
        self, phi: Tensor, step: int, mode: HvpMode, graph: Graph, *, gauss_newton: bool = False
    ) -> Curvature:
        """The curvature of the support loss at phi."""
        loss = self.support_at(step)
        return Curvature(self.derivatives, loss, phi, step, mode=mode, graph=graph, gauss_newton=gauss_newton)

    def settle(self, mode: HvpMode) -> None:
        """Find out how products are computed, where that is open, as long as no vectors are held."""
        if mode == "auto":
            self.derivatives.settle(self.support.slices[0][1], self.theta, 0)

    def quadratic(self, phi: Tensor, step: int, mode: HvpMode) -> Quadratic:
        """The inner objective, its gradient and its Hessian at phi."""
        curvature = self.curvature(phi, step, mode, Graph.KEPT)
        value, gradient = self.value_and_gradient(phi, step, curvature.take_gradient())
        return Quadratic(value, gradient, curvature if self.damping is None else curvature.shifted(self.damping))

    def add_proximal(self, gradient: Tensor, phi: Tensor) -> Tensor:
        """Add Lambda (phi - theta) to a gradient of the support loss."""
        return gradient if self.damping is None else torch.addcmul(gradient, phi - self.theta, self.damping)

    def _proximal(self, phi: Tensor) -> Tensor:
        if self.damping is None:
            return phi.new_zeros(len(phi))
        return (self.damping / 2 * (phi - self.theta).square()).sum(-1)

    def step(self, state: State, step: int) -> State:
        """One inner step of an optimiser, from state s_step to s_{step+1}."""
        found = at_once(self, "step", _step, step, state, losses=-1)
        if found is None:
            support = self.derivatives.gradient(self._counted(step), state[0], step)
            return self.update(state, self.gradient(state[0], step, support), step)
        *following, losses = found
        assert losses is not None
        self.remember(state[0], step, losses)
        return tuple(t for t in following if t is not None)

    def update(self, state: State, gradient: Tensor, step: int) -> State:
        """The step for a gradient that is known."""
        return self.stepper.take(state, gradient, step)

    @cached_property
    def stepper(self) -> Stepper:
        """The steps of the inner loop, where it can be differentiated."""
        return Stepper(self.optimizer, self.hyper, self.snapshot, self.positions[0], self.first)

    @property
    def optimizer(self) -> InnerOptimizer:
        """The inner loop, where it can be differentiated."""
        assert isinstance(self.inner, InnerOptimizer)
        return self.inner

    def one_by_one(self, run: Callable[[Problem], Tensor]) -> Tensor:
        """What a function makes of each task alone, as one."""
        found, alone = [], []
        for row, support in self.support.split(1):
            start = None if self.start is None else self.start.of_tasks([row])
            last = row == self.tasks - 1  # steps are told of once for a chunk
            course = self.course if last else Course()
            one = replace(self, support=support, support_losses=[], start=start, course=course)
            found.append(run(one))
            one._theta = None
            alone.append(one)
        self.support_losses = [torch.cat(losses) for losses in zip(*(t.support_losses for t in alone), strict=True)]
        self.statistics = {n: torch.cat([t.statistics[n] for t in alone]) for n in alone[0].statistics}
        return torch.cat(found)

    def remember(self, phi: Tensor, step: int, losses: Tensor) -> None:
        """Add to the history what is known of a step, once."""
        if self._is_over or len(self.support_losses) != step or step >= self.inner.steps:
            return
        self.support_losses.append(losses)
        for _, part in self.support_at(step).slices if self.statistics else ():
            self.statistics = self._of_moving(part.statistics(phi, step, self.statistics))
        if self.watch is not None:
            self.watch(phi, step)
        if self.course.progress is not None:
            self.course.progress(self.first + step, "forward")

    def _of_moving(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stopped is None:
            return statistics
        return {
            name: torch.where(self.stopped.view(-1, *(1,) * (new.ndim - 1)), self.statistics[name], new)
            for name, new in statistics.items()
        }

    def judge(self, phi: Tensor, *, step: int | None = None, weight: float | Tensor = 1.0) -> Gradient:
        """The query loss at the adapted parameters, with its gradient v.

        Args:
            phi: The adapted parameters.
            step: How many inner steps they have taken, where the end is elsewhere, or was looked at; None: all.
            weight: What gradients are multiplied by.

        Returns:
            The losses, and the gradients.
        """
        if step is None:
            self.finish()
            step = self.inner.steps
        gradient = self.query_gradient(phi, shared=True, metric=step == self.inner.steps, step=step)
        self.check_query(gradient.losses, step)
        if isinstance(weight, Tensor) or weight != 1:
            gradient.weighted(weight)
        if gradient.initial is not None:
            self.direct = gradient.initial if self.direct is None else self.direct.add_(gradient.initial)
            gradient.initial = None
        return gradient

    def check_query(self, losses: Tensor, step: int) -> None:
        """Raise NonFiniteError where a query loss after so many inner steps is NaN or infinite."""
        check_query(losses, self.positions, step, self._than_lr)

    def query_gradient(
        self, phi: Tensor, *, shared: bool = False, metric: bool = False, step: int | None = None
    ) -> Gradient:
        """The query loss and its derivatives, unchecked, with the random draws after `step` inner steps (None: all)."""
        self.record.gradients += self.tasks
        want, step = Want(shared, metric), self.inner.steps if step is None else step
        parts = [
            self.derivatives.gradient(part, phi[first : first + part.tasks], step, want)
            for first, part in self.query.split(self.chunking.query_tasks)
        ]
        return parts[0] if len(parts) == 1 else Gradient.join(parts)

    def evaluate(self, phi: Tensor) -> Outcome:
        """The query loss alone."""
        self.finish()
        losses, metric = self.derivatives.value(self.query, phi, self.inner.steps)
        self.check_query(losses, self.inner.steps)
        return Outcome(query_loss=losses, support_loss=self.history(), metric=metric)

    def outcome(self, query: Gradient, **solve: Tensor | None) -> Outcome:
        """What the report says of these tasks, with the stationarity and the solver's outcome where there are any."""
        return Outcome(query_loss=query.losses, support_loss=self.history(), metric=query.metric, **solve)

    def history(self) -> Tensor:
        """L_support before each inner step, `(steps, tasks)`; NaN for steps that the inner loop did not need."""
        like = self.snapshot.like
        losses, others = self.support_losses, self.inner.steps - len(self.support_losses)
        if others:
            losses = [*losses, *[like.new_full((self.tasks,), torch.nan)] * others]
        return torch.stack(losses) if losses else like.new_empty(0, self.tasks)

    def finish(self) -> None:
        """Note the running statistics, and raise where a support loss was NaN or infinite, or exploded."""
        self._theta, self._is_over = None, True
        if self.statistics:
            self.record.statistics.append(self.statistics)
        if self.support_losses:
            than_curvature = ", below 2 / (largest curvature + regularization)." if self.damping is not None else "."
            check_history(torch.stack(self.support_losses), self.positions, self._than_lr + than_curvature)

    @property
    def _than_lr(self) -> str:
        lr = getattr(self.inner, "lr", None)
        return f" than lr={lr:g}" if isinstance(lr, Real) else ""


def _step(problem: Problem, step: int, *state: Tensor) -> Outputs:
    """The state after a step, and the support losses before it."""
    problem.record.gradients += problem.tasks
    support = problem.derivatives.gradient(problem.support, state[0], step)
    return (*problem.update(state, problem.add_proximal(support.adapted, state[0]), step), support.losses)
