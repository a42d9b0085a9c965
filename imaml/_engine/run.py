"""One call of a strategy: chunks of tasks, the problem of each, and sums over all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from imaml._curvature.compiled import Compiled
from imaml._curvature.compiler import Session
from imaml._curvature.derivatives import Derivatives
from imaml._engine.chunking import ONE_BY_ONE, Chunking, Footprint
from imaml._engine.course import Course, Progress, Resumable
from imaml._engine.fingerprint import fingerprint
from imaml._engine.inner_state import InnerState
from imaml._engine.journal import Journal
from imaml._engine.nonfinite import check_chunk, check_some, skipping
from imaml._engine.problem import Problem
from imaml._engine.ranks import check_alike, check_group, over_ranks
from imaml._engine.report import Outcome, Pullback, Report
from imaml._engine.strategy import Strategy
from imaml._engine.totals import Totals
from imaml._errors import DivergenceError, NonFiniteError
from imaml._losses.layout import Layout
from imaml._losses.loss import Loss
from imaml._losses.record import Record
from imaml._losses.replay import Replay, Role
from imaml._losses.slice import Slice, outside_inference
from imaml._losses.snapshot import Snapshot
from imaml._losses.source import Source
from imaml._minibatches import Batch, Minibatches
from imaml._objective.meta import no_gradient
from imaml._objective.objective import Objective
from imaml._tasks import Task, TaskBatch, signature
from imaml._tasks import group as by_shape
from imaml.inner._hyper import Hyperparameters
from imaml_solvers import Solution

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Chunk = tuple[list[int], TaskBatch, Chunking]
"""Tasks of equal shapes, where they stand in the input, and how they run."""


@dataclass
class Run:
    """What an engine does with one objective."""

    engine: Strategy
    snapshot: Snapshot
    record: Record
    hyper: Hyperparameters
    derivatives: Derivatives
    layouts: list[Layout]
    """Layouts of the gradients that are wanted, for theta and for any shared parameters; empty for none."""
    start: InnerState | None = None
    """Where the inner trainings go on from; None: from theta."""
    keeps_final: bool = False
    """Whether their states are wanted."""
    finals: list[tuple[list[int], InnerState]] = field(default_factory=list)
    """These, with the positions of the tasks of each chunk so far."""
    folder: Path | None = None
    """Where the computation is kept, so that it can go on after an interruption; None: nowhere."""
    progress: Progress | None = None
    """Who is told of inner steps."""
    journal: Journal | None = None
    """What is in the folder, while the call runs."""

    @property
    def first(self) -> int:
        """The number of the first step, in the whole training."""
        return 0 if self.start is None else self.start.step

    @classmethod
    def of(
        cls,
        engine: Strategy,
        objective: Objective,
        *,
        derivatives: bool,
        start: InnerState | None = None,
        keeps_final: bool = False,
        layout_of: Callable[[Mapping[str, Tensor]], Layout] = Layout.of,
    ) -> Run:
        """Take the snapshot, and evaluate the hyper-parameters."""
        if not isinstance(start, InnerState | None):
            raise TypeError(f"`start` must be an InnerState, such as `result.state`. Got {type(start).__name__}.")
        snapshot = Snapshot.of(objective, layout_of, differentiates=derivatives).recomputing(engine.recompute)
        inner, first = engine.inner, 0 if start is None else start.step
        given = {name: (hyper, first + inner.steps) for name, hyper in inner.hyperparameters.items()}
        given |= {name: (hyper, 1) for name, hyper in engine._hyperparameters.items()}
        hyper = Hyperparameters.of(given, objective.meta, snapshot.layout, snapshot.like, names=inner.meta, first=first)
        layouts = [layout for layout in (snapshot.layout, snapshot.shared_layout) if derivatives and layout.names]
        how = cls.derivatives_of(engine, snapshot)
        return cls(engine, snapshot, Record(), hyper, how, layouts, start, keeps_final)

    @classmethod
    def derivatives_of(cls, engine: Strategy, snapshot: Snapshot) -> Derivatives:
        """How losses are differentiated: decided here alone."""
        found = engine._memory.findings(snapshot.objective)
        if engine.compile:
            return Compiled(Session.of(engine._memory.compiler, snapshot, engine.compile_budget), found)
        return Derivatives(found)

    def sums(self, groups: list[tuple[list[int], TaskBatch]]) -> tuple[list[Tensor], Report]:
        """Sums over tasks: the gradients for theta and for any shared ones, then `(3,)`: loss, skipped, kept."""
        if self.start is not None:
            tasks = sum(len(where) for where, _ in groups)
            self.start.check(self.snapshot.layout, self.engine.inner, tasks, self.snapshot.like)
        totals = self._totals(groups)
        try:
            for where, batch, chunking in islice(self._chunks(groups), totals.chunks, None):
                compute, finals = partial(self._of_tasks, (where, batch, chunking)), len(self.finals)
                skips = self.engine.on_nonfinite == "skip"
                totals.add(where, skipping(compute, where, self._mark) if skips else [(where, compute(where))])
                self._note(totals, self.finals[finals:])
        except (NonFiniteError, DivergenceError):
            self._end()  # it would come to this again
            raise
        finally:
            self.snapshot.replay.restore()
        self._end()
        positions, skipped, outcomes, sums = totals.positions, totals.skipped, totals.outcomes, totals.sums
        if self.layouts and positions and self.snapshot.objective.meta.learned():
            sums[1].add_(self._through_hyperparameters())
        report = Report.of(self.snapshot, self.record, outcomes or [self._no_task()], positions, sorted(skipped))
        self.engine._look_at(report)
        losses = report.query_loss[sorted(positions)]
        losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
        counts = losses.new_tensor([len(skipped), len(positions)])
        return [*(sums or self._zeros()), torch.cat([losses.sum(0, keepdim=True), counts])], report

    def _totals(self, groups: list[tuple[list[int], TaskBatch]]) -> Totals:
        """What all chunks have given: nothing, or what is in the folder."""
        totals = Totals()
        if self.folder is None:
            return totals
        what = fingerprint(self.engine, self.snapshot, groups, self.start) | {"return_state": self.keeps_final}
        self.journal = Journal.open(self.folder, what, self.snapshot.like.device)
        if self.journal.run is None:
            self._note(totals, None)  # which has the random state
        else:
            for name, part in self._parts(totals).items():
                part.resume(self.journal.run[name])
            for finals in self.journal.finals(totals.chunks if self.keeps_final else 0):
                self.finals += [(positions, InnerState(**state)) for positions, state in finals]
        return totals

    def _parts(self, totals: Totals) -> dict[str, Resumable]:
        return {"totals": totals, "record": self.record, "hyper": self.hyper, "replay": self.snapshot.replay}

    def _note(self, totals: Totals, finals: list[tuple[list[int], InnerState]] | None) -> None:
        """Write down that so many chunks are done, of which the last has left these states."""
        if self.journal is None:
            return
        note = {name: part.saved() for name, part in self._parts(totals).items()} | {"chunks": totals.chunks}
        keeps = self.keeps_final and finals is not None
        self.journal.note_run(note, [(positions, vars(state)) for positions, state in finals or ()] if keeps else None)

    def _end(self) -> None:
        if self.journal is not None:
            self.journal.end()

    def means(self, sums: list[Tensor], report: Report) -> tuple[Tensor, dict[str, Tensor], Report]:
        """The loss and the gradients by name, from sums over all tasks."""
        *gradients, (loss, skipped, count) = sums
        check_some(int(count), int(skipped))
        named: dict[str, Tensor] = {}
        for layout, total in zip(self.layouts, gradients, strict=True):
            named |= layout.named(total.div_(count))
        return (loss / count).to(report.query_loss.dtype), named, report

    def _of_tasks(self, chunk: Chunk, positions: list[int]) -> tuple[list[Tensor], Outcome]:
        """The summed gradients and the outcome of a chunk's tasks, or of those that are left without the skipped."""
        where, batch, chunking = chunk
        rows = [where.index(position) for position in positions]
        tasks = batch if positions == where else TaskBatch.stack([batch[row] for row in rows])
        problem = self.problem(positions, tasks, chunking)
        if not self.layouts:
            outcome = self.engine.evaluate(problem)
            self._leave(problem, None)
            return [], outcome
        pullback = self.engine.pull_back(problem)
        check_chunk(pullback, problem.direct, positions, self.hyper, self.engine.on_nonfinite)
        self.engine._keep(problem, pullback)
        self._leave(problem, pullback.solution)
        shared = [] if pullback.shared is None else [pullback.shared]
        theta = pullback.theta.sum(0)
        return [theta if problem.direct is None else theta.add_(problem.direct), *shared], self._outcome(pullback)

    def _leave(self, problem: Problem, solution: Solution | None) -> None:
        """Keep the state after the inner loop, where that is wanted, and let go of the rest."""
        problem.course.end()
        if self.keeps_final:
            self.finals.append((problem.positions, problem.left(None if solution is None else solution.x)))

    def state(self, report: Report) -> InnerState | None:
        """Where all inner trainings stand after the call, where that is wanted and there is any."""
        if not self.finals:
            return None
        return InnerState.joined(self.finals, len(report.query_loss), report.skipped)

    def _outcome(self, pullback: Pullback) -> Outcome:
        return pullback.outcome

    def _mark(self) -> Callable[[], None]:
        """What takes back all that a chunk adds to from here on, but what it cost."""
        take_back = self.record.mark(), self.hyper.mark()  # states are kept once a chunk is through

        def undo() -> None:
            for each in take_back:
                each()

        return undo

    def _no_task(self) -> Outcome:
        return Outcome.of_no_task(self.snapshot, self.engine.inner.steps, self.engine._outer_losses)

    def _zeros(self) -> list[Tensor]:
        return [layout.gather([None] * len(layout.names), self.snapshot.like) for layout in self.layouts]

    def sums_over_ranks(self, tasks: TaskBatch | Sequence[Task], group: ProcessGroup) -> tuple[list[Tensor], Report]:
        """`sums` over the tasks of all ranks, with the report of this rank's, which may have none."""
        snapshot, alike = self.snapshot, self.engine._memory.alike
        check_group(group)
        key = (snapshot.layout, snapshot.shared_layout, group.group_name)
        if key not in alike:
            check_alike(snapshot, group)
            alike.add(key)

        def nothing() -> list[Tensor]:
            return [*self._zeros(), snapshot.like.new_zeros(3)]

        def compute() -> tuple[list[Tensor], Report]:
            if isinstance(tasks, Sequence) and not tasks:
                return nothing(), Report.of(snapshot, self.record, [self._no_task()], [])
            (*sums, totals), report = self.sums(by_shape(tasks))
            return [*sums, totals.to(snapshot.like)], report

        return over_ranks(compute, nothing, group)

    def _through_hyperparameters(self) -> Tensor:
        """The part of the summed meta-gradient `(m,)` that passes through learned hyper-parameters."""
        found, layout = self.hyper.gradients(), self.snapshot.shared_layout
        for key in self.record.without_path(self.snapshot.objective.meta, found):
            raise no_gradient(key, self.engine._without_path)
        for name, gradient in found.items():
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(
                    f"The meta-gradient for the meta-parameter {name!r} is not finite: look for an infinite derivative "
                    "in the function of the hyper-parameter that it serves, such as sqrt at 0."
                )
        return layout.gather([found.get(n) for n in layout.names], self.snapshot.like)

    def _chunks(self, groups: list[tuple[list[int], TaskBatch]]) -> Iterator[Chunk]:
        for positions, batch in groups:
            chunking = self.chunking(batch)
            for start in range(0, len(batch), chunking.tasks):
                yield positions[start : start + chunking.tasks], batch[start : start + chunking.tasks], chunking

    def chunking(self, batch: TaskBatch) -> Chunking:
        """How tasks of these shapes run."""
        fetched = batch.fetched(self.first) if self.engine.chunk_size == "auto" else 0
        batch = batch.alike(self.first)
        self.check(batch)
        size = self.engine.chunk_size
        if isinstance(size, int):
            return Chunking(size, size, graphs=0)
        if size == "auto":
            key = (*self._shapes(batch), fetched)
            return self.engine._choose(self.snapshot.objective, batch, key, fetched, self.start)
        return self.footprint(batch).chunking(len(batch), self.engine._needs)

    def footprint(self, batch: TaskBatch) -> Footprint:
        """What a task of these shapes takes; looked at once per engine."""
        key, known = self._shapes(batch), self.engine._memory.footprints
        if key not in known:
            trial = self._trial(differentiates=bool(self.layouts))
            one = trial.problem([0], batch[:1], ONE_BY_ONE)
            known[key] = Footprint.of(one.support, one.query, one.theta, compiled=self.engine.compile)
            trial.snapshot.replay.undo()
        return known[key]

    def _shapes(self, batch: TaskBatch) -> tuple[Hashable, ...]:
        snapshot = self.snapshot
        return snapshot.layout, snapshot.shared_layout, snapshot.like.device, signature(batch)

    def _trial(self, *, differentiates: bool) -> Self:
        """This run for a look at a task, which counts nowhere and leaves the random state alone."""
        replay = Replay(self.snapshot.like.device)
        snapshot = replace(self.snapshot, replay=replay, differentiates=differentiates)
        return replace(self, snapshot=snapshot, record=Record(), journal=None, progress=None)

    def check(self, batch: TaskBatch, *, query: bool = True) -> None:
        """Raise unless the losses can be taken slice by slice, if they are; looked at once per objective and shapes."""
        if self.engine.microbatch_size is None:
            return
        batch = batch.alike(self.first)
        sliced, shapes = self.engine._memory.sliced(self.snapshot.objective), (signature(batch), query)
        if shapes in sliced:
            return
        trial = self._trial(differentiates=False)
        one = trial.problem([0], batch[:1], ONE_BY_ONE)
        for loss in (one.support, one.query) if query else (one.support,):
            loss.check(lambda loss: trial.derivatives.value(loss, one.theta, 0)[0])
        trial.snapshot.replay.undo()
        sliced[shapes] = None

    def problem(self, positions: list[int], batch: TaskBatch, chunking: Chunking) -> Problem:
        """The inner problem and the query loss of these tasks; raises ValueError where minibatches do not suffice."""
        tasks, size = len(batch), self.engine.microbatch_size
        snapshot = self.snapshot.recomputing(chunking.recompute)
        source = Source(batch) if isinstance(batch.support, Minibatches) else None
        if source is not None:
            source.check(self.first, self.engine.inner.steps, snapshot.objective.meta)
        examples = batch.support if source is None else source.at(source.minibatches.stand_in(self.first))

        def loss(examples: Batch, role: Role) -> Slice:
            return Slice(snapshot, self.record, outside_inference(examples), tasks, positions[0], role)

        support = Loss(loss(examples, Role.SUPPORT), size, source)
        query = Loss(loss(batch.query, Role.QUERY), size)
        course = Course.of(self.journal, self.progress, positions, self.engine.inner.steps)
        problem = Problem(
            support=support,
            query=query,
            derivatives=self.derivatives,
            hyper=self.hyper,
            inner=self.engine.inner,
            chunking=chunking if self.journal is None else replace(chunking, graphs=0),  # no file holds a graph
            damping=self._damping(),
            positions=positions,
            first=self.first,
            start=None if self.start is None else self.start.of_tasks(positions),
            keeps_final=self.keeps_final,
            course=course,
        )
        course.part("record", self.record)
        course.part("hyper", self.hyper)
        course.part("replay", snapshot.replay)
        course.part("problem", problem)
        if source is not None:
            course.part("source", source)
        return problem

    def _damping(self) -> Tensor | None:
        """Lambda: 0-dim, or `(n,)` where given by name; None for no proximal term."""
        value = self.hyper.for_all_steps("regularization")
        least = torch.as_tensor(value).min().item()
        if least < 0:
            raise ValueError(
                f"`regularization` must be >= 0. Got {least:g} from its function: return a positive value, such as exp "
                "of a meta-parameter."
            )
        if isinstance(value, Tensor):
            return value if len(value) > 1 else value.reshape(())
        return self.snapshot.like.new_tensor(value) if value else None
