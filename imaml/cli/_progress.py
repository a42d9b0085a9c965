"""What a training shows while it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from imaml.cli._memory_now import memory_now
from imaml.cli._metric import Metric
from imaml.cli._time_left import TimeLeft
from imaml.training import Evaluation, StepRecord, Trainer

_LINE_SECONDS = 15.0
_LONG = 100
"""From how many inner steps on these have a bar of their own: fewer are over before it is read."""
Show = Callable[[StepRecord], None]


@contextmanager
def progress(
    console: Console, trainer: Trainer, metric: Metric, *, label: str, left: TimeLeft | None = None
) -> Iterator[Show]:
    """A bar with loss, metric and time left, and below it speed and memory; without a terminal a line now and then.

    Args:
        console: Where to.
        trainer: Its progress is shown.
        metric: How its metric is written.
        label: Name of the training.
        left: What is left of the work that the training is a part of; None: it is all of it, and its own pace counts.

    Yields:
        What to call after every meta-step.
    """
    smooth = _Smooth()
    if not console.is_terminal:
        last_line = monotonic()

        def print_line(record: StepRecord) -> None:
            nonlocal last_line
            smooth.update(record)
            if record.val or monotonic() - last_line > _LINE_SECONDS:
                last_line = monotonic()
                done = f"{100 * min(trainer.progress, 1):3.0f} %"
                rest = f"  {left} left" if left else ""
                say(console, f"{label}  {done}  {smooth.text(record, metric)}{rest}")

        yield print_line
        return
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
        TextColumn("{task.fields[text]}"),
        TextColumn("[cyan]{task.fields[left]}") if left else TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, expand=True) as bar:
        task = bar.add_task(label, total=1.0, text="", left="")
        if trainer.engine.inner.steps >= _LONG:
            trainer.follow = _inner_bar(bar, trainer.engine.inner.steps)

        def move_bar(record: StepRecord) -> None:
            smooth.update(record)
            done = min(trainer.progress, 1)
            text = f"{smooth.text(record, metric)}\n{smooth.speed}, {memory_now(trainer.device)}"
            bar.update(task, completed=done, text=text, left=str(left or ""))

        try:
            yield move_bar
        finally:
            trainer.follow = None


def _inner_bar(bar: Progress, steps: int) -> Callable[[int, str], object]:
    """A bar below the other, of the steps of an inner loop and then of its sweep; what is to be told of each."""
    row = bar.add_task("", total=steps, text="", left="")

    def move(step: int, direction: str) -> None:
        done = step + 1 if direction == "forward" else steps - step
        bar.update(row, description=f"inner steps, {direction}", completed=done, text=f"{done} of {steps}")

    return move


def say(console: Console, text: str) -> None:
    """Print a line as it is: no colours for numbers, no breaks in paths."""
    console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def log_shown(console: Console) -> Iterator[None]:
    """Within it, what the library logs appears on the console."""
    logger = logging.getLogger("imaml")
    handler, level, propagate = _Said(console), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


class _Said(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self._console, record.getMessage())


class _Smooth:
    """Exponential averages of loss, metric and time over some twenty steps, and the last validation."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.metric = 0.0
        self.milliseconds = 0.0
        self.val: Evaluation | None = None

    def update(self, record: StepRecord) -> None:
        weight = 1.0 if self.loss is None else 0.05
        self.loss = (1 - weight) * (self.loss or 0.0) + weight * record.loss
        self.metric = (1 - weight) * self.metric + weight * record.metric
        self.milliseconds = (1 - weight) * self.milliseconds + weight * record.milliseconds
        self.val = record.val or self.val

    @property
    def speed(self) -> str:
        return f"{1000 / self.milliseconds:.3g} steps/s"

    def text(self, record: StepRecord, metric: Metric) -> str:
        val = f" val {metric.interval(self.val.mean, self.val.interval)}" if self.val else ""
        return f"step {record.step} loss {self.loss:.3f} {metric.name} {metric.text(self.metric)}{val}"
