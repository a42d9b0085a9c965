"""`imaml train`."""

from __future__ import annotations

from dataclasses import asdict
from time import monotonic

from rich.console import Console
from torch.distributed import ProcessGroup

from imaml.cli._environment import environment
from imaml.cli._figures import save_png, training_curve
from imaml.cli._interrupt import deferred_interrupt
from imaml.cli._launch import process_group
from imaml.cli._metric import Metric
from imaml.cli._options import Train
from imaml.cli._problem import Problem, build_engine, build_problem
from imaml.cli._progress import progress, say
from imaml.training import RunFolder, Trainer

_CHECKPOINT_SECONDS = 60.0
_FREE_ON_RESUME = ("minutes", "data", "device", "threads")


def train(options: Train) -> int:
    """Train, or continue to, the end of the plan, then test.

    The processes of `torchrun` share the tasks out; the first alone writes and prints.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code: 0, or 130 after Ctrl-C, which leaves a checkpoint.
    """
    with process_group(options.machine.device) as group:
        return _train(options, group)


def _train(options: Train, group: ProcessGroup | None) -> int:
    problem = build_problem(options.episodes, options.machine)
    engine = build_engine(options.strategy, options.engine)
    model = problem.fresh_model()
    trainer = Trainer(
        model=model,
        objective=problem.objective(model, options.engine.adapt),
        engine=engine,
        episodes=problem.episodes,
        plan=options.plan,
        group=group,
    )
    return _follow(options, trainer) if trainer.ranks.rank else _lead(options, trainer, problem)


def _follow(options: Train, trainer: Trainer) -> int:
    """The part of every process but the first."""
    with trainer.ranks.together():
        pass  # the first one gets the data
    with trainer.ranks.together():
        if options.resume:
            RunFolder(options.folder).read(trainer, options.config, free=_FREE_ON_RESUME)
    with deferred_interrupt() as interrupted:
        for _ in trainer:
            if trainer.ranks.any(interrupted()):
                break
        if trainer.ranks.any(interrupted()):
            return 0  # not 130: torchrun would kill the first process, which has yet to write
    trainer.evaluate("test", tasks=options.plan.eval_tasks)
    return 0


def _lead(options: Train, trainer: Trainer, problem: Problem) -> int:
    console = Console()
    with trainer.ranks.together():
        problem.episodes.batch("train", 0, 1)  # a missing data file shows before there is a folder
    with trainer.ranks.together():
        if options.resume:
            folder = RunFolder(options.folder)
            folder.restore(trainer, options.config, free=_FREE_ON_RESUME)
        else:
            folder = RunFolder.create(options.folder, options.config)
            folder.save(trainer)
    if not _run(trainer, folder, problem.metric, console, options.strategy):
        save_png(folder.path / "curve.png", training_curve(folder.metrics(), problem.metric))
        say(
            console,
            f"Stopped after step {trainer.step}. Continue with: imaml train --out {folder.path} --resume",
        )
        return 130
    _conclude(options, trainer, folder, problem.metric, console)
    return 0


def _run(trainer: Trainer, folder: RunFolder, metric: Metric, console: Console, label: str) -> bool:
    """Train with checkpoints to the end of the plan, or to Ctrl-C: then the answer is False."""
    saved = monotonic()
    with deferred_interrupt() as interrupted, progress(console, trainer, metric, label=label) as show:
        for record in trainer:
            folder.log(record)
            show(record)
            if trainer.ranks.any(interrupted()):
                break
            if record.val or monotonic() - saved > _CHECKPOINT_SECONDS:
                folder.save(trainer)
                saved = monotonic()
        folder.save(trainer)
        return not trainer.ranks.any(interrupted())


def _conclude(options: Train, trainer: Trainer, folder: RunFolder, metric: Metric, console: Console) -> None:
    with console.status("Testing"):
        test = trainer.evaluate("test", tasks=options.plan.eval_tasks)
    folder.write_result(
        {
            "metric": metric.name,
            **asdict(test),
            "steps": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "processes": trainer.ranks.size,
            **environment(),
            "config": options.config,
        }
    )
    save_png(folder.path / "curve.png", training_curve(folder.metrics(), metric))
    say(
        console,
        f"Test {metric.name} {metric.interval(test.mean, test.interval)} (95 % interval, {test.tasks} tasks) "
        f"after {trainer.step} steps in {trainer.seconds / 60:.1f} minutes. Written to {folder.path}",
    )
    _explain_solves(folder, console)


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
