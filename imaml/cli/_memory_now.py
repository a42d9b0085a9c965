"""The memory of the process and of its device, now and at the highest."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


def memory_now(device: torch.device) -> str:
    """A text such as "memory 412 MB, peak 455 MB", in 10^6 bytes: what is resident, and what an accelerator has given.

    Args:
        device: Where a model lives. Memory of a CUDA or XPU device stands behind that of the process.

    Returns:
        The text. What the system does not tell is left out.
    """
    now, peak = resident()
    sizes = ([] if now is None else [_megabytes(now)]) + ([] if peak is None else [f"peak {_megabytes(peak)}"])
    texts = ["memory " + (", ".join(sizes) or "unknown")]
    if device.type in ("cuda", "xpu"):
        module = torch.get_device_module(device)
        given, most = module.memory_allocated(device), module.max_memory_allocated(device)
        texts.append(f"{device.type} {_megabytes(given)}, peak {_megabytes(most)}")
    return "; ".join(texts)


def resident(status: Path = Path("/proc/self/status")) -> tuple[int | None, int | None]:
    """Resident bytes of this process now, and the most so far.

    Args:
        status: Where Linux tells of a process.

    Returns:
        Both; None for what the system does not tell: elsewhere the first, and on Windows both.
    """
    if status.exists():
        sizes = dict(re.findall(r"(?m)^(VmRSS|VmHWM):\s*(\d+) kB$", status.read_text()))
        if len(sizes) == 2:
            return 1024 * int(sizes["VmRSS"]), 1024 * int(sizes["VmHWM"])
    try:
        import resource
    except ModuleNotFoundError:
        return None, None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None, most if sys.platform == "darwin" else 1024 * most


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
