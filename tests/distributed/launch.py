"""Functions run by two gloo processes at once, their results brought back."""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
SECONDS = 40
"""More than any of the functions takes, less than a hanging collective would."""


def on_two_ranks(functions: dict[str, Callable[..., Any]], seconds: float = SECONDS) -> dict[str, list[Any]]:
    """The result of `function(group)` on every rank by name; an error is a result too, as (its type, its message)."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(_worker, (folder, functions), nprocs=RANKS, join=False, start_method="spawn")
        end = monotonic() + seconds
        while not context.join(timeout=max(end - monotonic(), 0)):
            if monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError("The ranks hang.")
        found = [torch.load(Path(folder, str(rank))) for rank in range(RANKS)]
    return {name: [results[name] for results in found] for name in functions}


def _worker(rank: int, folder: str, functions: dict[str, Callable[..., Any]]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=SECONDS // 2))
    results = {name: _outcome(function) for name, function in functions.items()}
    torch.save(results, Path(folder, str(rank)))
    dist.barrier()
    dist.destroy_process_group()


def _outcome(function: Callable[..., Any]) -> Any:
    try:
        return function(dist.group.WORLD)
    except Exception as error:
        return type(error).__name__, str(error)
