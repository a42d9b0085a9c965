"""A plain PyTorch loop: any optimiser, a schedule, clipping, and meta-gradients accumulated over several batches."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from imaml import MAML, GradientDescent, MetaGradient, Objective, TaskBatch
from imaml.data import Sinusoid
from imaml.models import MLP


def accumulate(engine: MetaGradient, objective: Objective, batches: list[TaskBatch]) -> float:
    """Add to `.grad` the mean over all the batches' tasks, and return their mean query loss."""
    total = 0.0
    for tasks in batches:
        loss = engine(objective, tasks).loss / len(batches)
        loss.backward()
        total += loss.item()
    return total


def batches(episodes: Sinusoid, *, steps: int, per_step: int, tasks: int) -> Iterable[list[TaskBatch]]:
    """What each step accumulates over: `per_step` batches of `tasks` tasks."""
    for step in range(steps):
        yield [episodes.batch("train", step * per_step + i, tasks) for i in range(per_step)]


def main(steps: int = 100) -> tuple[float, float]:
    """Train on sinusoids; returns the query loss on unseen ones before and after."""
    torch.manual_seed(0)
    model = MLP()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    objective = Objective(model, F.mse_loss)
    engine = MAML(inner=GradientDescent(lr=0.01, steps=3))
    episodes = Sinusoid()
    unseen = episodes.batch("test", 0, 100)

    with torch.no_grad():  # then a call only evaluates
        before = engine(objective, unseen).loss.item()
    for group in batches(episodes, steps=steps, per_step=2, tasks=8):
        optimizer.zero_grad()
        accumulate(engine, objective, group)
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=10.0)
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        return before, engine(objective, unseen).loss.item()


if __name__ == "__main__":
    print("query loss on unseen sinusoids: {:.2f} before, {:.2f} after".format(*main()))
