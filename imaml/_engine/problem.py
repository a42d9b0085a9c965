"""One chunk of tasks as the strategies see it: the inner problem and the query loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from numbers import Real

import torch
from torch import Tensor

from imaml._curvature.curvature import Curvature, HvpMode
from imaml._engine.chunking import Plan
from imaml._engine.report import Outcome
from imaml._errors import DivergenceError, NonFiniteError
from imaml._losses.chunk import UPDATE, ChunkLoss
from imaml._losses.foreign import described, foreign_leaves
from imaml._losses.gradient import Gradient
from imaml._losses.layout import Layout
from imaml._losses.microbatch import Microbatched
from imaml._torch import is_write_to_shared
from imaml.inner import InnerOptimizer, InnerSolver
from imaml.inner._inner_problem import Quadratic, State
from imaml_solvers import LinearOperator

EXPLOSION = 1e6
"""A support loss that grows by this factor has diverged, finite or not."""


@dataclass
class Problem:
    """min over phi of L_support(phi) + 1/2 (phi - theta)' Lambda (phi - theta), followed by L_query(phi).

    What `MetaGradient.pull_back` gets: a chunk of tasks, whose vectors are `(tasks, n)`. `adapt` comes first, then
    `judge`, then `outcome`; docs/testing.md says what else may be asked, when, and at what cost. `support`, `query` and
    `plan` are the library's own.
    """

    support: ChunkLoss | Microbatched
    query: ChunkLoss | Microbatched
    inner: InnerSolver
    plan: Plan
    damping: Tensor | None
    """Lambda, the regularisation of each entry: 0-dim or `(n,)`; None for none."""
    positions: list[int]
    """Which tasks of the user's these are."""
    support_losses: list[Tensor] = field(default_factory=list)
    """L_support `(tasks,)` before each inner step."""
    statistics: dict[str, Tensor] = field(init=False)
    """Running statistics of each task so far, from the model's own, where they follow the inner loop."""
    stopped: Tensor | None = None
    """Which tasks have stopped early, `(tasks,)`; None for none."""
    _theta: Tensor | None = None
    _is_over: bool = False

    def __post_init__(self) -> None:
        context, tasks = self.support.context, self.support.tasks
        constants = context.fresh_constants()
        own = {n: constants[n].clone() for n in context.objective.statistics()}
        self.statistics = {n: buffer.expand(tasks, *buffer.shape) for n, buffer in own.items()}

    @property
    def layout(self) -> Layout:
        """Which parameters a row of a vector holds, and where."""
        return self.support.context.layout

    @property
    def theta(self) -> Tensor:
        """Where the inner loop starts and what the proximal term pulls to, `(tasks, n)`, shared by the tasks.

        It is held during an inner loop with a proximal term, and gathered anew otherwise.
        """
        theta = self.support.context.theta if self._theta is None else self._theta
        if self.damping is not None and not self._is_over:
            self._theta = theta
        return theta.expand(self.support.tasks, -1)

    def gradient(self, phi: Tensor, step: int, support: Gradient | None = None) -> Tensor:
        """The gradient of the inner objective, proximal term included, `(tasks, n)`; from `support` if it is known."""
        support = support or self._support_gradient(phi, step)
        if len(self.support_losses) == step < self.inner.steps:
            self.support_losses.append(support.losses)
            self._carry_statistics(phi, step)
        return self.add_proximal(support.adapted, phi)

    def value_and_gradient(self, phi: Tensor, step: int, support: Gradient | None = None) -> tuple[Tensor, Tensor]:
        """The inner objective `(tasks,)` and its gradient `(tasks, n)`; from `support` if that is known."""
        support = support or self._support_gradient(phi, step)
        return support.losses + self._proximal(phi), self.gradient(phi, step, support)

    def quadratic(self, phi: Tensor, step: int, mode: HvpMode) -> Quadratic:
        """The inner objective, its gradient and its Hessian at phi."""
        curvature = Curvature(self.support, phi, step, mode=mode, graph="keep")
        value, gradient = self.value_and_gradient(phi, step, curvature.take_gradient())

        def mv(w: Tensor) -> Tensor:
            product = curvature.product(w)[0]
            return product if self.damping is None else torch.addcmul(product, w, self.damping)

        return Quadratic(value, gradient, LinearOperator(mv))

    def _support_gradient(self, phi: Tensor, step: int) -> Gradient:
        self.support.context.gradients += self.support.tasks
        return self.support.gradient(phi, step)

    def value(self, phi: Tensor, step: int) -> Tensor:
        """The inner objective `(tasks,)`."""
        return self.support.value(phi, step)[0] + self._proximal(phi)

    def _proximal(self, phi: Tensor) -> Tensor:
        if self.damping is None:
            return phi.new_zeros(len(phi))
        return (self.damping / 2 * (phi - self.theta).square()).sum(-1)

    def one_by_one(self, run: Callable[[Problem], Tensor]) -> Tensor:
        """What a function makes of each task alone, as one."""
        found, alone = [], []
        for _, support in self.support.split(1):
            one = replace(self, support=support, support_losses=[])
            found.append(run(one))
            one._theta = None
            alone.append(one)
        self.support_losses = [torch.cat(losses) for losses in zip(*(t.support_losses for t in alone), strict=True)]
        self.statistics = {n: torch.cat([t.statistics[n] for t in alone]) for n in alone[0].statistics}
        return torch.cat(found)

    def _carry_statistics(self, phi: Tensor, step: int) -> None:
        if self.statistics:
            for _, part in self.support.parts:
                self.statistics = self._of_moving(part.statistics(phi, step, self.statistics))

    def _of_moving(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stopped is None:
            return statistics
        return {
            name: torch.where(self.stopped.view(-1, *(1,) * (new.ndim - 1)), self.statistics[name], new)
            for name, new in statistics.items()
        }

    def add_proximal(self, gradient: Tensor, phi: Tensor) -> Tensor:
        """Add Lambda (phi - theta) to a gradient of the support loss."""
        return gradient if self.damping is None else torch.addcmul(gradient, phi - self.theta, self.damping)

    def step(self, state: State, step: int) -> State:
        """One inner step of an optimiser, from state s_step to s_{step+1}."""
        return self.update(state, self.gradient(state[0], step), step)

    def update(self, state: State, gradient: Tensor, step: int) -> State:
        """The step for a gradient that is known.

        Args:
            state: That before it.
            gradient: Of the inner objective there.
            step: Its number.

        Returns:
            The next state.

        Raises:
            TypeError: The optimiser's update does not return a state.
            ValueError: It changes its arguments, mixes tasks, or uses what requires grad and would get no gradient.
            RuntimeError: Its own.
        """
        optimizer, context, versions = self.optimizer, self.support.context, [t._version for t in (*state, gradient)]

        @torch.enable_grad()
        def take() -> State:
            with self.draws(step):
                return optimizer.update(state, gradient, step, context.hyper.at(step))

        name, size = f"{type(self.inner).__name__}.update", 1 + optimizer.buffers
        in_place = f"{name} changes its arguments in place. Expected new tensors: use a + b for a.add_(b)."
        try:
            following = take()
        except RuntimeError as error:
            if is_write_to_shared(error):  # theta, before the first step
                raise ValueError(in_place) from error
            raise
        if not isinstance(following, tuple) or len(following) != size:
            got = f"{len(following)} tensors" if isinstance(following, tuple) else type(following).__name__
            raise TypeError(f"{name} must return a tuple of phi and its {size - 1} `buffers`. Got {got}.")
        if versions != [t._version for t in (*state, gradient)]:
            raise ValueError(in_place)
        if step == 0 and len(gradient) > 1 and not optimizer.said_of_update("is_deterministic"):
            self._check_rows(name, state, gradient, following)
        if not any(t.requires_grad for t in following):
            return following
        # Nothing that it was given requires grad.
        if context.differentiates and (foreign := foreign_leaves(following, (), take)):
            raise ValueError(
                f"{name} uses what requires grad and would get no gradient: "
                f"{described(foreign, context.objective.names())}. Expected a function of its arguments. Make it one "
                "of `hyperparameters`, which may be functions of Objective(..., meta={...}), or detach it."
            )
        return tuple(t.detach() for t in following)

    def _check_rows(self, name: str, state: State, gradient: Tensor, following: State) -> None:
        """Raise where the first step of a task depends on those that run with it; random draws are not looked at.

        Raises:
            ValueError: It does.
        """
        context = self.support.context
        with self.draws(0):
            alone = self.optimizer.update(tuple(t[:1] for t in state), gradient[:1], 0, context.hyper.at(0))
        if context.replay.draws:
            return
        tolerance = torch.finfo(gradient.dtype).eps ** 0.5

        def agree(some: State, others: State) -> bool:
            pairs = zip(some, others, strict=True)
            return all(torch.allclose(a, b, rtol=tolerance, equal_nan=True) for a, b in pairs)

        if agree(alone, tuple(t[:1] for t in following)):
            return
        with self.draws(0):
            again = self.optimizer.update(state, gradient, 0, context.hyper.at(0))
        if agree(again, following):  # else it is no function of its arguments, and says nothing of the tasks
            raise ValueError(
                f"{name} mixes tasks. Expected that every row of a state and of the gradient, `(tasks, n)`, is a task "
                "by itself. Got another step for a task alone than among others: take norms and sums along the last "
                "dimension, such as gradient.norm(dim=-1, keepdim=True)."
            )

    def draws(self, step: int) -> AbstractContextManager[None]:
        """Within it, random numbers are those of the optimiser at this step."""
        if self.optimizer.said_of_update("is_deterministic"):
            return nullcontext()
        return self.support.context.replay.at(UPDATE, self.positions[0], step)

    @property
    def optimizer(self) -> InnerOptimizer:
        """The inner loop, where it can be differentiated."""
        assert isinstance(self.inner, InnerOptimizer)
        return self.inner

    def adapt(self) -> Tensor:
        """The whole inner loop, keeping nothing but the adapted parameters."""
        return self.inner.run(self)

    def judge(self, phi: Tensor) -> Gradient:
        """The query loss at the adapted parameters, with its gradient v."""
        self.finish()
        gradient = self.query_gradient(phi, fixed=True, metric=True)
        self.check_query(gradient.losses)
        return gradient

    def query_gradient(self, phi: Tensor, *, fixed: bool = False, metric: bool = False) -> Gradient:
        """The query loss and its derivatives, unchecked."""
        self.query.context.gradients += self.query.tasks
        parts = [
            part.gradient(phi[first : first + part.tasks], self.inner.steps, fixed=fixed, metric=metric)
            for first, part in self.query.split(self.plan.query_tasks)
        ]
        return parts[0] if len(parts) == 1 else Gradient.join(parts)

    def evaluate(self, phi: Tensor) -> Outcome:
        """The query loss alone."""
        self.finish()
        losses, metric = self.query.value(phi, self.inner.steps)
        self.check_query(losses)
        return Outcome(query_loss=losses, support_loss=self.history(), metric=metric)

    def outcome(self, query: Gradient, **solve: Tensor | None) -> Outcome:
        """What the report says of these tasks, with the stationarity and the solver's outcome where there are any."""
        return Outcome(query_loss=query.losses, support_loss=self.history(), metric=query.metric, **solve)

    def history(self) -> Tensor:
        """L_support before each inner step, `(steps, tasks)`; NaN for steps that the inner loop did not need."""
        like, tasks = self.support.context.like, self.support.tasks
        missing = like.new_full((tasks,), torch.nan)
        losses = [*self.support_losses, *[missing] * (self.inner.steps - len(self.support_losses))]
        return torch.stack(losses) if losses else like.new_empty(0, tasks)

    def finish(self) -> None:
        """Note the running statistics, and raise where a support loss was NaN or infinite, or exploded."""
        self._theta, self._is_over = None, True
        if self.statistics:
            self.support.context.statistics.append(self.statistics)
        if not self.support_losses:
            return
        history = torch.stack(self.support_losses)
        exploded = history.abs() > EXPLOSION * history[0].abs().clamp(min=1)
        bad = ~torch.isfinite(history) | exploded
        if not bad.any():
            return
        step, column = (int(i) for i in bad.nonzero()[0])
        tasks = self._positions(bad.any(0))
        where, first, loss = f"task {self.positions[column]}", history[0, column].item(), history[step, column].item()
        if step == 0:
            raise NonFiniteError(
                f"The support loss of {where} is {loss} at inner step 0, before any adaptation: look for NaN or "
                "infinite values in the task's data or the model's parameters.",
                tasks,
            )
        raise DivergenceError(
            f"The inner loop of {where} diverged: its support loss went from {first:.4g} at inner step 0 to {loss:.4g} "
            f"at inner step {step}. Use a smaller inner step size{self._than_lr}"
            + (", below 2 / (largest curvature + regularization)." if self.damping is not None else "."),
            tasks,
        )

    def check_query(self, losses: Tensor) -> None:
        """Raise where a query loss is NaN or infinite."""
        bad = ~torch.isfinite(losses)
        if bad.any():
            column = int(bad.nonzero()[0])
            raise NonFiniteError(
                f"The query loss of task {self.positions[column]} is {losses[column].item()} after {self.inner.steps} "
                "inner steps: look for NaN or infinite values in its query data, or use a smaller inner step "
                f"size{self._than_lr}.",
                self._positions(bad),
            )

    def _positions(self, marked: Tensor) -> list[int]:
        return [position for position, flag in zip(self.positions, marked.tolist(), strict=True) if flag]

    @property
    def _than_lr(self) -> str:
        lr = getattr(self.inner, "lr", None)
        return f" than lr={lr:g}" if isinstance(lr, Real) else ""
