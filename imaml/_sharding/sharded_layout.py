"""Parameters sharded over processes, by FSDP2 or tensor parallelism, as flat vectors of which each process has a part.

The vectors are DTensors: sums, norms and inner products are over all processes, wherever they are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from imaml._losses.layout import Layout


@dataclass(frozen=True)
class ShardedLayout(Layout):
    """Where each parameter lies in a process's part of a flat vector: its own shard, or its share of a replicated one.

    Each is padded by zeros to the same size on all processes.
    """

    mesh: DeviceMesh
    placements: tuple[Placement | None, ...]
    """Placement of each parameter; None for a plain tensor, which is replicated."""
    local_shapes: tuple[torch.Size, ...]

    @classmethod
    def on(cls, mesh: DeviceMesh, named: Mapping[str, Tensor]) -> ShardedLayout:
        """The layout of these tensors, in their order."""
        layout, tensors = Layout.of(named), named.values()
        placements = tuple(t.placements[0] if isinstance(t, DTensor) else None for t in tensors)
        return cls(layout.names, layout.shapes, layout.dtypes, mesh, placements, tuple(local(t).shape for t in tensors))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each parameter in a process's part."""
        ranks = self.mesh.size()
        return tuple(
            -(-s[p.dim] // ranks) * (s.numel() // s[p.dim]) if isinstance(p, Shard) else -(-s.numel() // ranks)
            for s, p in zip(self.shapes, self.placements, strict=True)
        )

    def empty(self, like: Tensor) -> Tensor:
        """See `Layout`."""
        none = local(like).detach().new_empty(0, dtype=self.dtype)
        return DTensor.from_local(none, self.mesh, [Shard(0)], run_check=False)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor per parameter as a new vector `(n,)`."""
        return self.gather(tensors, local(tensors[0]).new_empty(0))

    def gather(self, tensors: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """One tensor per parameter, None for zeros, as a new vector; `like`: `(n,)`, or `(1, n)` of one task."""
        flat = torch.zeros(sum(self.sizes), dtype=self.dtype, device=like.device)
        for part, tensor, placement in zip(flat.split(self.sizes), tensors, self.placements, strict=True):
            if tensor is None:
                continue
            if isinstance(tensor, DTensor):
                tensor = tensor.redistribute(self.mesh, [placement or Replicate()])
            mine = local(tensor).detach().reshape(-1)
            if not isinstance(placement, Shard):
                mine = mine[len(part) * self.mesh.get_local_rank() :][: len(part)]
            part[: len(mine)] = mine
        batch = like.shape[:-1]
        return DTensor.from_local(flat.view(*batch, len(flat)), self.mesh, [Shard(len(batch))], run_check=False)

    def shards(self, flat: Tensor) -> list[Tensor]:
        """What this process holds of each parameter, `(*batch, *local_shape)`; replicated ones are gathered."""
        batch, found = flat.shape[:-1], []
        for part, placement, shape in zip(
            local(flat).split(self.sizes, dim=-1), self.placements, self.local_shapes, strict=True
        ):
            if not isinstance(placement, Shard):
                part = DTensor.from_local(part, self.mesh, [Shard(len(batch))], run_check=False).full_tensor()
            found.append(part[..., : shape.numel()].reshape(*batch, *shape))
        return found

    def views(self, flat: Tensor, *, cast: bool = True) -> list[Tensor]:
        """One tensor `(*batch, *shape)` per parameter, sharded as it is, for a model.

        Args:
            flat: A vector `(*batch, n)`.
            cast: As of `Layout`; False where an update takes its vectors apart.

        Returns:
            The tensors.

        Raises:
            ValueError: An update asks, whose norms and products of one parameter may meet in collectives that differ.
        """
        if not cast:
            raise ValueError(
                "The model's parameters are sharded over processes. Expected an optimiser that needs no parameter "
                "as a whole, such as GradientDescent or Adam. Got one whose `update` takes vectors apart, as those of "
                "LAMB and Muon do by `at.views`."
            )
        batch = flat.shape[:-1]

        def like_parameter(mine: Tensor, placement: Placement | None, shape: torch.Size) -> Tensor:
            if placement is None:
                return mine
            there = Shard(placement.dim + len(batch)) if isinstance(placement, Shard) else placement
            full = torch.empty(*batch, *shape, device="meta")
            return DTensor.from_local(mine, self.mesh, [there], run_check=False, shape=full.shape, stride=full.stride())

        return [
            like_parameter(mine.to(dtype), placement, shape)
            for mine, dtype, placement, shape in zip(
                self.shards(flat), self.dtypes, self.placements, self.shapes, strict=True
            )
        ]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
