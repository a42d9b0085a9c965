"""From the stages of few tasks to the settings of many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from imaml._engine.chunking import CALL, VECTORISED, Chunking, Footprint
from imaml._engine.strategy import Strategy
from imaml._losses.replay import Role
from imaml.planning._account import Use
from imaml.planning._costs import ChunkUse, Costs
from imaml.planning._forecast import Prediction
from imaml.planning._probe import Probe

_CROWDED = 1.25
"""What the arithmetic of a vectorised chunk costs on a CPU where its graphs exceed the caches: see `chunking`."""


@dataclass(frozen=True, kw_only=True)
class ProbedTasks:
    """Tasks of equal shapes, and what is known of their stages."""

    tasks: int
    probe: Probe
    footprint: Footprint

    def usual(self, engine: Strategy) -> Chunking:
        """What runs at once where `chunk_size` is None."""
        return self.footprint.chunking(self.tasks, engine._needs)

    def chunks(self, size: int) -> list[int]:
        """The tasks of each."""
        return [min(size, self.tasks - first) for first in range(0, self.tasks, size)]


def predict(
    engine: Strategy, batches: Sequence[ProbedTasks], chunkings: Sequence[Chunking], *, stacked: int = 0
) -> Prediction:
    """What a call takes.

    Args:
        engine: Its settings other than `chunk_size` count.
        batches: All tasks.
        chunkings: How those of each batch run.
        stacked: Bytes of the tasks, where a call has to stack them.

    Returns:
        The prediction.
    """
    peaks: list[float] = []
    gradients, hvps, equivalents, rank = 0, 0, 0.0, 0.0
    for batch, chunking in zip(batches, chunkings, strict=True):
        costs, facts = costs_of(engine, chunking.graphs), batch.probe.facts
        work = costs.work(facts)
        for tasks in batch.chunks(chunking.tasks):
            chunk = _chunk(batch.probe, tasks, chunking.query_tasks)
            sums = (facts.adapted + facts.shared) * facts.dtype.itemsize  # over the tasks so far
            # Of minibatches that of the first step, which stands for the shapes of all, and that of the step at hand.
            always = batch.probe.base.held + 2 * facts.fetched
            peaks.append(always + costs.peak(chunk) + (sums if peaks else costs.once(chunk)))
        gradients += batch.tasks * work.gradients
        hvps += batch.tasks * work.hvps
        equivalents += batch.tasks * work.equivalents
        judging = facts.gradient * work.judged
        rank += (work.equivalents - judging) * _time(batch, chunking.tasks, Role.SUPPORT)
        rank += judging * _time(batch, min(chunking.tasks, chunking.query_tasks), Role.QUERY)
        rank += batch.tasks * work.transfer
    return Prediction(
        peak_bytes=round(stacked + max(peaks)),
        gradients=gradients,
        hvps=hvps,
        gradient_equivalents=equivalents,
        rank=rank,  # of counts and a rule, not of time: equal shapes give equal advice
    )


def costs_of(engine: Strategy, graphs: int = 0) -> Costs:
    """What an engine says of its costs; raises ValueError for a strategy that does not."""
    if engine._costs is None:
        raise ValueError(
            f"{type(engine).__name__} does not say what it costs, so its memory cannot be predicted. Expected MAML, "
            "FOMAML or ImplicitMAML: give `chunk_size` as a number, and measure with imaml.measure.peak_memory."
        )
    costs: Costs = engine._costs(engine, graphs)
    return costs


def _chunk(probe: Probe, tasks: int, query_tasks: int) -> ChunkUse:
    chunk = probe.chunk(tasks)
    if query_tasks >= tasks:
        return chunk
    held, part = chunk["query"].held, probe.chunk(query_tasks)["query"]
    joined = Use(max(held + part.peak - part.held, 2 * held), held)
    return replace(chunk, uses={**chunk.uses, "query": joined})


def _time(batch: ProbedTasks, size: int, role: Role) -> float:
    """The time of evaluating all tasks once in chunks of a size, in bytes of graphs: issuing it, and its arithmetic."""
    facts, own = batch.probe.facts, batch.probe.saved[role]
    room = VECTORISED.get(facts.device.type)
    if size == 1 or not facts.is_vectorised:
        return (own + CALL) * batch.tasks
    crowded = room is not None and size * own > room
    return own * batch.tasks * (_CROWDED if crowded else 1) + CALL * len(batch.chunks(size))
