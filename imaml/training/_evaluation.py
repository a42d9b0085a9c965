"""The mean metric over many tasks, with its confidence interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from imaml import MetaGradient, Objective, Report, Task, TaskBatch
from imaml.data import Split
from imaml.training._ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_CHUNK = 20  # fixed, so that the tasks of an evaluation do not depend on an option


class Episodes(Protocol):
    """Gives tasks to a training or an evaluation, such as the episodes of `imaml.data`."""

    def batch(self, split: Split, index: int, tasks: int, rows: range | None = None) -> TaskBatch:
        """Rows of batch `index` of "train", "val" or "test", all by default: a function of these and the seed alone."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Holds the mean of a metric over many tasks, with its confidence interval.

    Args:
        mean: Mean of the metric over tasks.
        interval: Half-width of its 95 % confidence interval, `1.96 * std / sqrt(tasks)`.
        tasks: Number of tasks that count.
        skipped: Number of those that an engine with `on_nonfinite="skip"` left out.
    """

    mean: float
    interval: float
    tasks: int
    skipped: int = 0


def evaluate(
    engine: MetaGradient,
    objective: Objective,
    episodes: Episodes,
    split: Split,
    *,
    tasks: int,
    device: torch.device | str = "cpu",
    group: ProcessGroup | None = None,
) -> Evaluation:
    """Adapt to the first `tasks` tasks of a split and average the metric of `objective` on their query sets.

    The tasks are batches 0, 1, ... of 20 tasks, the same in every call. No meta-gradient is computed: the cost
    is that of the inner loop.

    Args:
        engine: Its inner loop adapts.
        objective: Must have a `metric`.
        episodes: Where the tasks come from.
        split: "val" or "test" as a rule.
        tasks: How many.
        device: Where the model lives.
        group: The processes that share the tasks out, each of which must make the same call; None: this one alone.

    Returns:
        Mean and interval, the same on every rank.

    Raises:
        ValueError: The objective has no metric.
    """
    ranks = Ranks(group, device)
    values: list[torch.Tensor] = []
    for index, start in enumerate(range(0, tasks, _CHUNK)):
        size = min(_CHUNK, tasks - start)
        own = draw(episodes, split, index, size, ranks)
        with torch.no_grad():
            report = engine(objective, own, group=group).report
            values.append(ranks.gather(torch.stack([task_metrics(report).double(), were_skipped(report)], 1), size))
    metrics, skipped = torch.cat(values).T
    metrics = metrics[skipped == 0]
    count = len(metrics)
    spread = metrics.std().item() if count > 1 else float("inf")
    return Evaluation(
        mean=metrics.mean().item(), interval=1.96 * spread / count**0.5, tasks=count, skipped=tasks - count
    )


def draw(episodes: Episodes, split: Split, index: int, tasks: int, ranks: Ranks) -> TaskBatch | list[Task]:
    """This rank's tasks of batch `index`, on its device."""
    rows = ranks.rows(tasks)
    return episodes.batch(split, index, tasks, rows).to(ranks.device) if rows else []


def task_metrics(report: Report) -> torch.Tensor:
    """The metric of every task; a ValueError where the objective has none."""
    if report.metric is None:
        raise ValueError("Training and evaluation need an Objective with a `metric`, such as its accuracy. Got None.")
    return report.metric


def were_skipped(report: Report) -> torch.Tensor:
    """1 for every task that was skipped, else 0, in float64."""
    flags = torch.zeros_like(report.query_loss, dtype=torch.float64)
    flags[list(report.skipped)] = 1
    return flags
