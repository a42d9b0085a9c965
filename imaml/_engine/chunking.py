"""How many tasks run at once, where the user leaves it open: by the memory that autograd saves for one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from imaml._losses.loss import Loss
from imaml._losses.slice import Slice
from imaml._objective.blocks import Blocks
from imaml._torch import is_functorch_wrapped_tensor, refuses_hooks, tree_leaves

VECTORISED = {"cpu": 12 * 2**20}
"""Bytes that the graphs of tasks vectorised together save at most, by device type. Every task has its own weights:
vectorising shares no work and saves calls alone, which pays on a CPU as long as what a chunk saves stays in the caches.
"""
COMPILED = {"cpu": 2**20}
"""Bytes for compiled derivatives, whose calls cost little: tasks that fill the nearest cache are faster one by one."""
VECTORISED_ELSEWHERE = 256 * 2**20
STORED = 8
"""What the inner states that these tasks hold take at most, in the same bytes."""
KEPT = 192 * 2**20
"""Bytes of the graphs that an inner loop may keep for its reverse sweep."""
_AGAIN = 6
"""What the graph of a gradient that can be differentiated again takes, with a product from it, in plain graphs."""
CALL = 2**19
"""Issuing the operations of an evaluation takes about as long as the arithmetic of one whose graph has this size, in
bytes: the part that vectorising saves."""


@dataclass(frozen=True)
class Chunking:
    """How a chunk runs."""

    tasks: int
    """Tasks of a chunk."""
    query_tasks: int
    """Tasks whose query gradient is computed at once."""
    graphs: int
    """How many of the last inner steps have their graph kept for the reverse sweep of MAML, at most."""
    recompute: Blocks = ()
    """Modules whose calls are recomputed, besides those that the objective or the engine names."""


ONE_BY_ONE = Chunking(1, 1, graphs=0)


@dataclass(frozen=True)
class Needs:
    """What an engine holds of the inner loop of a task until its sweep."""

    states: int = 0
    """Vectors of inner states."""
    least: int = 0
    """Graphs of inner steps: so many in any case,"""
    most: int = 0
    """and so many where they fit."""


@dataclass(frozen=True)
class Footprint:
    """What one task takes, and how many run at once by it.

    All answers depend on shapes and dtypes alone, so that runs repeat bit for bit; timed ones would not.
    """

    support: int
    """Bytes that autograd saves for the gradient of the support loss, or of a slice of it."""
    query: int
    """Bytes that it saves for that of the query loss."""
    vector: int
    """Bytes of the adapted parameters."""
    room: int
    """Bytes that the graphs of tasks vectorised together save at most,"""
    held: int
    """and that their inner states take."""
    keeps: bool
    """Whether steps may keep their graphs: not those of a loss that is taken slice by slice. Of one whose blocks are
    recomputed, to save memory, a graph spares less than a gradient."""

    @classmethod
    def of(cls, support: Loss, query: Loss, theta: Tensor, *, compiled: bool) -> Footprint:
        """Look at the losses of one task, at theta `(1, n)`: two forward passes.

        Args:
            support: Its support loss.
            query: Its query loss.
            theta: The point.
            compiled: Whether derivatives are compiled.

        Returns:
            What it takes.
        """
        inside, outside = (max(1, saved_bytes(loss.slices[0][1], theta)) for loss in (support, query))
        keeps = len(support.slices) == 1 and not support.snapshot.survey.recomputes_any
        room = COMPILED.get(theta.device.type, _room(theta)) if compiled else _room(theta)
        return cls(inside, outside, theta.nbytes, room, STORED * _room(theta), keeps)

    def most(self, needs: Needs) -> int:
        """How many tasks of an engine are vectorised at most, kept graphs aside."""
        return max(1, min(self.room // self.support, self.held // max(1, needs.states * self.vector)))

    def chunking(self, tasks: int, needs: Needs) -> Chunking:
        """The fastest of the chunkings whose graphs fit, where those of few tasks more leave room for more steps.

        A step whose graph is kept costs 3 gradients and another one 4, by arithmetic, and each of them issues its
        operations once a chunk.

        Args:
            tasks: All tasks of these shapes.
            needs: What the engine holds.

        Returns:
            The one that takes the least time for all tasks. The chunks are of equal sizes, as far as that goes.
        """
        best, fastest = ONE_BY_ONE, inf
        for graphs in range(needs.least, (needs.most if self.keeps else needs.least) + 1):
            fitting = min(tasks, self.most(needs), self._with_graphs(graphs))
            if fitting == 0 and graphs > needs.least:
                break
            chunks = ceil(tasks / max(1, fitting))
            time = (4 * needs.most - graphs or 1) * (tasks * self.support + chunks * CALL)
            if time < fastest:
                best, fastest = Chunking(ceil(tasks / chunks), max(1, self.room // self.query), graphs), time
        return best

    def _with_graphs(self, graphs: int) -> int:
        """How many tasks may keep so many graphs."""
        # The first stands where a product would build it, and is held while the query gradient is taken.
        free = graphs == 0 or graphs == 1 and self.query <= self.support
        return self.room if free else KEPT // (_AGAIN * graphs * self.support)


def saved_bytes(part: Slice, phi: Tensor) -> int:
    """What autograd saves for the gradient of a slice of a loss at phi, parameters and data aside; much, if unknown."""
    saved: list[Tensor] = []
    given = saved_for(part, phi, saved)
    if given is None:
        return max(KEPT, _room(phi))
    known = storages(given)
    return sum(size for pointer, size in storages(saved).items() if pointer not in known)


def saved_for(part: Slice, phi: Tensor, saved: list[Tensor]) -> list[Tensor] | None:
    """Append what autograd saves for the gradient of a slice of a loss at phi, tensor by tensor as it is saved.

    Args:
        part: The slice.
        phi: The adapted parameters.
        saved: Is appended to.

    Returns:
        The parameters, buffers and data, which are saved too; None where nothing can be seen.

    Raises:
        RuntimeError: The forward pass fails.
    """

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # the tensor itself would be kept by its own graph
        if not is_functorch_wrapped_tensor(kept):  # one inside a transform of the loss's own has no memory to be seen
            saved.append(kept)
        return kept

    with torch.enable_grad():
        adapted, shared = part.leaves(phi, shared=True)
        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                part.losses(adapted, shared, part.batch, 0)
        except RuntimeError as error:
            if not refuses_hooks(error):
                raise
            return None  # transforms of torch.func allow no look at what is saved
    return [*adapted, *shared, *part.snapshot.constants.fresh().values(), *tree_leaves(part.batch)]


def _room(theta: Tensor) -> int:
    return VECTORISED.get(theta.device.type, VECTORISED_ELSEWHERE)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """The size of each storage by its address."""
    found = (part.untyped_storage() for tensor in tensors for part in _dense_parts(tensor))
    return {s.data_ptr(): s.nbytes() for s in found}


def _dense_parts(tensor: Tensor) -> list[Tensor]:
    """What a tensor is made of: itself, or the indices and values of a sparse one, which has no storage."""
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return []
