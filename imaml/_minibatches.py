"""Another batch in each inner step, from a source that can be asked again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from imaml._leaves import check_leaves
from imaml._numbers import check_integer
from imaml._torch import tree_flatten, tree_leaves, tree_map

Batch = Any
"""What a loss is evaluated on: tensors in any nesting of tuples, lists, dicts and other types that
`torch.utils._pytree` knows, `(input, target)` as a rule."""
_SEEDS = 2**31
"""How many epochs there are to a seed before those of the next."""


class Minibatches:
    """Gives every inner step a batch of its own, where it stands as the `support` of a `Task` or `TaskBatch`.

    A batch is fetched when a step needs it, and again when the reverse sweep comes back to the step: the source must
    give the same one then, which a checksum of its bits tells. At most two batches are held at a time, and those of the
    steps whose graphs are kept.

    Steps are counted from 0, through all calls of a training that goes on from a state (`start=`).

    `ImplicitMAML` needs the loss as a whole at the end of the inner loop: it is the mean over all examples of the
    source, each batch counting by how many it has, or over `ImplicitMAML(curvature_batches=m)` of its batches.

    The tasks of a list that have minibatches run one by one. Those of a `TaskBatch` are vectorised: there every tensor
    of a batch is `(tasks, examples, ...)`.

    Args:
        source: A sequence of batches, of which step k takes the k-th; or a function `step -> batch`. It must be one:
            no iterator, which could not be asked again, and without a state of its own. Every batch has memory of its
            own: one buffer that is written anew for each step would change batches that are still in use.

    Raises:
        TypeError: `source` is an iterator, such as that of a DataLoader, or a data set, whose items are examples and no
            batches, or neither of both.
    """

    examples: int | None = None
    """How many examples there are in all, where that is known."""
    says_indices: bool | None = None
    """Whether batches carry the indices of their examples; None: that was left open."""

    def __init__(self, source: Sequence[Batch] | Callable[[int], Batch]) -> None:
        if isinstance(source, (Dataset, Mapping)):
            raise TypeError(
                "The items of a source are batches, one a step. Expected a sequence of batches or a function of the "
                f"step. Got {type(source).__name__}: of a data set of examples make Minibatches.of(dataset, "
                "batch_size=...); where its items are batches, pass dataset.__getitem__."
            )
        if not callable(source) and not (isinstance(source, Sized) and hasattr(source, "__getitem__")):
            remedy = "Minibatches(list(loader)), or Minibatches.of(loader.dataset, batch_size=...)"
            raise TypeError(
                "A source of minibatches is asked again for the batch of a step, which an iterator cannot give. "
                "Expected a sequence of batches or a function of the step. Got "
                f"{type(source).__name__}: wrap it as {remedy}."
            )
        self._get: Callable[[int], Batch] = source if callable(source) else source.__getitem__
        self._get_of_all = self._get
        self.length: int | None = None if callable(source) else len(source)
        """How many batches there are; None for a source without an end."""
        self.length_of_all = self.length
        """How many batches hold every example once; None where that is not known."""

    @classmethod
    def of(
        cls,
        dataset: Any,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        collate_fn: Callable[[list[Any]], Batch] | None = None,
        indices: bool | None = None,
        tasks: bool = False,
    ) -> Minibatches:
        """Epoch after epoch of a data set, in an order that is a function of the seed and of the epoch alone.

        So sweeps, resumed runs and ranks agree on the batch of a step. While a data set is asked for the examples of a
        step, the global generators of torch, Python and NumPy are seeded for this step, so that random augmentations
        agree too; the user's are not touched.

        Args:
            dataset: Tensors that hold the examples in their first dimension, one or a tuple or dict of them; or a
                map-style `torch.utils.data.Dataset`, or whatever else has a length and examples by index, a list too.
            batch_size: Examples of a batch.
            seed: Says the order, and what a data set draws; >= 0.
            shuffle: Draw a new order in each epoch; False: as they stand.
            drop_last: Leave out the last batch of an epoch where it is not full.
            collate_fn: From a list of examples of the data set to a batch; None: `default_collate`. Not for tensors.
            indices: Whether a batch carries the indices of its examples, `(examples,)` integers, for a weight per
                example: a batch `(input, target)` becomes `(input, (target, indices))`, any other `(batch, indices)`.
                None: it does not, and a meta-parameter of as many entries as there are examples is an error.
            tasks: Whether the tensors are `(tasks, examples, ...)`, for a `TaskBatch`; all tasks then see the examples
                of the same indices.

        Returns:
            The minibatches.

        Raises:
            TypeError: The data set is an `IterableDataset`, a tuple or dict of something else than tensors, or nothing
                of the above.
            ValueError: It is empty, its tensors differ in their number of examples, or no batch is full.
        """
        if isinstance(dataset, (tuple, Mapping)) and not _is_stacked(dataset):
            kinds = sorted({type(leaf).__name__ for leaf in tree_leaves(dataset)})
            raise TypeError(
                "A tuple or dict holds the examples of a data set stacked. Expected tensors in it. Got "
                f"{type(dataset).__name__} of {kinds}: convert arrays with torch.as_tensor, pass dict(...) of another "
                "mapping, and single examples as a list."
            )
        check_integer("`batch_size`", batch_size, least=1)
        check_integer("`seed`", seed, least=0)
        data = _Stacked(dataset, int(tasks)) if _is_stacked(dataset) else _Dataset(dataset, collate_fn, seed)
        if isinstance(data, _Dataset) and tasks:
            raise TypeError(
                "tasks=True is for tensors (tasks, examples, ...). Got a "
                f"{type(dataset).__name__}: make one Minibatches for each task, and TaskBatch.stack of their tasks."
            )
        if isinstance(data, _Stacked) and collate_fn is not None:
            raise TypeError(
                "`collate_fn` makes a batch of single examples. Got tensors, which are indexed: leave it out."
            )
        size = data.examples
        if size == 0 or drop_last and size < batch_size:
            raise ValueError(
                f"Expected at least one batch of {batch_size} examples. Got {size} examples in the data set."
            )
        order = _Order(size, batch_size, seed, shuffle=shuffle, drop_last=drop_last)

        def batch(step: int, which: Tensor) -> Batch:
            found = data.batch(step, which)
            return _with(found, data.like(which)) if indices else found

        self = cls(lambda step: batch(step, order.at(step)))
        self._get_of_all = lambda i: batch(i, torch.arange(i * batch_size, min((i + 1) * batch_size, size)))
        self.length_of_all = -(-size // batch_size)
        self.examples, self.says_indices = size, indices
        return self

    def at(self, step: int) -> Batch:
        """The batch of an inner step; raises ValueError where there is none."""
        if self.length is not None and step >= self.length:
            raise ValueError(
                f"The source of minibatches ends before inner step {step}. Expected one batch for each step. Got "
                f"{self.length}: pass more, or a function of the step that begins again, such as "
                "lambda step: batches[step % len(batches)]."
            )
        try:
            batch = self._get(step)
        except (IndexError, StopIteration) as error:
            raise ValueError(
                f"The source of minibatches has no batch for inner step {step} ({type(error).__name__}: {error}). "
                "Expected one for each step."
            ) from error
        return _checked(batch, f"support at inner step {step}")

    def stand_in(self, step: int) -> int:
        """The step itself, or the last that there is a batch for: a call that takes no step needs none of its own."""
        return step if self.length is None else max(min(step, self.length - 1), 0)

    def of_all(self, i: int) -> Batch:
        """The i-th of the `length_of_all` batches that hold every example once."""
        return _checked(self._get_of_all(i), f"support of batch {i}")

    def map(self, function: Callable[[Batch], Batch]) -> Minibatches:
        """Minibatches of what a function makes of each."""
        mapped, get, get_of_all = copy(self), self._get, self._get_of_all
        mapped._get = lambda step: function(get(step))
        mapped._get_of_all = lambda i: function(get_of_all(i))
        return mapped

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> Minibatches:
        """Minibatches on `device`, their floating-point tensors as `dtype`; each is moved when it is fetched."""

        def move(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.to(device=device, dtype=dtype if leaf.is_floating_point() else None)

        return self.map(lambda batch: tree_map(move, batch))

    def __repr__(self) -> str:
        """How many there are, as far as that is known."""
        of = "" if self.examples is None else f" of {self.examples} examples"
        return f"Minibatches({'endless' if self.length is None else self.length}{of})"


def stacked(sources: Sequence[Minibatches], stack: Callable[[list[Batch]], Batch]) -> Minibatches:
    """The minibatches of several tasks as those of one batch of tasks.

    Args:
        sources: One for each.
        stack: Makes one batch of those that the tasks see at a step.

    Returns:
        The minibatches, with an end where any has one.
    """
    first, both = copy(sources[0]), [source.length for source in sources if source.length is not None]
    first._get = lambda step: stack([source.at(step) for source in sources])
    first._get_of_all = lambda i: stack([source.of_all(i) for source in sources])
    first.length = min(both, default=None)
    if len({source.length_of_all for source in sources}) > 1:
        first.length_of_all = None
    return first


def batch_at(support: Batch | Minibatches, step: int) -> Batch:
    """What an inner step sees of a support set."""
    return support.at(step) if isinstance(support, Minibatches) else support


def batch_like(support: Batch | Minibatches, step: int) -> Batch:
    """A batch that stands for what the inner steps from this one on see."""
    return support.at(support.stand_in(step)) if isinstance(support, Minibatches) else support


class _Order:
    """Which examples a step sees."""

    def __init__(self, examples: int, batch_size: int, seed: int, *, shuffle: bool, drop_last: bool) -> None:
        self._examples, self._size, self._seed, self._shuffle = examples, batch_size, seed, shuffle
        self._steps = examples // batch_size if drop_last else -(-examples // batch_size)
        self._drawn: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Tensor:
        epoch, first = step // self._steps, step % self._steps * self._size
        return self._epoch(epoch)[first : first + self._size]

    def _epoch(self, epoch: int) -> Tensor:
        if not self._shuffle:
            return torch.arange(self._examples)
        if self._drawn is None or self._drawn[0] != epoch:
            generator = torch.Generator().manual_seed(_mixed(self._seed, epoch))
            self._drawn = epoch, torch.randperm(self._examples, generator=generator)
        return self._drawn[1]


class _Stacked:
    """Tensors that hold the examples in one of their dimensions."""

    def __init__(self, tensors: Any, dim: int) -> None:
        leaves = tree_leaves(tensors)
        sizes = {t.shape[dim] if t.ndim > dim else -1 for t in leaves}
        if len(sizes) != 1 or -1 in sizes:
            found = sorted({tuple(t.shape) for t in leaves})
            raise ValueError(
                f"Every tensor of the data set must hold the examples in dimension {dim}. Expected one number of "
                f"examples. Got tensors of shapes {found}."
            )
        self._tensors, self._dim = tensors, dim
        self.examples: int = leaves[0].shape[dim]
        self._tasks = leaves[0].shape[0] if dim else None
        self._device = leaves[0].device

    def batch(self, step: int, which: Tensor) -> Batch:
        return tree_map(lambda t: t.index_select(self._dim, which.to(t.device)), self._tensors)

    def like(self, which: Tensor) -> Tensor:
        which = which.to(self._device)
        return which if self._tasks is None else which.expand(self._tasks, -1)


class _Dataset:
    """Examples by index."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Batch] | None, seed: int) -> None:
        is_map = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if isinstance(dataset, IterableDataset) or not is_map:
            raise TypeError(
                "A data set is asked for examples by their indices, in any order and again. Expected tensors, or a "
                "map-style torch.utils.data.Dataset with __getitem__ and __len__. Got "
                f"{type(dataset).__name__}: make a list of it, or pass Minibatches a function of the step."
            )
        self._dataset, self._seed, self._collate = dataset, seed, collate_fn or default_collate

    @property
    def examples(self) -> int:
        return len(self._dataset)

    def batch(self, step: int, which: Tensor) -> Batch:
        indices = which.tolist()
        with _seeded(_mixed(self._seed, step)):
            if hasattr(self._dataset, "__getitems__"):
                return self._collate(self._dataset.__getitems__(indices))
            return self._collate([self._dataset[i] for i in indices])

    def like(self, which: Tensor) -> Tensor:
        return which


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within it the generators of torch on the host, Python and NumPy are seeded; they are as before after it."""
    before, numpys = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed([seed % 2**32, seed >> 32])  # noqa: NPY002
            yield
    finally:
        random.setstate(before)
        np.random.set_state(numpys)  # noqa: NPY002


def _mixed(seed: int, count: int) -> int:
    return (seed * _SEEDS + count) % 2**63


def _is_stacked(dataset: Any) -> bool:
    """Whether it is tensors; a list is a data set of examples, as torch has it."""
    if not isinstance(dataset, (Tensor, tuple, dict)):
        return False
    leaves = tree_flatten(dataset)[0]
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)


def _with(batch: Batch, indices: Tensor) -> Batch:
    if type(batch) in (tuple, list) and len(batch) == 2:
        return batch[0], (batch[1], indices)
    return batch, indices


def _checked(batch: Batch, name: str) -> Batch:
    check_leaves(name, batch)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ValueError(f"`{name}` holds no tensor. Expected tensors such as `(input, target)`.")
    if any(t.requires_grad for t in tensors):
        raise ValueError(
            f"The tensors of a minibatch are constants. Expected none that requires grad. Got one in `{name}`: to "
            "learn it name it in Objective(..., meta={...}), and index it in the loss; else detach it."
        )
    return batch
