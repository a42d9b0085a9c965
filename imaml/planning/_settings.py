"""Which settings of an engine are worth trying: the variants that its strategy names, in chunks of some sizes."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch

from imaml.planning._costs import Costs


def every(costs: Costs, device: torch.device, tasks: int) -> list[dict[str, Any]]:
    """What is changed by each setting to be predicted: the engine as it is, and all that it leaves open."""
    is_open = costs.engine.chunk_size in (None, "auto")
    chunks = [{}, *({"chunk_size": size} for size in sizes(tasks) if is_open)]
    found = [{}, *(variant | chunk for variant in _variants(costs, device) for chunk in chunks)]
    return list({repr(options): options for options in found}.values())  # as written, since 1 == True


def few(costs: Costs, device: torch.device, tasks: int) -> list[dict[str, Any]]:
    """What is changed by each setting to be measured, which takes longer than to predict it."""
    # In the smallest chunks, which take the least memory, the first variant of each option stands for all of them.
    first = {tuple(variant): {"chunk_size": 1} | variant for variant in reversed(_variants(costs, device)) if variant}
    chunks = [{"chunk_size": size} for size in (1, tasks) if tasks > 1]
    return [{}, *chunks, *costs.trials, *reversed(first.values())]


def sizes(tasks: int) -> list[int]:
    """Sizes of chunks worth looking at, descending: the smallest for each number of chunks 1, 2, 4, 8, ..."""
    found, chunks = [tasks], 2
    while found[-1] > 1:
        found.append(ceil(tasks / chunks))
        chunks *= 2
    return list(dict.fromkeys(found))


def _variants(costs: Costs, device: torch.device) -> list[dict[str, Any]]:
    """The variants, each without what is so already."""
    return [
        {name: value for name, value in variant.items() if getattr(costs.engine, name) != value}
        for variant in costs.variants(device)
    ]
