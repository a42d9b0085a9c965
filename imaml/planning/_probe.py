"""The stages of an engine's chunks, measured for one, two and three tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imaml._engine.chunking import ONE_BY_ONE, Chunking, saved_bytes
from imaml._engine.inner_state import InnerState
from imaml._losses.replay import Role
from imaml._objective.objective import Objective
from imaml._sharding.runs import run_of
from imaml._tasks import TaskBatch
from imaml.planning._account import Account, Use
from imaml.planning._costs import ChunkUse, Costs, Facts, Stages

MOST_TASKS = 3
_SNAPSHOT = "snapshot"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the stages take, by the number of tasks."""

    base: Use
    """What a call holds from the start: copies of the buffers, learned hyper-parameters."""
    uses: dict[int, dict[str, Use]]
    saved: dict[Role, int]
    """Bytes that autograd saves for one task's gradient, of the support and of the query loss."""
    facts: Facts
    gradients: int
    hvps: int
    """What it took to find out."""

    def chunk(self, tasks: int) -> ChunkUse:
        """One of any size, on the line through the largest two that were measured."""
        if tasks in self.uses:
            return ChunkUse(tasks=tasks, uses=self.uses[tasks], facts=self.facts)
        sizes = sorted(self.uses)[-2:]
        near, uses = sizes[-1], self.uses[sizes[-1]]
        if len(sizes) == 1:
            extrapolated = {name: use.scaled(tasks / near) for name, use in uses.items()}
        else:
            share = (tasks - near) / (near - sizes[0])
            before = self.uses[sizes[0]]
            extrapolated = {n: u.plus(u.plus(before[n].scaled(-1)).scaled(share)) for n, u in uses.items()}
        return ChunkUse(tasks=tasks, uses=extrapolated, facts=self.facts)


def probe(
    costs: Sequence[Costs],
    objective: Objective,
    batch: TaskBatch,
    sizes: Sequence[int],
    room: float | None,
    fetched: int = 0,
    start: InnerState | None = None,
) -> Probe:
    """Measure the stages of some engines that differ in their settings.

    A rehearsal of the whole call would cost as much as the call, and shapes alone do not show the work space of
    kernels.

    Args:
        costs: What each engine says of its costs.
        objective: Model and loss.
        batch: Tasks of equal shapes.
        sizes: Sizes of the chunks to measure, ascending.
        room: Bytes that the next larger chunk should not exceed, by the last; None: no limit.
        fetched: Bytes of the batch that an inner step fetches for all tasks.
        start: Where the inner trainings go on from; None: from theta.

    Returns:
        The stages of chunks of at least the first size. Random states are left as they were.
    """
    facts: Facts
    engine, uses = costs[0].engine, dict[int, dict[str, Use]]()
    base, gradients, hvps, per_task = Use(0, 0), 0, 0, 0.0
    run = run_of(engine, objective, derivatives=True, start=start)
    solve = costs[0].solve(run.snapshot.theta)
    one = run.problem([0], batch[:1], ONE_BY_ONE)
    theta = one.theta
    parts = (loss.slices[0][1] for loss in (one.support, one.query))
    saved = {part.role: saved_bytes(part, theta) for part in parts}
    run.snapshot.replay.undo()
    for tasks in sizes:
        if room is not None and tasks * per_task > room:
            break
        account = Account(run.snapshot.like.device)
        with account.recording():
            with account.stage(_SNAPSHOT):
                run = run_of(engine, objective, derivatives=True, start=start)
            problem = run.problem(list(range(tasks)), batch[:tasks], Chunking(tasks, tasks, graphs=0))
            stages = Stages.of(account, problem)
            try:
                for each in costs:
                    facts = replace(each.measure(problem, stages), solve=solve, fetched=fetched)
            finally:
                run.snapshot.replay.undo()
        gradients, hvps = gradients + run.record.gradients, hvps + run.record.products
        uses[tasks] = dict(account.uses)
        base = uses[tasks].pop(_SNAPSHOT)
        per_task = max(use.peak for use in uses[tasks].values()) / tasks
    return Probe(base=base, uses=uses, saved=saved, facts=facts, gradients=gradients, hvps=hvps)
