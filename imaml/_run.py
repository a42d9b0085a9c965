"""One call of a strategy: chunks of tasks, the problem of each, and sums over all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from imaml._chunk import QUERY, SUPPORT, ChunkLoss, outside_inference
from imaml._context import Context
from imaml._distributed import check_alike, check_group, over_ranks
from imaml._errors import NonFiniteError
from imaml._layout import Layout
from imaml._microbatch import Microbatched
from imaml._objective import Objective
from imaml._plan import ONE_BY_ONE, Plan, plan
from imaml._problem import Problem
from imaml._report import Outcome, Report
from imaml._tasks import Task, TaskBatch, signature
from imaml._tasks import group as by_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from imaml._strategy import MetaGradient, Pullback


@dataclass
class Run:
    """What an engine does with one objective."""

    engine: MetaGradient
    context: Context
    layouts: list[Layout]
    """Of the gradients that are wanted, for theta and for any fixed parameters; empty for none."""

    @classmethod
    def of(cls, engine: MetaGradient, objective: Objective, *, derivatives: bool) -> Run:
        """Take the snapshot, and evaluate the hyper-parameters."""
        given = {name: (hyper, engine.inner.steps) for name, hyper in engine.inner.hyperparameters.items()}
        if engine.regularization is not None:
            given["regularization"] = (engine.regularization, 1)
        context = Context.of(objective, given)
        layouts = [layout for layout in (context.layout, context.fixed_layout) if derivatives and layout.names]
        return cls(engine, context, layouts)

    def sums(self, groups: list[tuple[list[int], TaskBatch]]) -> tuple[list[Tensor], Report]:
        """Sums over tasks: the gradients for theta and for any fixed parameters, then query loss and 1, `(2,)`."""
        context = self.context
        positions: list[int] = []
        outcomes: list[Outcome] = []
        sums: list[Tensor] = []
        try:
            for where, batch, plan in self._chunks(groups):
                problem = self.problem(where, batch, plan)
                if self.layouts:
                    pullback = self.engine._pull_back(problem)
                    summed = _sum_over_tasks(pullback, where)
                    sums = [a.add_(b) for a, b in zip(sums, summed, strict=True)] if sums else summed
                    outcomes.append(pullback.outcome)
                else:
                    outcomes.append(problem.evaluate(problem.adapt()))
                positions += where
        finally:
            context.replay.restore()
        if self.layouts and context.objective.meta.learned():
            sums[1].add_(self._through_hyperparameters())
        report = Report.of(context, outcomes, positions)
        self.engine._look_at(report)
        losses = report.query_loss.to(torch.promote_types(report.query_loss.dtype, torch.float32))
        return [*sums, torch.stack([losses.sum(), losses.new_tensor(len(losses))])], report

    def sums_over_ranks(self, tasks: TaskBatch | Sequence[Task], group: ProcessGroup) -> tuple[list[Tensor], Report]:
        """`sums` over the tasks of all ranks, with the report of this rank's, which may have none."""
        context, alike = self.context, self.engine._alike
        check_group(group)
        key = (context.layout, context.fixed_layout, group.group_name)
        if key not in alike:
            check_alike(context, group)
            alike.add(key)

        def zeros() -> list[Tensor]:
            return [layout.gather([None] * len(layout.names), context.theta) for layout in self.layouts]

        def compute() -> tuple[list[Tensor], Report]:
            if isinstance(tasks, Sequence) and not tasks:
                nothing = Outcome.of_no_task(context, self.engine.inner.steps)
                return [*zeros(), context.theta.new_zeros(2)], Report.of(context, [nothing], [])
            (*sums, totals), report = self.sums(by_shape(tasks))
            return [*sums, totals.to(context.theta)], report

        return over_ranks(compute, lambda: [*zeros(), context.theta.new_zeros(2)], group)

    def _through_hyperparameters(self) -> Tensor:
        """The part of the summed meta-gradient `(m,)` that passes through learned hyper-parameters."""
        context = self.context
        found, learned = context.hyper.gradients(), context.objective.meta.learned()
        for key, group in context.objective.meta.groups().items():
            names = learned.keys() & group.keys()
            if names and not names & (found.keys() | context.used_fixed):
                raise ValueError(
                    f"The meta-gradient for the meta-parameter {key!r} is zero: {self.engine._without_path}. Leave it "
                    "out of `meta`, detach it, or use it where it counts."
                )
        for name, gradient in found.items():
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(
                    f"The meta-gradient for the meta-parameter {name!r} is not finite: look for an infinite derivative "
                    "in the function of the hyper-parameter that it serves, such as sqrt at 0."
                )
        return context.fixed_layout.gather([found.get(n) for n in context.fixed_layout.names], context.theta)

    def _chunks(self, groups: list[tuple[list[int], TaskBatch]]) -> Iterator[tuple[list[int], TaskBatch, Plan]]:
        for positions, batch in groups:
            plan = self._plan(batch)
            for start in range(0, len(batch), plan.tasks):
                yield positions[start : start + plan.tasks], batch[start : start + plan.tasks], plan

    def _plan(self, batch: TaskBatch) -> Plan:
        """How tasks of these shapes run; looked at once per engine."""
        size, plans = self.engine.chunk_size, self.engine._plans
        given = None if size is None else Plan(size, size, keeps_graphs=False)
        if given is not None and self.engine.microbatch_size is None:
            return given
        context = self.context
        key = (context.layout, context.fixed_layout, context.theta.device, signature(batch[0]))
        if key not in plans:
            trial = Run.of(self.engine, context.objective, derivatives=bool(self.layouts))
            one = trial.problem([0], batch[:1], ONE_BY_ONE)
            one.support.check(one.theta)
            one.query.check(one.theta)
            plans[key] = given or plan(one.support, one.query, one.theta, self.engine.inner.steps)
            trial.context.replay.undo()
        return plans[key]

    def problem(self, positions: list[int], batch: TaskBatch, plan: Plan) -> Problem:
        """The inner problem and the query loss of these tasks."""
        context, size = self.context, self.engine.microbatch_size
        support = ChunkLoss(context, outside_inference(batch.support), len(batch), positions[0], SUPPORT)
        query = ChunkLoss(context, outside_inference(batch.query), len(batch), positions[0], QUERY)
        return Problem(
            support=support if size is None else Microbatched(support, size),
            query=query if size is None else Microbatched(query, size),
            inner=self.engine.inner,
            plan=plan,
            theta=context.theta.expand(len(batch), -1),
            damping=self._damping(),
            positions=positions,
        )

    def _damping(self) -> Tensor | None:
        """Lambda: 0-dim, or `(n,)` where given by name; None for no proximal term."""
        value = self.context.hyper.at(0).get("regularization", 0.0)
        least = torch.as_tensor(value).min().item()
        if least < 0:
            raise ValueError(
                f"`regularization` must be >= 0. Got {least:g} from its function: return a positive value, such as exp "
                "of a meta-parameter."
            )
        if isinstance(value, Tensor):
            return value if len(value) > 1 else value.reshape(())
        return self.context.theta.new_tensor(value) if value else None


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
