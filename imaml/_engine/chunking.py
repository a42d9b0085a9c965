"""How many tasks run at once, where the user leaves it open: by the memory that autograd saves for one of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from imaml._losses.loss import Loss
from imaml._losses.slice import Slice
from imaml._objective.blocks import Blocks
from imaml._torch import is_functorch_wrapped_tensor, refuses_hooks, tree_leaves

VECTORISED = {"cpu": 32 * 2**20}
"""Bytes that the graphs of tasks vectorised together save at most, by device type. Every task has its own weights:
vectorising shares no work and saves calls alone, which pays on a CPU as long as what a chunk saves stays in the caches.
"""
VECTORISED_ELSEWHERE = 256 * 2**20
STORED = 3
"""What the inner states that these tasks hold take at most, in the same bytes."""
KEPT = 192 * 2**20
"""Bytes of the graphs that an inner loop may keep for its reverse sweep."""
_AGAIN = 6
"""What the graph of a gradient that can be differentiated again takes, with a product from it, in plain graphs."""
_ENOUGH = 2.5 * 2**20
"""Bytes that the gradient of a chunk saves: smaller chunks lose more time by their calls than kept graphs gain."""


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


def choose_chunking(support: Loss, query: Loss, theta: Tensor, steps: int, states: int) -> Chunking:
    """Decide from one task's losses at theta `(1, n)`: two forward passes.

    Args:
        support: The support loss of one task.
        query: The query loss of the same task.
        theta: The initial parameters.
        steps: Inner steps whose graphs might be kept.
        states: Vectors of inner states that a task holds.

    Returns:
        The answer depends on shapes and dtypes alone, so that runs repeat bit for bit; a timed one would not.
    """
    room = _room(theta)
    bytes_support, bytes_query = (max(1, saved_bytes(loss.slices[0][1], theta)) for loss in (support, query))
    tasks, query_tasks = (max(1, room // each) for each in (bytes_support, bytes_query))
    tasks = max(1, min(tasks, STORED * room // max(1, states * theta.nbytes)))
    with_graphs = min(tasks, KEPT // (_AGAIN * max(1, steps) * bytes_support))
    is_enough = with_graphs == tasks or with_graphs * bytes_support >= _ENOUGH
    keeps = is_enough and len(support.slices) == 1
    return Chunking(with_graphs if keeps else tasks, query_tasks, graphs=steps if keeps else 0)


def saved_bytes(part: Slice, phi: Tensor) -> int:
    """What autograd saves for the gradient of a slice of a loss at phi, parameters and data aside."""
    saved: list[Tensor] = []
    given = saved_for(part, phi, saved)
    if given is None:
        return _room(phi)
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
