"""Attention by the kernel that an evaluation can bear: fused for first derivatives, mathematics for second ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from imaml._torch import of_all_tasks

_KERNELS: list[tuple[Callable[[], bool], Callable[[bool], None]]] = [
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
]
"""The kernels of attention: whether one is on, and its switch. (`sdpa_kernel` has to end in the thread it began in.)"""


class _Depth(threading.local):
    count = 0


class _Switch:
    """The kernels of all threads, which are mathematics alone as long as one of them wants that."""

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, list[bool]()

    def move(self, by: int) -> None:
        """Note that so many more want mathematics."""
        with self._lock:
            was, self._inside = self._inside, self._inside + by
            if was == 0 < self._inside:
                self._before = [is_on() for is_on, _ in _KERNELS]
                for _, switch in _KERNELS:
                    switch(switch is torch.backends.cuda.enable_math_sdp)
            elif was > 0 == self._inside:
                for (_, switch), before in zip(_KERNELS, self._before, strict=True):
                    switch(before)


class MathAttention:
    """Within it attention is plain mathematics: torch's fused kernels have no second derivative, and no batching rule.

    First derivatives of a single task keep them.
    """

    _switch: ClassVar[_Switch] = _Switch()
    _depth: ClassVar[_Depth] = _Depth()
    """How many are open in this thread. They nest in every product, and it is dear to set the switch."""

    def __enter__(self) -> None:
        self._depth.count += 1
        if self._depth.count == 1:
            self._switch.move(1)

    def __exit__(self, *error: object) -> None:
        self._depth.count -= 1
        if self._depth.count == 0:
            self._switch.move(-1)


class AnyAttention:
    """Within it, inside `MathAttention`, attention is by whatever kernel the user has: no second derivative follows."""

    def __enter__(self) -> None:
        depth = MathAttention._depth
        self._before, depth.count = depth.count, 0
        if self._before:
            MathAttention._switch.move(-1)

    def __exit__(self, *error: object) -> None:
        MathAttention._depth.count = self._before
        if self._before:
            MathAttention._switch.move(1)


FEW, MANY = 2**17, 2**20
"""Entries of the matrices of scores that are formed at a time where attention is mathematics.

Within a block they are kept for its second derivative, and few at a time spare some ten passing tensors of that size
for no time. Outside many at a time are a block of their own, which takes time unless sequences are long.
"""

plain: Callable[..., Tensor] = F.scaled_dot_product_attention
"""Torch's own, which evaluations of a loss do not find under its name."""


def lean(
    call: Callable[..., Tensor],
    most: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`F.scaled_dot_product_attention`, in slices of the batch and of the heads where it is mathematics.

    Args:
        call: Calls a function of a slice's tensors.
        most: Entries of the scores of a slice.
        query: `(..., L, E)`, as for the rest.
        key: `(..., S, E)`.
        value: `(..., S, V)`.
        attn_mask: Broadcast to `(..., L, S)`.
        dropout_p: Attention with dropout is not cut up.
        is_causal: Whether a token attends to none after it.
        kwargs: Further arguments as they are.

    Returns:
        `(..., L, V)`.
    """
    whole, options = (query, key, value, attn_mask), {"dropout_p": dropout_p, "is_causal": is_causal, **kwargs}
    if dropout_p > 0:
        # Fused kernels draw other masks than mathematics, of which the second derivatives at the same point are.
        with MathAttention():
            return plain(*whole, **options)
    tasks = of_all_tasks(query).numel() // max(query.numel(), 1)
    each = most // max(tasks, 1)
    if not MathAttention._depth.count or _entries(query, key) <= each:
        return plain(*whole, **options)

    def one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return call(partial(plain, **options), query, key, value, mask)

    return _sliced(one, whole, 0, each)


def _entries(query: Tensor, key: Tensor) -> int:
    return query.shape[:-1].numel() * key.shape[-2] if query.ndim > 1 else 0


def _sliced(one: Callable[..., Tensor], whole: Sequence[Tensor | None], dim: int, each: int) -> Tensor:
    """One function of slices along the leading dimensions, each with so many scores at most, as far as that goes."""
    query, key, value, mask = whole
    assert query is not None and key is not None and value is not None
    if dim == query.ndim - 2 or (entries := _entries(query, key)) <= each:
        return one(*whole)
    size = query.shape[dim]
    if not size == key.shape[dim] == value.shape[dim]:  # grouped heads
        return _sliced(one, whole, dim + 1, each)
    many = max(1, each * size // entries)
    parts: list[Sequence[Tensor | None]] = [t.split(many, dim) for t in (query, key, value)]
    own = mask is not None and mask.ndim + dim >= query.ndim and mask.shape[dim - query.ndim] == size
    parts.append(mask.split(many, dim - query.ndim) if mask is not None and own else [mask] * len(parts[0]))
    return torch.cat([_sliced(one, part, dim + 1, each) for part in zip(*parts, strict=True)], dim)
