"""The run folder: configuration, metrics, checkpoint and result of one training."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from imaml._engine.files import make_folder, naming, replace_file
from imaml._errors import CheckpointError
from imaml.training._alike import check_alike
from imaml.training._checkpoint import load_checkpoint, previous_checkpoint, save_checkpoint
from imaml.training._trainer import StepRecord, Trainer


class RunFolder:
    """Keeps the files of one training in a folder that outlives interruptions.

    They are `config.json`, `metrics.jsonl`, `checkpoint.pt` with the one before, and `result.json`; `imaml train` adds
    the model by `save_model`, with its card. However a process ends, the folder holds a whole checkpoint or is at its
    start, and half a line of metrics at most.

    Args:
        path: The folder; `create` makes a new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Make a new folder.

        Args:
            path: Must not exist, or be empty but for what a process that was killed had begun to write.
            config: Plain values; saved as `config.json` and in every checkpoint.

        Returns:
            The folder.

        Raises:
            FileExistsError: The folder is not empty.
            OSError: It cannot be made or written.
        """
        folder = cls(path)
        make_folder(path)
        if not all(file.suffix == ".tmp" for file in path.iterdir()):
            raise FileExistsError(f"The run folder {path} is not empty. Resume the run in it, or name another.")
        folder._write_json("config.json", config)
        return folder

    @property
    def holds_run(self) -> bool:
        """Whether `create` has been here."""
        return (self.path / "config.json").is_file()

    def holds(self, config: dict[str, Any], *, free: Collection[str] = ()) -> bool:
        """Whether the run in the folder has this configuration; `free` as for `read`."""
        try:
            check_alike(self.path, self.config, config, free)
        except (FileNotFoundError, CheckpointError):
            return False
        return True

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run.

        Raises:
            FileNotFoundError: The folder holds no run.
            CheckpointError: `config.json` is damaged.
        """
        path = self.path / "config.json"
        if not self.holds_run:
            raise FileNotFoundError(f"{self.path} holds no run to resume: there is no config.json.")
        try:
            config: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}. Train anew in another folder.") from error
        return config

    def save(self, trainer: Trainer) -> None:
        """Replace the checkpoint, atomically, and keep the one before."""
        save_checkpoint(self._checkpoint, {"config": self.config, **trainer.state_dict()})

    def restore(self, trainer: Trainer, config: dict[str, Any], *, free: Collection[str] = ()) -> str | None:
        """Put a trainer where the checkpoint is, and cut the metrics that come after it; see `read`.

        Returns:
            As `read`; the checkpoint before is then in the place of the one that was of no use.
        """
        note = self.read(trainer, config, free=free)
        if note is not None:
            os.replace(previous_checkpoint(self._checkpoint), self._checkpoint)
        lines = [line for line in self._lines() if json.loads(line)["step"] <= trainer.step]
        replace_file(self.path / "metrics.jsonl", lambda stream: stream.write("".join(lines).encode()))
        return note

    def read(self, trainer: Trainer, config: dict[str, Any], *, free: Collection[str] = ()) -> str | None:
        """Put a trainer where the checkpoint is, and leave the folder as it is.

        A run that was killed before its first checkpoint is at its start. Where the checkpoint is truncated, damaged or
        missing, the one before it counts.

        Args:
            trainer: Made from `config`.
            config: Nested plain values; must equal the configuration of the checkpoint.
            free: Names of the options that may differ all the same.

        Returns:
            None, or what to tell the user of a checkpoint that was of no use.

        Raises:
            CheckpointError: Both checkpoints are damaged, or it is of another configuration; what differs is named.
            FileNotFoundError: The folder holds no run.
        """
        state, note = self._newest()
        if state is None:
            check_alike(self.path, self.config, config, free)
            return None
        missing = {"config", *trainer.state_dict()} - state.keys()
        if missing:
            raise CheckpointError(
                f"{self.path} has a checkpoint of another version, without {', '.join(sorted(missing))}."
            )
        check_alike(self.path, state["config"], config, free)
        trainer.load_state_dict(state)
        return note

    def _newest(self) -> tuple[dict[str, Any] | None, str | None]:
        """The state of the last whole checkpoint, None before the first; and a note where it is not the last."""
        path, before = self._checkpoint, previous_checkpoint(self._checkpoint)
        try:
            return load_checkpoint(path), None
        except FileNotFoundError:
            if not before.is_file():
                return None, None
            what = "missing"
        except CheckpointError:
            if not before.is_file():
                raise
            what = "truncated or damaged"
        state = load_checkpoint(before)
        return state, f"{path} is {what}. Continuing from the checkpoint before it, of step {state.get('step')}."

    @property
    def _checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    def log(self, record: StepRecord) -> None:
        """Append a line to `metrics.jsonl`; raises OSError where it cannot, as on a full disk."""
        path = self.path / "metrics.jsonl"
        with naming(path), path.open("a") as stream:
            stream.write(json.dumps(record.to_json()) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """The logged steps."""
        return [json.loads(line) for line in self._lines()]

    def write_result(self, result: dict[str, Any]) -> None:
        """Write `result.json`."""
        self._write_json("result.json", result)

    def _lines(self) -> list[str]:
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [line for line in lines if line.endswith("\n")]  # a killed process may leave half a line

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, default=str) + "\n"
        replace_file(self.path / name, lambda stream: stream.write(text.encode()))
