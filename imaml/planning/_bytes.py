"""Amounts of memory: read, written, and what a device has."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_CGROUP = Path("/sys/fs/cgroup")


def parse(memory: int | str) -> int:
    """An amount in bytes, from a number of them or from text such as "4GiB", "500MB" or "1.5 GB".

    Args:
        memory: KiB, MiB, GiB and TiB are powers of 1024, kB, MB, GB and TB powers of 1000; case does not matter.

    Returns:
        Bytes, above 0.

    Raises:
        TypeError: Neither an integer nor text.
        ValueError: Text that is no amount, or nothing at all.
    """
    if isinstance(memory, bool) or not isinstance(memory, int | str):
        raise TypeError(f'`memory` must be an amount such as "4GiB", or an integer of bytes. Got {memory!r}.')
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", str(memory), re.IGNORECASE)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ValueError(f'`memory` must be an amount such as "4GiB", "500MB" or "1.5 GB". Got {memory!r}.')
    size = int(float(found[1]) * unit) if found[2] or "." in found[1] else int(found[1])
    if size <= 0:
        raise ValueError(f"`memory` must be more than 0 bytes. Got {memory!r}.")
    return size


def written(size: float) -> str:
    """Bytes to read, such as "1.5 GB": powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def free(device: torch.device) -> int | None:
    """What a device has left for this process.

    Args:
        device: CUDA: what the driver has free and torch's cache holds unused. CPU: what the system calls available, or
            what the control group of the process (a container) has left, if that is less.

    Returns:
        Bytes; None where nothing tells.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    if device.type != "cpu":
        return None
    return min((size for size in (_available(), _left_in_group()) if size is not None), default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_group() -> int | None:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return max(0, int(limit) - int(used))
    except (OSError, ValueError):
        return None
