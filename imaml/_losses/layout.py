"""Named parameters as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce

import torch
from torch import Tensor

from imaml._torch import is_traced


@dataclass(frozen=True)
class Layout:
    """Where each named parameter lies in a flat vector of `size` entries."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Layout:
        """The layout of these tensors, in their order."""
        return cls(tuple(named), tuple(t.shape for t in named.values()), tuple(t.dtype for t in named.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each parameter."""
        return tuple(shape.numel() for shape in self.shapes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the flat vector: the widest of the parameters', at least float32."""
        return reduce(torch.promote_types, self.dtypes, torch.float32)

    @cached_property
    def is_of_one_dtype(self) -> bool:
        """Whether every parameter is of the flat vector's dtype."""
        return all(dtype == self.dtype for dtype in self.dtypes)

    def empty(self, like: Tensor) -> Tensor:
        """A flat vector of no entries, where a parameter is."""
        return like.detach().new_empty(0, dtype=self.dtype)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Concatenate one tensor per parameter into a new vector `(n,)`."""
        return torch.cat([t.detach().reshape(-1).to(self.dtype) for t in tensors])

    def views(self, flat: Tensor, *, cast: bool = True) -> list[Tensor]:
        """Split `(*batch, n)` into one tensor `(*batch, *shape)` per parameter: views, unless cast to another dtype."""
        batch, parts = flat.shape[:-1], flat.split_with_sizes(self.sizes, -1)
        views = [p.view(batch + s) for p, s in zip(parts, self.shapes, strict=True)]
        if not cast or self.is_of_one_dtype and flat.dtype == self.dtype:
            return views
        return [v.to(d) for v, d in zip(views, self.dtypes, strict=True)]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Like `views`, by name."""
        return dict(zip(self.names, self.views(flat), strict=True))

    def gather(self, tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """One tensor `(*batch, *shape)` per parameter, None for zeros, as a new flat one; `like`: `(*batch, m)`."""
        batch, dtype = like.shape[:-1], self.dtype
        given = [t for t in tensors if t is not None]
        in_order = all([t.is_contiguous() for t in given])
        # A compiler would make a pass over the whole for each part that is written.
        if not in_order and not any([t.requires_grad for t in given]) and not is_traced():
            return self._gathered(tensors, like.new_empty((*batch, sum(self.sizes)), dtype=dtype))
        parts = [
            torch.zeros(*batch, size, dtype=dtype, device=like.device)
            if tensor is None
            else tensor.reshape(*batch, size).to(dtype)
            for tensor, size in zip(tensors, self.sizes, strict=True)
        ]
        return torch.cat(parts, -1) if parts else torch.zeros(*batch, 0, dtype=dtype, device=like.device)

    def _gathered(self, tensors: Sequence[Tensor | None], flat: Tensor) -> Tensor:
        """`gather` without a graph, written part by part, so that what lies in another order is copied once."""
        for tensor, view in zip(tensors, self.views(flat, cast=False), strict=True):
            if tensor is None:
                view.zero_()
            else:
                view.copy_(tensor)
        return flat
