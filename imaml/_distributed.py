"""Tasks over many processes: one all-reduce of one flat buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from imaml._context import Context
from imaml._errors import NonFiniteError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_BITS = {4: torch.int32, 8: torch.int64}


def check_group(group: object) -> None:
    """Raise TypeError unless it is a process group that this process is in."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`group` must be a torch.distributed.ProcessGroup that this process is in, such as "
            f"torch.distributed.group.WORLD after init_process_group. Got {group!r}."
        )


def check_alike(context: Context, group: ProcessGroup) -> None:
    """Compare the parameters of all ranks by a checksum of their bits: one small all-gather.

    Args:
        context: With this rank's parameters.
        group: The ranks.

    Raises:
        ValueError: On every rank, where the names, shapes, dtypes or values differ.
    """
    fixed = context.fixed_layout.gather(context.fixed, context.theta)
    bits = [flat.view(_BITS[flat.itemsize]).sum() for flat in (context.theta, fixed)]
    layouts = crc32(repr((context.layout, context.fixed_layout)).encode())
    mine = torch.stack([torch.full_like(bits[0], layouts), *bits])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    table = torch.stack(everyone).tolist()
    for rank, row in enumerate(table):
        if row != table[0]:
            what = "in values" if row[0] == table[0][0] else "in names, shapes or dtypes, or in what adapts,"
            raise ValueError(
                f"The parameters of ranks 0 and {rank} must be the same. They differ {what}: seed all ranks alike before "
                "the model is made, load one checkpoint on all, or broadcast the parameters."
            )


def sum_over_ranks(parts: Sequence[Tensor], group: ProcessGroup, *, failed: bool = False) -> list[Tensor]:
    """Sum 1-dim tensors over all ranks by one all-reduce, in which every rank also says whether it failed.

    The buffer holds the parts one after the other, and a flag for every rank.

    Args:
        parts: Of the same sizes and dtypes on every rank, on one device. A rank that failed passes zeros.
        group: The ranks.
        failed: Whether this rank failed; it then raises its own error after the call.

    Returns:
        The sums, on a rank that did not fail: views of one buffer in the widest of the dtypes.

    Raises:
        NonFiniteError: Another rank failed.
    """
    flags = parts[0].new_zeros(group.size())
    flags[group.rank()] = failed
    buffer = torch.cat([*parts, flags])
    dist.all_reduce(buffer, group=group)
    *sums, flags = buffer.split([*(len(part) for part in parts), len(flags)])
    others = [rank for rank, flag in enumerate(flags.tolist()) if flag and rank != group.rank()]
    if others and not failed:
        raise NonFiniteError(
            f"Rank {others[0]} failed to compute its tasks, so there is no mean over all ranks. Its own error says why."
        )
    return sums
