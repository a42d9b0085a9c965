"""Tasks over many processes: one all-reduce of one flat buffer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from imaml._errors import NonFiniteError
from imaml._losses.snapshot import Snapshot

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")
_BITS = {4: torch.int32, 8: torch.int64}


def check_group(group: object) -> None:
    """Raise TypeError unless it is a process group that this process is in."""
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "`group` must be a torch.distributed.ProcessGroup that this process is in, such as "
            f"torch.distributed.group.WORLD after init_process_group. Got {group!r}."
        )


def check_alike(snapshot: Snapshot, group: ProcessGroup) -> None:
    """Compare the parameters of all ranks by a checksum of their bits: one small all-gather.

    Asked once for an engine: in every call it would stop runs whose ranks differ by the rounding of a hyper-network's
    own backward.

    Args:
        snapshot: With this rank's parameters.
        group: The ranks.

    Raises:
        ValueError: On every rank, where the names, shapes, dtypes or values differ.
    """
    shared = snapshot.shared_layout.gather(snapshot.shared, snapshot.like)
    bits = [flat.view(_BITS[flat.itemsize]).sum() for flat in (snapshot.theta, shared)]
    layouts = crc32(repr((snapshot.layout, snapshot.shared_layout)).encode())
    mine = torch.stack([torch.full_like(bits[0], layouts), *bits])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    first, *others = torch.stack(everyone).tolist()
    for rank, row in enumerate(others, start=1):
        if row != first:
            what = "in value" if row[0] == first[0] else "by name, shape, dtype, or in which of them adapt"
            raise ValueError(
                f"The parameters of all ranks must be the same. Those of ranks 0 and {rank} differ {what}: seed the "
                "ranks alike before the model is made, load one checkpoint on all, or broadcast the parameters."
            )


def over_ranks(
    compute: Callable[[], tuple[list[Tensor], T]], zeros: Callable[[], list[Tensor]], group: ProcessGroup
) -> tuple[list[Tensor], T]:
    """Compute on every rank, and sum over the ranks by one all-reduce, to which a rank that fails comes too.

    It brings zeros and a flag, so that nobody waits for it.

    Args:
        compute: This rank's part: 1-dim tensors, of the same sizes and dtypes on every rank; and what stays with this
            rank.
        zeros: Tensors like those, for a rank that fails.
        group: The ranks.

    Returns:
        The sums, views of one buffer in the widest of the dtypes, and what stayed.

    Raises:
        NonFiniteError: Another rank failed; the error of a rank that fails is raised there.
    """
    try:
        parts, own = compute()
    except Exception:
        _all_reduce(zeros(), group, failed=True)
        raise
    sums, failed = _all_reduce(parts, group, failed=False)
    if failed:
        raise NonFiniteError(
            f"Rank {failed[0]} could not compute its tasks, so there is no mean over all ranks. Its own error says why."
        )
    return sums, own


def _all_reduce(parts: Sequence[Tensor], group: ProcessGroup, *, failed: bool) -> tuple[list[Tensor], list[int]]:
    """The sums, and which ranks failed: the buffer ends with one flag for each."""
    flags = parts[-1].new_zeros(group.size())
    flags[group.rank()] = failed
    buffer = torch.cat([*parts, flags])
    dist.all_reduce(buffer, group=group)
    *sums, flags = buffer.split([*(len(part) for part in parts), len(flags)])
    return sums, flags.nonzero().flatten().tolist()
