"""The end of `imaml train`: the test, and what the user should know of the training."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import safetensors  # noqa: F401  (where it is missing the program says so before a training, not after)
from rich.console import Console

from imaml.cli._card import write_card
from imaml.cli._environment import environment
from imaml.cli._figures import save_png, training_curve
from imaml.cli._metric import Metric
from imaml.cli._options import Train
from imaml.cli._progress import say
from imaml.training import RunFolder, Trainer, save_model


def conclude(options: Train, trainer: Trainer, folder: RunFolder, metric: Metric, console: Console) -> dict[str, Any]:
    """Test, write the result, its curve and the model with its card, and print the result, which is returned."""
    with console.status("Testing"):
        test = trainer.evaluate("test", tasks=options.plan.eval_tasks)
    result = {
        "metric": metric.name,
        **asdict(test),
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "processes": trainer.ranks.size,
        **environment(),
        "config": options.config,
    }
    folder.write_result(result)
    save_png(folder.path / "curve.png", training_curve(folder.metrics(), metric))
    save_model(folder.path, trainer.model)
    write_card(options, trainer, folder, metric, test)
    say(
        console,
        f"Test {metric.name} {metric.interval(test.mean, test.interval)} (95 % interval, {test.tasks} tasks) "
        f"after {trainer.step} steps in {trainer.seconds / 60:.1f} minutes. Written to {folder.path}",
    )
    _explain_solves(folder, console)
    _count_skipped(folder, test.skipped, console)
    return result


def _explain_solves(folder: RunFolder, console: Console) -> None:
    """Say how many linear solves ended early, and what to change."""
    ends = [record["solver"]["status"] for record in folder.metrics() if "solver" in record]
    solves = sum(sum(counts.values()) for counts in ends)
    broken = sum(counts.get("breakdown", 0) + counts.get("nonfinite", 0) for counts in ends)
    if broken:
        say(
            console,
            f"{100 * broken / solves:.1f} % of the solves met negative curvature and ended at their last good "
            "iterate: a larger --regularization makes the meta-gradient more exact.",
        )


def _count_skipped(folder: RunFolder, in_test: int, console: Console) -> None:
    skipped = sum(record.get("skipped", 0) for record in folder.metrics())
    if skipped or in_test:
        say(console, f"Skipped as not finite: {skipped} tasks of the training and {in_test} of the test.")
