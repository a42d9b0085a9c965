"""Started alone, or by torchrun."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous


def restarted() -> bool:
    """Whether torchrun started this process in place of one that it lost."""
    return int(_round()) > 0


def _round() -> str:
    """How often torchrun has started anew, as this machine counts."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


@contextmanager
def process_group(device: str) -> Iterator[ProcessGroup | None]:
    """Within the block, all processes that torchrun started: gloo on a CPU, nccl on GPUs, of which each takes its own.

    Args:
        device: Where they compute.

    Yields:
        The group; None for a process that torchrun did not start.

    Raises:
        ValueError: There are fewer GPUs than processes.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield None
        return
    on_gpu = device.partition(":")[0] == "cuda"
    if on_gpu:
        own = int(os.environ["LOCAL_RANK"])
        if own >= torch.cuda.device_count():
            raise ValueError(f"Process {own} of this machine needs a GPU of its own. Got {torch.cuda.device_count()}.")
        torch.cuda.set_device(own)
    backend = "nccl" if on_gpu else "gloo"
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's one store keeps the addresses of lost processes
        store, rank, size = next(rendezvous("env://"))
        dist.init_process_group(backend, store=PrefixStore(_round(), store), rank=rank, world_size=size)
    else:
        dist.init_process_group(backend)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        gc.collect()  # importing parts of torch leaves frames in cycles, which keep the group's threads past the exit
