"""Which settings of an engine are worth trying: the variants that its strategy names, in chunks of some sizes."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch

from imaml._engine.strategy import Strategy
from imaml.planning._costs import Costs


def every(costs: Costs, device: torch.device, tasks: int) -> list[dict[str, Any]]:
    """The engine as it is, and every setting of what it leaves open, to be predicted.

    Args:
        costs: Those of the engine, whose options that are not left open do not vary.
        device: Where it computes.
        tasks: How many there are.

    Returns:
        What each setting changes.
    """
    chunks: list[dict[str, Any]] = [{}]
    if costs.engine.chunk_size in (None, "auto"):
        chunks += [{"chunk_size": size} for size in sizes(tasks)]
    found: list[dict[str, Any]] = [{}]
    for variant in costs.variants(device):
        for chunk in chunks:
            options = _changes(costs.engine, variant) | chunk
            if options not in found:
                found.append(options)
    return found


def few(costs: Costs, device: torch.device, tasks: int) -> list[dict[str, Any]]:
    """The engine as it is, and the settings to be measured, which takes longer than a prediction.

    These are the smallest and the largest chunks, what the strategy wants measured in the chunks that the engine
    chooses, and the first variant of each option in the smallest chunks.

    Args:
        costs: Those of the engine.
        device: Where it computes.
        tasks: How many there are.

    Returns:
        What each setting changes.
    """
    first: dict[tuple[str, ...], dict[str, Any]] = {}
    for variant in costs.variants(device):
        options = _changes(costs.engine, variant)
        first.setdefault(tuple(options), {"chunk_size": 1} | options)
    first.pop((), None)  # the engine as it is
    ends = [{"chunk_size": size} for size in (1, tasks)] if tasks > 1 else []
    return [{}, *ends, *costs.measured(device), *first.values()]


def sizes(tasks: int) -> list[int]:
    """Sizes of chunks worth looking at, descending: the smallest for each number of chunks 1, 2, 4, 8, ..."""
    found, chunks = [tasks], 2
    while found[-1] > 1:
        found.append(ceil(tasks / chunks))
        chunks *= 2
    return list(dict.fromkeys(found))


def _changes(engine: Strategy, variant: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in variant.items() if getattr(engine, name) != value}
