"""Tasks: a support set to adapt on and a query set to judge by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from imaml._leaves import check_leaves, objects, opened, wrapped
from imaml._minibatches import Batch as Batch
from imaml._minibatches import Minibatches, stacked
from imaml._torch import tree_flatten, tree_map


def signature(tasks: Task | TaskBatch) -> tuple[Any, ...]:
    """What a task, or each of a batch, is like: one whose support set is a batch."""
    leaves, structure = tree_flatten(wrapped((tasks.support, tasks.query)))
    first = int(isinstance(tasks, TaskBatch))
    return (structure, *((leaf.shape[first:], leaf.dtype, leaf.device) for leaf in leaves))


def check_tensors(name: str, batch: Batch) -> list[Tensor]:
    """The tensors of a batch; raises TypeError where a model cannot be given a leaf, ValueError where there is none."""
    if isinstance(batch, Minibatches):
        if name != "query":
            return []  # looked at when they are fetched
        raise TypeError("`query` is one batch, which judges the adapted parameters. Got Minibatches: pass a batch.")
    if isinstance(batch, (Task, TaskBatch)):
        raise TypeError(f"Every leaf of `{name}` must be a tensor. Got {type(batch).__name__}: pass its `support`.")
    check_leaves(name, batch)
    leaves = tree_flatten(batch)[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        got = f" Got {type(batch).__name__}: pass a target beside it." if leaves else ""
        raise ValueError(f"`{name}` holds no tensor. Expected tensors such as `(input, target)`.{got}")
    return tensors


def check_constant(tasks: TaskBatch | Sequence[Task]) -> None:
    """Raise ValueError where a tensor of a task requires grad: it would get no gradient, without a word."""
    for task in [tasks] if isinstance(tasks, TaskBatch) else tasks:
        for name in ("support", "query"):
            for leaf in tree_flatten(getattr(task, name, None))[0]:  # minibatches are looked at when they are fetched
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    raise ValueError(
                        f"The tensors of a task are constants. Expected none that requires grad. Got one in `{name}`, "
                        f"of shape {tuple(leaf.shape)}: to learn it name it in Objective(..., meta={{...}}); else "
                        "detach it, and call requires_grad_() in a loss that differentiates by it."
                    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """Holds one task: a support set to adapt on and a query set to judge by, without a leading task dimension.

    A set is tensors in any nesting: tuples, lists, dicts, named tuples, and types registered with `torch.utils._pytree`
    or `torch.export.register_dataclass`. A field of a type may be None.

    An object that is no such nesting but has a method `to`, such as a batch of graphs, is passed to the model as it is.
    A task that holds one is never stacked with another, nor compiled, nor cut into slices, and what a forward pass
    writes to it stays.

    Args:
        support: What the model adapts on, `(input, target)` as a rule, or `Minibatches`, another one in each step. With
            a model objective `input` may be a tensor, a tuple or list (positional arguments) or a dict (keyword
            arguments); anything else, a named tuple too, is one argument.
        query: What the adapted model is judged by, nested likewise.

    Raises:
        TypeError: A part is of another kind, such as an array, or a tensor is nested or quantised.
        ValueError: A set holds no tensor.
    """

    support: Batch
    query: Batch

    def __post_init__(self) -> None:
        check_tensors("support", self.support)
        check_tensors("query", self.query)

    def at(self, step: int) -> Task:
        """The task as an inner step sees it: another one where its support set is minibatches."""
        if not isinstance(self.support, Minibatches):
            return self
        return Task(support=self.support.at(step), query=self.query)


@dataclass(frozen=True, kw_only=True)
class TaskBatch:
    """Holds many tasks of equal shapes, stacked: every tensor is `(tasks, ...)`.

    Args:
        support: The support sets, stacked: `(xs, ys)` with `xs: (tasks, examples, ...)` as a rule; or `Minibatches` of
            such.
        query: The query sets, stacked likewise; their number of examples may differ from that of the support.

    Raises:
        TypeError: See `Task`; or a part is an object.
        ValueError: A set holds no tensor, a tensor has no task dimension, the numbers of tasks differ, or there are
            none.
    """

    support: Batch
    query: Batch

    def __post_init__(self) -> None:
        counts: dict[str, set[int]] = {}
        for name, batch in (("support", self.support), ("query", self.query)):
            leaves = check_tensors(name, batch)
            if isinstance(batch, Minibatches):
                continue
            if any(not isinstance(leaf, Tensor) for leaf in tree_flatten(batch)[0]):
                if others := objects(batch):
                    raise TypeError(
                        f"Every leaf of `{name}` must be a tensor (tasks, ...). Got {type(others[0]).__name__}: pass a "
                        "list of Task, one for each."
                    )
                object.__setattr__(self, name, wrapped(batch))
            if any(leaf.ndim == 0 for leaf in leaves):
                raise ValueError(f"Every tensor of `{name}` must be (tasks, ...). Got a 0-dim tensor.")
            counts[name] = {leaf.shape[0] for leaf in leaves}
        if len(set[int].union(*counts.values())) > 1:
            raise ValueError(
                "Support and query must hold the same number of tasks in the first dimension of every tensor. "
                f"Got {sorted(counts.get('support', []))} in support and {sorted(counts['query'])} in query. "
                "For tasks of different sizes pass a list of Task."
            )
        if len(self) == 0:
            raise ValueError("A TaskBatch needs at least one task. Got 0.")

    def __len__(self) -> int:
        """The number of tasks."""
        query = self.query
        first = query[0] if type(query) is tuple and query else None  # asked often, of pairs as a rule
        return int((first if isinstance(first, Tensor) else tree_flatten(query)[0][0]).shape[0])

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> TaskBatch: ...

    def __getitem__(self, index: int | slice) -> Task | TaskBatch:
        """One `Task` for an integer, a smaller `TaskBatch` for a slice; both are views."""
        if isinstance(index, slice):
            if index.indices(len(self)) == (0, len(self), 1):
                return self
            return self._with(lambda batch: tree_map(lambda t: t[index], batch))
        if not -len(self) <= index < len(self):
            raise IndexError(f"Task {index} of a batch of {len(self)}.")
        support, query = self._each(lambda batch: opened(tree_map(lambda t: t[index], batch)))
        return Task(support=support, query=query)

    def at(self, step: int) -> TaskBatch:
        """The tasks as an inner step sees them: others where their support sets are minibatches.

        Args:
            step: Its number, counted from 0.

        Returns:
            Tasks whose support sets are batches.

        Raises:
            ValueError: There is none for this step, or one for another number of tasks.
        """
        if not isinstance(self.support, Minibatches):
            return self
        return TaskBatch(support=self.support.at(step), query=self.query)

    def alike(self, step: int) -> TaskBatch:
        """Tasks with a batch that stands for those of all steps from this one on."""
        return self.at(self.support.stand_in(step)) if isinstance(self.support, Minibatches) else self

    def fetched(self, step: int) -> int:
        """Bytes of a batch that a step has to fetch; 0 where the source keeps it, or the support sets are fixed."""
        if not isinstance(self.support, Minibatches):
            return 0
        one, other = self.alike(step).support, self.alike(step).support  # both at once, lest one take the other's place
        pairs = zip(tree_flatten(one)[0], tree_flatten(other)[0], strict=True)
        return sum(t.numel() * t.element_size() for t, same in pairs if t.data_ptr() != same.data_ptr())

    def _each(self, change: Callable[[Batch], Batch]) -> tuple[Any, Batch]:
        """What a function makes of the support and of the query sets."""
        support = self.support
        changed = support.map(change) if isinstance(support, Minibatches) else change(support)
        return changed, change(self.query)

    def _with(self, change: Callable[[Batch], Batch]) -> TaskBatch:
        support, query = self._each(change)
        return TaskBatch(support=support, query=query)

    def __iter__(self) -> Iterator[Task]:
        """The tasks, one by one."""
        return (self[i] for i in range(len(self)))

    def to(self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None) -> TaskBatch:
        """Return the batch on `device`, its floating-point tensors as `dtype`; labels keep their integer dtype.

        Args:
            device: Where to; None: where it is.
            dtype: What floating-point tensors become; None: they stay as they are.

        Returns:
            The batch.

        Raises:
            TypeError: A dtype for a batch that holds an object.
        """
        if others := _objects(self):
            raise TypeError(
                f"Only tensors can be copied to another dtype or device. Got {type(others[0]).__name__}: "
                "register its type once, with torch.utils._pytree.register_pytree_node, or move it before the task is "
                "made."
            )

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)

        return self._with(lambda batch: tree_map(move, batch))

    @classmethod
    def stack(cls, tasks: Sequence[Task]) -> TaskBatch:
        """Stack tasks of equal shapes into a batch; raises ValueError where the shapes differ.

        Args:
            tasks: The tasks. Where all have minibatches, those of a step are stacked when it needs them, and must be of
                equal shapes then.

        Returns:
            The batch.

        Raises:
            ValueError: The shapes differ, only some have minibatches, or several tasks hold an object each.
        """
        sources = [task.support for task in tasks if isinstance(task.support, Minibatches)]
        if sources and len(sources) < len(tasks):
            raise ValueError(
                "Only tasks that all have minibatches, or all a fixed support set, can be stacked. Got "
                f"{len(sources)} of {len(tasks)} with minibatches: pass a list of tasks."
            )
        if sources:
            queries = cls.stack([Task(support=task.query, query=task.query) for task in tasks]).query
            return cls(support=stacked(sources, _stacked_at_a_step), query=queries)
        if len({signature(task) for task in tasks}) != 1:
            raise ValueError(f"Only tasks of one shape can be stacked. Got {len(tasks)} tasks of different shapes.")
        if len(tasks) > 1 and (others := _objects(tasks[0])):
            raise ValueError(
                f"Only tasks of tensors can be stacked. Got {len(tasks)} tasks with a {type(others[0]).__name__} each."
            )
        return cls(support=_stacked([t.support for t in tasks]), query=_stacked([t.query for t in tasks]))


def _stacked(batches: list[Batch]) -> Batch:
    batches = [wrapped(batch) for batch in batches]
    columns = zip(*(tree_flatten(batch)[0] for batch in batches), strict=True)
    return tree_flatten(batches[0])[1].unflatten([torch.stack(column) for column in columns])


def _stacked_at_a_step(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return tree_map(lambda t: t.unsqueeze(0), wrapped(batches[0]))  # no copy of what is fetched step by step
    return TaskBatch.stack([Task(support=batch, query=batch) for batch in batches]).support


def _objects(tasks: Task | TaskBatch) -> list[Any]:
    fixed = tasks.query if isinstance(tasks.support, Minibatches) else (tasks.support, tasks.query)
    return objects(fixed)


def group(tasks: TaskBatch | Sequence[Task]) -> list[tuple[list[int], TaskBatch]]:
    """Partition tasks into batches of equal shapes, each with the positions of its tasks in the input."""
    if isinstance(tasks, TaskBatch):
        return [(list(range(len(tasks))), tasks)]
    if not isinstance(tasks, Sequence) or not all(isinstance(t, Task) for t in tasks):
        items = sorted({type(t).__name__ for t in tasks}) if isinstance(tasks, Sequence) else []
        of = f" of {', '.join(items)}" if items else ""
        raise TypeError(f"Expected a TaskBatch or a list of Task. Got {type(tasks).__name__}{of}.")
    if not tasks:
        raise ValueError("Expected at least one task. Got an empty list.")
    positions: dict[tuple[Any, ...], list[int]] = {}
    for i, task in enumerate(tasks):
        alone = isinstance(task.support, Minibatches) or _objects(task)
        positions.setdefault((i,) if alone else signature(task), []).append(i)
    return [(where, TaskBatch.stack([tasks[i] for i in where])) for where in positions.values()]
