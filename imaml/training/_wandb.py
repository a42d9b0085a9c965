"""Curves in Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

from imaml._engine.files import replace_file
from imaml.data._extras import optional
from imaml.training._callbacks import numbers, of_test
from imaml.training._trainer import StepRecord

_ID = "wandb-id.txt"


class WandB:
    """Sends the numbers of a training to Weights & Biases, as one run that goes on where the training does.

    The id of the run is kept in a file of the run folder, `wandb-id.txt`. Steps that the service has already, from a
    process that was lost, are not sent again: they are the same. Who sends, where to and whether at all is told by the
    variables of wandb's own, such as WANDB_MODE.

    Args:
        folder: The run folder; its name is that of the run, and wandb keeps its files there.
        settings: Further arguments of `wandb.init`, such as `project`.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, folder: Path, **settings: Any) -> None:
        wandb = optional("wandb", "WandB", extra="tracking")
        self._init, self._folder, self._settings = wandb.init, folder, settings

    def start(self, config: dict[str, Any], step: int) -> None:
        """Begin the run, or take it up by its id; see `Callback.start`."""
        file = self._folder / _ID
        if not file.exists():
            replace_file(file, lambda stream: stream.write(uuid4().hex[:12].encode()))
        own = {"name": self._folder.resolve().name, "dir": str(self._folder), "config": config}
        self._run = self._init(id=file.read_text(), resume="allow", **(own | self._settings))
        self._first = self._run.starting_step  # above what the service has

    def log(self, record: StepRecord) -> None:
        """Send every number of a record, unless the service has this step."""
        if record.step >= self._first:
            values = numbers(record.to_json())
            self._run.log({name: value for name, value in values.items() if name != "step"}, step=record.step)

    def end(self, result: dict[str, Any] | None) -> None:
        """Send the test as the summary of the run, and end it."""
        if result is not None:
            self._run.summary.update(of_test(result))
        self._run.finish()
