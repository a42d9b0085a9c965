"""Started alone, or by torchrun."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def restarted() -> bool:
    """Whether torchrun started this process in place of one that it lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


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
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        gc.collect()  # importing parts of torch leaves frames in cycles, which keep the group's threads past the exit
