"""Curves in TensorBoard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from imaml.training._callbacks import numbers, of_test
from imaml.training._trainer import StepRecord


class TensorBoard:
    """Writes the numbers of a training as scalars that TensorBoard shows, and its configuration as text.

    A run that goes on writes into the same folder, and hides what was logged after the step that it goes on from, so
    that no step shows twice.

    Args:
        folder: Where the event files come; a run folder holds them beside its own.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard needs tensorboard: pip install 'imaml[tracking]'") from error
        self._make, self._folder = SummaryWriter, folder

    def start(self, config: dict[str, Any], step: int) -> None:
        """Open an event file; see `Callback.start`."""
        self._writer = self._make(str(self._folder), purge_step=step + 1 if step else None)
        if not step:
            text = json.dumps(config, indent=2, default=str)
            self._writer.add_text("config", f"```\n{text}\n```")

    def log(self, record: StepRecord) -> None:
        """Write every number of a record."""
        for name, value in numbers(record.to_json()).items():
            if name != "step":
                self._writer.add_scalar(name, value, record.step)

    def end(self, result: dict[str, Any] | None) -> None:
        """Write the test at the last step, and close the file."""
        if result is not None:
            for name, value in of_test(result).items():
                self._writer.add_scalar(name, value, result["steps"])
        self._writer.close()
