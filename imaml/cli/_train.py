"""`imaml train`."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from time import monotonic

from rich.console import Console
from torch.distributed import ProcessGroup

from imaml.cli import _presets
from imaml.cli._conclusion import conclude
from imaml.cli._experiment import Experiment, build_engine, build_experiment
from imaml.cli._figures import save_png, training_curve
from imaml.cli._interrupt import Terminated, deferred_stop, sigterm_raised
from imaml.cli._launch import process_group, restarted
from imaml.cli._metric import Metric
from imaml.cli._options import Tracker, Train
from imaml.cli._progress import log_shown, progress, say
from imaml.cli._toml import save_toml
from imaml.training import Callback, Callbacks, RunFolder, TensorBoard, Trainer, WandB

_FREE_ON_RESUME = ("minutes", "data", "device", "threads", "on_nonfinite", "track")
_TRACKERS: dict[Tracker, Callable[[Path], Callback]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda folder: WandB(folder, project=os.environ.get("WANDB_PROJECT", "imaml")),
}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def train(options: Train) -> int:
    """Train, or continue to, the end of the plan, then test.

    The processes of `torchrun` share the tasks out; the first alone writes and prints. One that torchrun started anew
    goes on with the run that is in the folder.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code: 0, or 130 after Ctrl-C. It leaves a checkpoint, as does the SIGTERM of a scheduler.

    Raises:
        OSError: The disk is full, or a file is out of reach.
    """
    try:
        with process_group(options.machine.device) as group, sigterm_raised():
            return _train(options, group)
    except Terminated:
        if os.environ.get("RANK", "0") == "0":
            say(Console(), f"Stopped. {_how_to_continue(options)}")
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = f"{error.filename} cannot be written ({error.strerror})"
        raise OSError(f"{what}. Make room. {_how_to_continue(options)}") from error


def _how_to_continue(options: Train) -> str:
    folder = RunFolder(options.folder)
    if folder.holds(options.config, free=_FREE_ON_RESUME):
        return f"Continue with: imaml train --out {folder.path} --resume"
    return "Nothing was trained yet."


def _train(options: Train, group: ProcessGroup | None) -> int:
    experiment = build_experiment(options.episodes, options.machine)
    engine = build_engine(options.strategy, options.engine)
    model = experiment.fresh_model()
    trainer = Trainer(
        model=model,
        objective=experiment.objective(model, options.engine.adapt),
        engine=engine,
        episodes=experiment.episodes,
        plan=options.plan,
        group=group,
    )
    return _follow(options, trainer) if trainer.ranks.rank else _lead(options, trainer, experiment)


def _follow(options: Train, trainer: Trainer) -> int:
    """The part of every process but the first."""
    resumes = _resumes(options, trainer)
    with trainer.ranks.together():
        pass  # the first one gets the data
    with trainer.ranks.together():
        pass  # and the folder
    with trainer.ranks.together():
        if resumes:
            RunFolder(options.folder).read(trainer, options.config, free=_FREE_ON_RESUME)
    with deferred_stop() as stop:
        for _ in trainer:
            if trainer.ranks.any(stop() is not None):
                break
        if _agreed(trainer, stop()):
            return 0  # not 130: torchrun would kill the first process, which has yet to write
    trainer.evaluate("test", tasks=options.plan.eval_tasks)
    return 0


def _lead(options: Train, trainer: Trainer, experiment: Experiment) -> int:
    console = Console()
    resumes = _resumes(options, trainer)
    with trainer.ranks.together():
        experiment.episodes.batch("train", 0, 1)  # a missing data file or package shows before there is a folder
        callbacks = Callbacks([_TRACKERS[name](options.folder) for name in dict.fromkeys(options.track)])
    with trainer.ranks.together():
        if resumes:
            folder = RunFolder(options.folder)
            note = folder.restore(trainer, options.config, free=_FREE_ON_RESUME)
        else:
            folder, note = RunFolder.create(options.folder, options.config), None
            folder.save(trainer)
            save_toml(folder.path, options, _presets.train(options.episodes.dataset, options.strategy))
    with trainer.ranks.together():
        callbacks.start(options.config, trainer.step)  # and the others read the folder
    if note is not None:
        say(Console(stderr=True), f"imaml: {note}")
    try:
        stopped = _run(options, trainer, folder, callbacks, experiment.metric, console)
        if stopped is None:
            callbacks.end(conclude(options, trainer, folder, experiment.metric, console))
            return 0
    finally:
        callbacks.end(None)
    save_png(folder.path / "curve.png", training_curve(folder.metrics(), experiment.metric))
    say(console, f"Stopped after step {trainer.step}. {_how_to_continue(options)}")
    return 130 if stopped is SIGINT else 0


def _resumes(options: Train, trainer: Trainer) -> bool:
    return options.resume or trainer.ranks.any(restarted() and RunFolder(options.folder).holds_run)


def _agreed(trainer: Trainer, stop: Signals | None) -> Signals | None:
    """What stops all processes, if one of them was told to."""
    return next((number for number in (SIGINT, SIGTERM) if trainer.ranks.any(stop is number)), None)


def _run(
    options: Train, trainer: Trainer, folder: RunFolder, callbacks: Callbacks, metric: Metric, console: Console
) -> Signals | None:
    """Train with checkpoints to the end of the plan, or to the signal that is returned."""
    saved = monotonic()
    shown = progress(console, trainer, metric, label=options.strategy)
    with deferred_stop() as stop, log_shown(console), shown as show:
        for record in trainer:
            folder.log(record)
            callbacks.log(record)
            show(record)
            if trainer.ranks.any(stop() is not None):
                break
            if record.val or monotonic() - saved >= 60 * options.save_minutes:
                folder.save(trainer)
                saved = monotonic()
        folder.save(trainer)
        return _agreed(trainer, stop())
