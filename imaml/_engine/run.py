"""One call of a strategy: chunks of tasks, the problem of each, and sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import ismethod
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor

from imaml._curvature.compiled import CompiledLoss
from imaml._curvature.compiler import Session
from imaml._engine.chunking import ONE_BY_ONE, Plan, plan
from imaml._engine.nonfinite import check_chunk, skipping
from imaml._engine.problem import Problem
from imaml._engine.ranks import check_alike, check_group, over_ranks
from imaml._engine.report import Outcome, Pullback, Report
from imaml._engine.strategy import Strategy
from imaml._errors import NonFiniteError
from imaml._losses.chunk import QUERY, SUPPORT, ChunkLoss, outside_inference
from imaml._losses.context import Context
from imaml._losses.layout import Layout
from imaml._losses.microbatch import Microbatched
from imaml._objective.meta import no_gradient
from imaml._objective.objective import Objective
from imaml._tasks import Batch, Task, TaskBatch, signature
from imaml._tasks import group as by_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class Run:
    """What an engine does with one objective."""

    engine: Strategy
    context: Context
    layouts: list[Layout]
    """Of the gradients that are wanted, for theta and for any fixed parameters; empty for none."""
    session: Session | None
    """Of the engine's compiler; None for derivatives as they are."""

    @classmethod
    def of(
        cls,
        engine: Strategy,
        objective: Objective,
        *,
        derivatives: bool,
        layout_of: Callable[[Mapping[str, Tensor]], Layout] = Layout.of,
    ) -> Run:
        """Take the snapshot, and evaluate the hyper-parameters."""
        given = {name: (hyper, engine.inner.steps) for name, hyper in engine.inner.hyperparameters.items()}
        if engine.regularization is not None:
            given["regularization"] = (engine.regularization, 1)
        context = Context.of(objective, given, layout_of, differentiates=derivatives)
        layouts = [layout for layout in (context.layout, context.fixed_layout) if derivatives and layout.names]
        session = Session.of(engine._compiler, context, engine.compile_budget) if engine.compile else None
        return cls(engine, context, layouts, session)

    def sums(self, groups: list[tuple[list[int], TaskBatch]]) -> tuple[list[Tensor], Report]:
        """Sums over tasks: the gradients for theta and for any fixed parameters, then `(3,)`: loss, skipped, kept."""
        context = self.context
        positions: list[int] = []
        skipped: list[int] = []
        outcomes: list[Outcome] = []
        sums: list[Tensor] = []
        try:
            for where, batch, plan in self._chunks(groups):
                parts = self._of_chunk(where, batch, plan)
                for kept, (summed, outcome) in parts:
                    sums = [a.add_(b) for a, b in zip(sums, summed, strict=True)] if sums else summed
                    outcomes.append(outcome)
                    positions += kept
                skipped += set(where).difference(*(kept for kept, _ in parts))
        finally:
            context.replay.restore()
        if self.layouts and positions and context.objective.meta.learned():
            sums[1].add_(self._through_hyperparameters())
        report = Report.of(context, outcomes or [self._no_task()], positions, sorted(skipped))
        self.engine._look_at(report)
        losses = report.query_loss[sorted(positions)]
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        counts = losses.new_tensor([len(skipped), len(positions)])
        return [*(sums or self._zeros()), torch.cat([losses.sum(0, keepdim=True), counts])], report

    def _of_chunk(
        self, where: list[int], batch: TaskBatch, plan: Plan
    ) -> list[tuple[list[int], tuple[list[Tensor], Outcome]]]:
        """The summed gradients and the outcome of a chunk's tasks, or of those that are left without the skipped."""

        def compute(positions: list[int]) -> tuple[list[Tensor], Outcome]:
            rows = [where.index(position) for position in positions]
            tasks = batch if positions == where else TaskBatch.stack([batch[row] for row in rows])
            problem = self.problem(positions, tasks, plan)
            if not self.layouts:
                return [], problem.evaluate(problem.adapt())
            pullback = self._pull_back(problem)
            check_chunk(pullback, positions, self.context, self.engine.on_nonfinite)
            self.engine._keep(problem, pullback)
            fixed = [] if pullback.fixed is None else [pullback.fixed]
            return [pullback.theta.sum(0), *fixed], pullback.outcome

        if self.engine.on_nonfinite == "raise":
            return [(where, compute(where))]
        return skipping(compute, where, self.context.mark)

    def _pull_back(self, problem: Problem) -> Pullback:
        return self.engine.pull_back(problem)

    def _no_task(self) -> Outcome:
        return Outcome.of_no_task(self.context, self.engine.inner.steps)

    def _zeros(self) -> list[Tensor]:
        context = self.context
        return [layout.gather([None] * len(layout.names), context.like) for layout in self.layouts]

    def sums_over_ranks(self, tasks: TaskBatch | Sequence[Task], group: ProcessGroup) -> tuple[list[Tensor], Report]:
        """`sums` over the tasks of all ranks, with the report of this rank's, which may have none."""
        context, alike = self.context, self.engine._alike
        check_group(group)
        key = (context.layout, context.fixed_layout, group.group_name)
        if key not in alike:
            check_alike(context, group)
            alike.add(key)

        def nothing() -> list[Tensor]:
            return [*self._zeros(), context.like.new_zeros(3)]

        def compute() -> tuple[list[Tensor], Report]:
            if isinstance(tasks, Sequence) and not tasks:
                return nothing(), Report.of(context, [self._no_task()], [])
            (*sums, totals), report = self.sums(by_shape(tasks))
            return [*sums, totals.to(context.like)], report

        return over_ranks(compute, nothing, group)

    def _through_hyperparameters(self) -> Tensor:
        """The part of the summed meta-gradient `(m,)` that passes through learned hyper-parameters."""
        context = self.context
        found = context.hyper.gradients()
        for key in context.without_path(found):
            raise no_gradient(key, self.engine._without_path)
        for name, gradient in found.items():
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(
                    f"The meta-gradient for the meta-parameter {name!r} is not finite: look for an infinite derivative "
                    "in the function of the hyper-parameter that it serves, such as sqrt at 0."
                )
        return context.fixed_layout.gather([found.get(n) for n in context.fixed_layout.names], context.like)

    def _chunks(self, groups: list[tuple[list[int], TaskBatch]]) -> Iterator[tuple[list[int], TaskBatch, Plan]]:
        for positions, batch in groups:
            plan = self._plan(batch)
            for start in range(0, len(batch), plan.tasks):
                yield positions[start : start + plan.tasks], batch[start : start + plan.tasks], plan

    def _plan(self, batch: TaskBatch) -> Plan:
        """How tasks of these shapes run; looked at once per engine."""
        self.check(batch)
        size, plans, context = self.engine.chunk_size, self.engine._plans, self.context
        if isinstance(size, int):
            return Plan(size, size, keeps_graphs=False)
        key = (context.layout, context.fixed_layout, context.like.device, signature(batch))
        if size == "auto":
            return self.engine._choose(context.objective, batch, key)
        if key not in plans:
            trial = Run.of(self.engine, context.objective, derivatives=bool(self.layouts))
            one = trial.problem([0], batch[:1], ONE_BY_ONE)
            plans[key] = plan(one.support, one.query, one.theta, self.engine.inner.steps, self.engine._states)
            trial.context.replay.undo()
        return plans[key]

    def check(self, batch: TaskBatch, *, query: bool = True) -> None:
        """Raise unless the losses can be taken slice by slice, if they are; looked at once per objective and shapes."""
        if self.engine.microbatch_size is None:
            return
        objective, checked = self.context.objective, self.engine._checked
        parts, modes = _parts(objective)
        key = (*map(id, parts), modes, signature(batch), query)
        if key in checked and all(alive() is part for alive, part in zip(checked[key], parts, strict=True)):
            return
        trial = Run.of(self.engine, objective, derivatives=False)
        one = trial.problem([0], batch[:1], ONE_BY_ONE)
        for loss in (one.support, one.query) if query else (one.support,):
            loss.check(one.theta)
        trial.context.replay.undo()
        checked[key] = [_weak(part) for part in parts]

    def problem(self, positions: list[int], batch: TaskBatch, plan: Plan) -> Problem:
        """The inner problem and the query loss of these tasks."""
        size = self.engine.microbatch_size
        tasks, first = len(batch), positions[0]
        support, query = (
            self._loss(outside_inference(examples), tasks, first, kind)
            for examples, kind in ((batch.support, SUPPORT), (batch.query, QUERY))
        )
        return Problem(
            support=support if size is None else Microbatched(support, size),
            query=query if size is None else Microbatched(query, size),
            inner=self.engine.inner,
            plan=plan,
            damping=self._damping(),
            positions=positions,
        )

    def _loss(self, batch: Batch, tasks: int, start: int, kind: int) -> ChunkLoss:
        if self.session is None:
            return ChunkLoss(self.context, batch, tasks, start, kind)
        return CompiledLoss(self.context, batch, tasks, start, kind, session=self.session)

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
        return self.context.like.new_tensor(value) if value else None


def _parts(objective: Objective) -> tuple[list[object], Hashable]:
    """The model and the losses, which another objective of the same has too, and the modes that the model is in."""
    model = objective.model
    parts: list[object] = [] if model is None else [model]
    for loss in (objective.loss, objective.outer_loss):
        parts += [loss.__self__, loss.__func__] if ismethod(loss) else [loss]
    modes = () if model is None else tuple(module.training for module in model.modules())
    return parts, (getattr(objective._program, "buffers", None), modes)


def _weak(part: object) -> Callable[[], object]:
    try:
        return ref(part)
    except TypeError:  # None, or an object of a class that has no room for it
        return lambda: part
