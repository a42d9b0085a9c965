"""Tasks of random data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from hypothesis import strategies as st
from torch import Tensor

from imaml._tasks import TaskBatch
from imaml.testing._draws import generator, normal, seeds

Kind = Literal["classification", "regression"]


def task_batches(
    *,
    inputs: int | Sequence[int] = 3,
    outputs: int = 2,
    kind: Kind = "classification",
    tasks: int | None = None,
    support: int | None = None,
    query: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> st.SearchStrategy[TaskBatch]:
    """Draw batches of tasks with normal inputs and random targets, `(input, target)` in both sets.

    Args:
        inputs: The shape of an example; a number for a vector.
        outputs: The number of classes, or of values.
        kind: "classification" for labels int64 `(tasks, examples)`, as `F.cross_entropy` wants them; "regression" for
            normal targets `(tasks, examples, outputs)`, as `F.mse_loss` does.
        tasks: How many; None draws 1 to 4.
        support: Examples of a support set; None draws 3 to 6, enough for batch statistics.
        query: Examples of a query set; None draws 3 to 6 too.
        dtype: Dtype of inputs and regression targets.

    Returns:
        A hypothesis strategy.

    Raises:
        ValueError: An unknown kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` must be one of {', '.join(get_args(Kind))}. Got {kind!r}.")
    shape = (inputs,) if isinstance(inputs, int) else tuple(inputs)
    counts = [st.integers(1, 4) if tasks is None else st.just(tasks)]
    counts += [st.integers(3, 6) if examples is None else st.just(examples) for examples in (support, query)]
    return _task_batches(counts, shape, outputs, kind, dtype)


@st.composite
def _task_batches(
    draw: st.DrawFn,
    counts: list[st.SearchStrategy[int]],
    shape: tuple[int, ...],
    outputs: int,
    kind: Kind,
    dtype: torch.dtype,
) -> TaskBatch:
    tasks, support, query = (draw(count) for count in counts)
    return batch_of_tasks(tasks, support, query, shape=shape, outputs=outputs, kind=kind, seed=draw(seeds), dtype=dtype)


def batch_of_tasks(
    tasks: int,
    support: int,
    query: int,
    *,
    shape: tuple[int, ...] = (3,),
    outputs: int = 2,
    kind: Kind = "classification",
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> TaskBatch:
    """The batch of these sizes."""
    source = generator(seed)

    def data(examples: int) -> tuple[Tensor, Tensor]:
        x = normal(source, tasks, examples, *shape, dtype=dtype)
        if kind == "regression":
            return x, normal(source, tasks, examples, outputs, dtype=dtype)
        return x, torch.randint(outputs, (tasks, examples), generator=source, device="cpu")

    return TaskBatch(support=data(support), query=data(query))
