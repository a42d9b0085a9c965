"""`MetaGradient.plan`, and what `chunk_size="auto"` chooses."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from imaml._engine.chunking import VECTORISED, Chunking
from imaml._engine.inner_state import InnerState
from imaml._engine.strategy import Strategy
from imaml._objective.meta import no_gradient
from imaml._objective.objective import Objective
from imaml._sharding.runs import run_of
from imaml._tasks import Task, TaskBatch
from imaml._tasks import group as by_shape
from imaml._torch import tree_leaves
from imaml.planning._bytes import free, parse
from imaml.planning._candidates import REFUSALS, worth_recomputing
from imaml.planning._forecast import Engine, Forecast, Setting
from imaml.planning._predict import ProbedTasks, costs_of, predict
from imaml.planning._probe import MOST_TASKS, probe
from imaml.planning._settings import every

SHARE = 0.8
"""The share of the free memory that `chunk_size="auto"` takes: the rest is for what a prediction may miss."""


def forecast(
    engine: Engine, objective: Objective, tasks: TaskBatch | Sequence[Task], memory: int | str | None
) -> Forecast[Engine]:
    """See `MetaGradient.plan`."""
    limit = None if memory is None else parse(memory)
    given = [batch for _, batch in by_shape(tasks)]
    groups = [(batch.alike(0), batch.fetched(0)) for batch in given]  # of minibatches the first stands for all
    device = device_of(objective)
    if limit is None and device.type != "cpu":
        limit = free(device)
    batches = [look(engine, objective, batch, room_of(device), fetched) for batch, fetched in groups]
    for key in set[str].intersection(*(set(batch.probe.facts.without_path) for batch in batches)):
        raise no_gradient(key, engine._without_path)
    ways = [(engine, batches), *recomputing(engine, objective, groups, room_of(device))]
    tensors = [] if isinstance(tasks, TaskBatch) else tree_leaves([(batch.support, batch.query) for batch in given])
    stacked = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    settings: list[Setting[Engine]] = []
    for way, looks in ways:
        changes = {} if way is engine else {"recompute": way.recompute}
        for options in every(costs_of(way), device, max(map(len, given))):
            chosen = replace(way, **options) if options else way
            found = predict(chosen, looks, [chunking(chosen, look, limit) for look in looks], stacked=stacked)
            fits = limit is None or found.peak_bytes <= limit
            settings.append(Setting(engine=chosen, options=changes | options, fits=fits, **vars(found)))
    return Forecast(
        settings=tuple(sorted(settings, key=lambda setting: (setting.rank, setting.peak_bytes))),
        memory=limit,
        tasks=sum(map(len, given)),
        gradients=sum(look.probe.gradients for _, looks in ways for look in looks),
        hvps=sum(look.probe.hvps for _, looks in ways for look in looks),
    )


def recomputing(
    engine: Engine,
    objective: Objective,
    groups: Sequence[tuple[TaskBatch, int]],
    room: float | None,
    start: InnerState | None = None,
) -> list[tuple[Engine, list[ProbedTasks]]]:
    """The engine with modules that are worth recomputing, if it leaves that open and there are any, and its looks."""
    for blocks in worth_recomputing(engine, objective, groups[0][0], start):
        leaner = replace(engine, recompute=blocks)
        with suppress(*REFUSALS):  # found where tasks are vectorised, or in second derivatives
            return [(leaner, [look(leaner, objective, batch, room, fetched, start) for batch, fetched in groups])]
    return []


def look(
    engine: Strategy,
    objective: Objective,
    batch: TaskBatch,
    room: float | None,
    fetched: int,
    start: InnerState | None = None,
) -> ProbedTasks:
    """Measure the stages of a few tasks of equal shapes, as far as these stay within the room.

    Args:
        engine: Its settings.
        objective: Model and loss.
        batch: The tasks, with a batch that stands for those of all steps.
        room: Bytes; None: no limit.
        fetched: Bytes of the batch that a step fetches.
        start: Where the inner trainings go on from, which says the steps that hyper-parameters are for; None: theta.

    Returns:
        What is known of them.
    """
    variants = costs_of(engine).variants(device_of(objective))
    engines = [replace(engine, chunk_size=1, compile=False, **changes) for changes in variants]
    with torch.inference_mode(False), torch.no_grad():
        run = run_of(replace(engine, chunk_size=None, compile=False), objective, derivatives=True, start=start)
        run.check(batch)
        footprint = run.footprint(batch)
        fixed = engine.chunk_size if isinstance(engine.chunk_size, int) else None
        most = min(len(batch), MOST_TASKS if fixed is None else min(fixed, MOST_TASKS))
        costs = [costs_of(one) for one in engines]
        found = probe(costs, objective, batch, range(1, most + 1), room, fetched, start)
    return ProbedTasks(tasks=len(batch), probe=found, footprint=footprint)


def automatic(
    engine: Strategy,
    objective: Objective,
    batch: TaskBatch,
    shapes: Hashable,
    fetched: int,
    start: InnerState | None,
) -> Chunking:
    """How tasks run with `chunk_size="auto"`; looked at once for these shapes, and again for more tasks up to three."""
    key, looks = (shapes, min(len(batch), MOST_TASKS)), engine._memory.looks
    if key not in looks:
        room = room_of(device_of(objective))
        looks[key] = look(engine, objective, batch, room, fetched, start), room
    found, room = looks[key]
    found = replace(found, tasks=len(batch))
    chosen = auto(engine, found, room)
    peak = predict(engine, [found], [chosen]).peak_bytes
    if room is None or peak <= room:
        return chosen
    if (key, "recompute") not in looks:  # a second probe, and only where nothing fits without
        looks[key, "recompute"] = recomputing(engine, objective, [(batch, fetched)], room, start)
    for leaner, [again] in looks[key, "recompute"]:
        again = replace(again, tasks=len(batch))
        one = auto(leaner, again, room)
        if predict(leaner, [again], [one]).peak_bytes < peak:
            return replace(one, recompute=leaner.recompute)
    return chosen


def device_of(objective: Objective) -> torch.device:
    """Where the adapted parameters are."""
    return objective.parameters()[objective.adapted[0]].device


def room_of(device: torch.device) -> float | None:
    """What may be taken of the memory that is free now."""
    left = free(device)
    return None if left is None else SHARE * left


def chunking(engine: Strategy, batch: ProbedTasks, room: float | None) -> Chunking:
    """How tasks run in a setting."""
    if engine.chunk_size == "auto":
        return auto(engine, batch, room)
    size = engine.chunk_size
    return batch.usual(engine) if size is None else Chunking(size, size, graphs=0)


def auto(engine: Strategy, batch: ProbedTasks, room: float | None) -> Chunking:
    """The fastest chunking, by prediction, that stays within the room; the leanest where none does."""
    most, query_tasks = batch.tasks, batch.usual(engine).query_tasks
    if batch.probe.facts.device.type in VECTORISED:
        most = min(most, batch.footprint.most(engine._needs))
    counts = range(ceil(batch.tasks / most), batch.tasks + 1)
    chunkings = [
        Chunking(size, min(size, query_tasks), graphs)
        for size in dict.fromkeys(ceil(batch.tasks / count) for count in counts)
        for graphs in costs_of(engine).numbers_of_graphs
    ]
    found = [(predict(engine, [batch], [one]), one) for one in chunkings]
    fitting = [pair for pair in found if room is None or pair[0].peak_bytes <= room]
    if not fitting:
        return min(found, key=lambda pair: pair[0].peak_bytes)[1]
    return min(fitting, key=lambda pair: (pair[0].rank, pair[0].peak_bytes))[1]
