"""Operations on batches of vectors `(*batch, n)`; on a CPU, sums over long ones write no other vector as long.

Fresh memory costs a CPU more than arithmetic: of vectors of 90 MB, x + a y takes six times as long in a new one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = 2**18
"""Entries that a CPU works on at once."""
_MOST_SYSTEMS = 2**8
"""More of them leave so few columns to a block that their memory is not contiguous enough."""


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The inner products over the last dimension, `(*batch,)`."""
    parts = [torch.mul(a, b, out=scratch).sum(-1) for scratch, a, b in _blocks(x, y)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def norm(x: Tensor) -> Tensor:
    """The 2-norms over the last dimension, `(*batch,)`, also where squares overflow or underflow."""
    size: Tensor = torch.linalg.vector_norm(x, dim=-1)
    if bool(((size > torch.finfo(size.dtype).tiny ** 0.25) & (size < torch.inf)).all()):
        return size
    unit = power_of_two(largest_entry(x).unsqueeze(-1))
    return _norm(torch.div(a, unit, out=scratch) for scratch, a in _blocks(x)) * unit.squeeze(-1)


def power_of_two(peak: Tensor) -> Tensor:
    """A power of two within a factor of two of `peak`; 1 where peak is zero or not finite."""
    usable = (peak > 0) & torch.isfinite(peak)
    safe = peak.where(usable, 1)
    return safe / (2 * torch.frexp(safe).mantissa)


def largest_entry(x: Tensor) -> Tensor:
    """The largest absolute value over the last dimension, `(*batch,)`; NaN where there is one."""
    parts = [_largest(a) if scratch is None else torch.abs(a, out=scratch).amax(-1) for scratch, a in _blocks(x)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).amax(0)


def norm_of_sum(x: Tensor, factor: Tensor, y: Tensor) -> Tensor:
    """The 2-norms of x + factor y, `(*batch,)`, for entries whose squares neither overflow nor underflow."""
    return _norm(torch.addcmul(a, factor, b, out=scratch) for scratch, a, b in _blocks(x, y))


def largest_of_sum(x: Tensor, factor: Tensor, y: Tensor) -> Tensor:
    """The largest absolute value of x + factor y, `(*batch,)`; NaN where there is one."""
    parts = [torch.addcmul(a, factor, b, out=scratch).abs_().amax(-1) for scratch, a, b in _blocks(x, y)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).amax(0)


def add_where(systems: Tensor, x: Tensor, factor: Tensor, y: Tensor) -> None:
    """Add factor y to x, in place, where chosen; elsewhere x stays bit for bit."""
    if bool(systems.all()):
        x.addcmul_(factor, y)
        return
    chosen = systems.unsqueeze(-1)
    for scratch, a, b in _blocks(x, y):
        torch.where(chosen, torch.addcmul(a, factor, b, out=scratch), a, out=a)


def choose(systems: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where chosen, else `old`; may be written into `new`."""
    return new if bool(systems.all()) else torch.where(systems.unsqueeze(-1), new, old, out=new)


def _blocks(*vectors: Tensor) -> Iterator[tuple[Any, ...]]:
    """Go through vectors of one shape.

    Yields:
        One scratch tensor, and the same columns of every vector, as views. None, and the vectors themselves, unless
        they are long, few, on a CPU, plain tensors, and not differentiated.
    """
    first = vectors[0]
    systems = first[..., 0].numel()
    plain = all(type(v) is Tensor and v.is_cpu and not v.requires_grad for v in vectors)
    if first.numel() <= _BLOCK or systems > _MOST_SYSTEMS or not plain:
        yield None, *vectors
        return
    columns = max(1, _BLOCK // systems)
    scratch = torch.empty_like(first[..., :columns])
    for parts in zip(*(v.split(columns, -1) for v in vectors), strict=True):
        yield scratch[..., : parts[0].shape[-1]], *parts


def _norm(blocks: Iterable[Tensor]) -> Tensor:
    """The 2-norms of vectors that come block by block."""
    parts = [torch.linalg.vector_norm(block, dim=-1) for block in blocks]
    size: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts, -1), dim=-1)
    return size


def _largest(x: Tensor) -> Tensor:
    """Without another vector, at ten times the time of `abs().amax()`."""
    size: Tensor = torch.linalg.vector_norm(x, ord=torch.inf, dim=-1)
    return size
