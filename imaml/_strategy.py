"""The interface of all strategies: one call from tasks to a loss that carries the meta-gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from imaml._chunk import QUERY, SUPPORT, ChunkLoss, outside_inference
from imaml._context import Context
from imaml._distributed import check_alike, check_group, over_ranks
from imaml._errors import NonFiniteError
from imaml._hyper import Hyper, check_hyper
from imaml._layout import Layout
from imaml._microbatch import Microbatched
from imaml._node import attach
from imaml._numbers import check_integer
from imaml._objective import Objective
from imaml._plan import ONE_BY_ONE, Plan, plan
from imaml._problem import Problem
from imaml._report import MetaResult, Outcome, Report
from imaml._tasks import Batch, Task, TaskBatch, check_tensors, signature
from imaml._tasks import group as by_shape
from imaml.inner import InnerSolver

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Pullback:
    """What a strategy makes of one chunk."""

    theta: Tensor
    """The meta-gradient of each task, `(tasks, n)`."""
    fixed: Tensor | None
    """That for the fixed and the meta-parameters, summed over tasks, `(m,)`; None if there are none."""
    outcome: Outcome


@dataclass(frozen=True, kw_only=True)
class MetaGradient(ABC):
    """A strategy for the meta-gradient, the gradient of the mean query loss after adaptation.

    The inner loop of task i adapts phi from theta on L_support,i(phi) + 1/2 (phi - theta)' Lambda (phi - theta); the
    result is the mean over tasks of L_query,i(phi_i), and its gradient for theta and for every other parameter that
    requires grad.

    `engine(objective, tasks)` returns a `MetaResult`; `result.loss.backward()` accumulates the meta-gradient into
    `.grad` of the parameters like that of any loss. The meta-gradient is computed in the call, its memory is given back
    at once, and backward only scales it (it cannot be differentiated again). Under `torch.no_grad()` a call only
    evaluates. The model, its buffers and `.grad`s and the tasks are never changed; the global random state ends as if
    one forward pass had run, and every evaluation at one inner step of a task sees the same draws (dropout masks).

    Args:
        inner: The inner loop.
        regularization: lambda >= 0, the weight of the proximal term: one number, or one per adapted parameter by name,
            or a function of the objective's meta-parameters that returns either. None: no proximal term.
        chunk_size: How many tasks run at once, vectorised; memory grows with it. None: as many as save at most 32 MiB
            for a gradient on a CPU (256 MiB elsewhere), the support and the query sets each by themselves, found by a
            forward pass of one task when an engine first sees its shapes. 1 runs task by task without
            `torch.func.vmap`. A model that cannot be vectorised (LSTM, control flow that depends on the data) runs task
            by task in any case, though the graphs of a chunk are held together. The numbers are the same (without
            dropout).
        microbatch_size: How many examples of a support or query set are seen at once; gradients and products accumulate
            over slices, so that the memory is that of one slice, for the same numbers where the loss is a mean over
            independent examples (the first two slices are compared the first time; not with dropout). None: all.
    """

    _without_path: ClassVar[str] = "no derivative leads to it from a loss or from an inner step that is differentiated"

    inner: InnerSolver
    regularization: Hyper | None = 0.0
    chunk_size: int | None = None
    microbatch_size: int | None = None
    _plans: dict[Any, Plan] = field(default_factory=dict, init=False, repr=False, compare=False)
    _alike: set[Any] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check the configuration; raises TypeError or ValueError."""
        if not isinstance(self.inner, InnerSolver):
            raise TypeError(
                f"`inner` must be an inner optimiser such as GradientDescent. Got {self.inner!r}."
                + (_WRAP if _of_torch(self.inner) else "")
            )
        if isinstance(self.regularization, (list, tuple)):
            raise TypeError(
                "`regularization` is one for all steps. Expected a number, or one per parameter by name. Got "
                f"{self.regularization!r}."
            )
        if self.regularization is not None:
            check_hyper("regularization", self.regularization, must=">= 0")
        if self.chunk_size is not None:
            check_integer("`chunk_size`, unless None,", self.chunk_size, least=1)
        if self.microbatch_size is not None:
            check_integer("`microbatch_size`, unless None,", self.microbatch_size, least=1)

    def __call__(
        self, objective: Objective, tasks: TaskBatch | Sequence[Task], *, group: ProcessGroup | None = None
    ) -> MetaResult:
        """Adapt to every task, and return the mean query loss with the meta-gradient behind it.

        Args:
            objective: Model and loss.
            tasks: A `TaskBatch`, or a list of `Task` whose shapes may differ.
            group: The processes that share the work; None: this one alone. Every rank passes its own tasks, such as
                `tasks[rank::world_size]`, an empty list where it has none, and takes part in every call; one
                all-reduce, of the size of the parameters, gives every rank the mean over the tasks of all. (The same
                tasks on every rank give the right result too, and save nothing.) The parameters must be the same on
                all ranks: the first call of an engine checks. Random draws are each rank's own.

        Returns:
            The loss, over the tasks of all ranks, and a report, of this rank's.

        Raises:
            NonFiniteError: A loss or the meta-gradient is NaN or infinite; or another rank raised whatever error.
            DivergenceError: The inner loop diverged.
            TypeError: An argument of a wrong type.
            ValueError: The loss is not a scalar or depends on no parameter, BatchNorm with running statistics in
                training mode, a hyper-parameter that does not fit the parameters or steps, a meta-parameter whose
                meta-gradient is zero because nothing uses it, no task on any rank, or parameters that differ by rank.
        """
        parameters = objective.parameters() if isinstance(objective, Objective) else {}
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in parameters.values())
        loss, gradients, report = self._run(objective, tasks, group, derivatives=wanted)
        if wanted:
            loss = attach(loss, list(gradients.values()), list(parameters.values()))
        return MetaResult(loss, report)

    def value_and_grad(
        self, objective: Objective, tasks: TaskBatch | Sequence[Task], *, group: ProcessGroup | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean query loss and the meta-gradient by parameter name, as detached tensors; `.grad` is not touched.

        Args:
            objective: Model and loss.
            tasks: As in a call.
            group: As in a call.

        Returns:
            The 0-dim loss, and one gradient per parameter of `objective.parameters()`, in its shape and dtype.
        """
        loss, gradients, _ = self._run(objective, tasks, group, derivatives=True)
        return loss, gradients

    def adapt(self, objective: Objective, support: Batch) -> dict[str, Tensor]:
        """The adapted parameters of one task by name, for deployment with `torch.func.functional_call`.

        Args:
            objective: Model and loss.
            support: One task's support set, without a task dimension.

        Returns:
            The adapted parameters, detached, in shape and dtype of the originals, and with `buffers="update"` the
            task's running statistics; the model is not changed.
        """
        check_tensors("support", support)
        batch = tree_map(lambda t: t.unsqueeze(0), support)
        with torch.inference_mode(False), torch.no_grad():
            context = self._context(objective)
            try:
                problem = self._problem(context, [0], TaskBatch(support=batch, query=batch), ONE_BY_ONE)
                phi = problem.adapt()
                problem.finish()
            finally:
                context.replay.restore()
            adapted = {name: value.squeeze(0).clone() for name, value in context.layout.named(phi).items()}
            return adapted | context.mean_statistics()

    @abstractmethod
    def _pull_back(self, problem: Problem) -> Pullback:
        """Adapt, judge, and pull the query gradient back to theta, for one chunk of tasks."""

    def _look_at(self, report: Report) -> None:  # noqa: B027
        """Raise or warn about an outcome, before it is returned; a strategy that has nothing to object does neither."""

    def _run(
        self,
        objective: Objective,
        tasks: TaskBatch | Sequence[Task],
        group: ProcessGroup | None,
        *,
        derivatives: bool,
    ) -> tuple[Tensor, dict[str, Tensor], Report]:
        with torch.inference_mode(False), torch.no_grad():
            context = self._context(objective)
            layouts = [layout for layout in (context.layout, context.fixed_layout) if derivatives and layout.names]
            if group is None:
                sums, report = self._sums(context, by_shape(tasks), derivatives=derivatives)
            else:
                sums, report = self._sums_over_ranks(context, layouts, tasks, group)
            *gradients, (loss, count) = sums
            named: dict[str, Tensor] = {}
            for layout, total in zip(layouts, gradients, strict=True):
                named |= layout.named(total.div_(count))
            return (loss / count).to(report.query_loss.dtype), named, report

    def _sums(
        self, context: Context, groups: list[tuple[list[int], TaskBatch]], *, derivatives: bool
    ) -> tuple[list[Tensor], Report]:
        """Sums over tasks: the gradients for theta and for any fixed parameters, then query loss and 1, `(2,)`."""
        positions: list[int] = []
        outcomes: list[Outcome] = []
        sums: list[Tensor] = []
        try:
            for where, batch, plan in self._chunks(context, groups):
                problem = self._problem(context, where, batch, plan)
                if derivatives:
                    pullback = self._pull_back(problem)
                    summed = _sum_over_tasks(pullback, where)
                    sums = [a.add_(b) for a, b in zip(sums, summed, strict=True)] if sums else summed
                    outcomes.append(pullback.outcome)
                else:
                    outcomes.append(problem.evaluate(problem.adapt()))
                positions += where
        finally:
            context.replay.restore()
        if derivatives and context.objective.meta.learned():
            sums[1].add_(self._through_hyperparameters(context))
        report = Report.of(context, outcomes, positions)
        self._look_at(report)
        losses = report.query_loss.to(torch.promote_types(report.query_loss.dtype, torch.float32))
        return [*sums, torch.stack([losses.sum(), losses.new_tensor(len(losses))])], report

    def _sums_over_ranks(
        self, context: Context, layouts: list[Layout], tasks: TaskBatch | Sequence[Task], group: ProcessGroup
    ) -> tuple[list[Tensor], Report]:
        """`_sums` over the tasks of all ranks, with the report of this rank's, which may have none."""
        check_group(group)
        key = (context.layout, context.fixed_layout, group.group_name)
        if key not in self._alike:
            check_alike(context, group)
            self._alike.add(key)

        def zeros() -> list[Tensor]:
            return [layout.gather([None] * len(layout.names), context.theta) for layout in layouts]

        def compute() -> tuple[list[Tensor], Report]:
            if isinstance(tasks, Sequence) and not tasks:
                nothing = Outcome.of_no_task(context, self.inner.steps)
                return [*zeros(), context.theta.new_zeros(2)], Report.of(context, [nothing], [])
            (*sums, totals), report = self._sums(context, by_shape(tasks), derivatives=bool(layouts))
            return [*sums, totals.to(context.theta)], report

        return over_ranks(compute, lambda: [*zeros(), context.theta.new_zeros(2)], group)

    def _context(self, objective: Objective) -> Context:
        given = {name: (hyper, self.inner.steps) for name, hyper in self.inner.hyperparameters.items()}
        if self.regularization is not None:
            given["regularization"] = (self.regularization, 1)
        return Context.of(objective, given)

    def _through_hyperparameters(self, context: Context) -> Tensor:
        """The part of the summed meta-gradient `(m,)` that passes through learned hyper-parameters."""
        found, learned = context.hyper.gradients(), context.objective.meta.learned()
        for key, group in context.objective.meta.groups().items():
            names = learned.keys() & group.keys()
            if names and not names & (found.keys() | context.used_fixed):
                raise ValueError(
                    f"The meta-gradient for the meta-parameter {key!r} is zero: {self._without_path}. Leave it out of "
                    "`meta`, detach it, or use it where it counts."
                )
        for name, gradient in found.items():
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(
                    f"The meta-gradient for the meta-parameter {name!r} is not finite: look for an infinite derivative "
                    "in the function of the hyper-parameter that it serves, such as sqrt at 0."
                )
        return context.fixed_layout.gather([found.get(n) for n in context.fixed_layout.names], context.theta)

    def _chunks(
        self, context: Context, groups: list[tuple[list[int], TaskBatch]]
    ) -> Iterator[tuple[list[int], TaskBatch, Plan]]:
        for positions, batch in groups:
            plan = self._plan(context, batch)
            for start in range(0, len(batch), plan.tasks):
                yield positions[start : start + plan.tasks], batch[start : start + plan.tasks], plan

    def _plan(self, context: Context, batch: TaskBatch) -> Plan:
        """How tasks of these shapes run; looked at once per engine."""
        if self.chunk_size is not None and self.microbatch_size is None:
            return Plan(self.chunk_size, self.chunk_size, keeps_graphs=False)
        key = (context.layout, context.fixed_layout, context.theta.device, signature(batch[0]))
        if key not in self._plans:
            trial = self._context(context.objective)
            one = self._problem(trial, [0], batch[:1], ONE_BY_ONE)
            one.support.check(one.theta)
            one.query.check(one.theta)
            found = plan(one.support, one.query, one.theta, self.inner.steps)
            size = self.chunk_size
            self._plans[key] = found if size is None else Plan(size, size, keeps_graphs=False)
            trial.replay.undo()
        return self._plans[key]

    def _problem(self, context: Context, positions: list[int], batch: TaskBatch, plan: Plan) -> Problem:
        support = ChunkLoss(context, outside_inference(batch.support), len(batch), positions[0], SUPPORT)
        query = ChunkLoss(context, outside_inference(batch.query), len(batch), positions[0], QUERY)
        size = self.microbatch_size
        return Problem(
            support=support if size is None else Microbatched(support, size),
            query=query if size is None else Microbatched(query, size),
            inner=self.inner,
            plan=plan,
            theta=context.theta.expand(len(batch), -1),
            damping=self._damping(context),
            positions=positions,
        )

    def _damping(self, context: Context) -> Tensor | None:
        """Lambda: 0-dim, or `(n,)` where given by name; None for no proximal term."""
        value = context.hyper.at(0).get("regularization", 0.0)
        least = torch.as_tensor(value).min().item()
        if least < 0:
            raise ValueError(
                f"`regularization` must be >= 0. Got {least:g} from its function: return a positive value, such as exp "
                "of a meta-parameter."
            )
        if isinstance(value, Tensor):
            return value if len(value) > 1 else value.reshape(())
        return context.theta.new_tensor(value) if value else None


_WRAP = (
    " MAML differentiates imaml's GradientDescent, Adam, AdamW and RMSprop; ImplicitMAML and FOMAML also take an "
    "optimiser of torch.optim as TorchOptimizer(torch.optim.LBFGS, steps=...)."
)


def _of_torch(given: object) -> bool:
    return isinstance(given, torch.optim.Optimizer) or (
        isinstance(given, type) and issubclass(given, torch.optim.Optimizer)
    )


def _sum_over_tasks(pullback: Pullback, positions: list[int]) -> list[Tensor]:
    """The summed gradients for theta and for any fixed parameters; raises NonFiniteError, naming the tasks."""
    bad = ~pullback.theta.isfinite().all(-1)
    if bad.any():
        raise NonFiniteError(
            f"The meta-gradient of task {positions[int(bad.nonzero()[0])]} is not finite although its losses are: look "
            "for an operation with an infinite second derivative, such as sqrt or norm at 0."
        )
    if pullback.fixed is None:
        return [pullback.theta.sum(0)]
    if not bool(pullback.fixed.isfinite().all()):
        raise NonFiniteError(
            f"The meta-gradient of tasks {positions[0]} to {positions[-1]} for a parameter that does not adapt is not "
            "finite although their losses are: look for an operation with an infinite derivative, such as sqrt at 0."
        )
    return [pullback.theta.sum(0), pullback.fixed]
