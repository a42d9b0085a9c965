"""The run folder: configuration, metrics, checkpoint and result of one training."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from imaml.training._checkpoint import CheckpointError, load_checkpoint, replace_file, save_checkpoint
from imaml.training._trainer import StepRecord, Trainer


class RunFolder:
    """`config.json`, `metrics.jsonl`, `checkpoint.pt` and `result.json` of one training.

    Args:
        path: The folder; `create` makes a new one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: dict[str, Any]) -> RunFolder:
        """Make a new folder.

        Args:
            path: Must not exist, or be empty.
            config: Plain values; saved as `config.json` and in every checkpoint.

        Returns:
            The folder.

        Raises:
            FileExistsError: The folder is not empty.
            OSError: It cannot be made or written.
        """
        folder = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            empty = not any(path.iterdir())
            if empty:
                folder._write_json("config.json", config)
        except OSError as error:
            raise type(error)(f"The run folder {path} cannot be written ({error.strerror}). Name another.") from error
        if not empty:
            raise FileExistsError(f"The run folder {path} is not empty. Resume the run in it, or name another.")
        return folder

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run.

        Raises:
            FileNotFoundError: The folder holds no run.
            CheckpointError: `config.json` is damaged.
        """
        path = self.path / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{self.path} holds no run to resume: there is no config.json.")
        try:
            config: dict[str, Any] = json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: {error}. Train anew in another folder.") from error
        return config

    def save(self, trainer: Trainer) -> None:
        """Replace the checkpoint, atomically."""
        save_checkpoint(self.path / "checkpoint.pt", {"config": self.config, **trainer.state_dict()})

    def restore(self, trainer: Trainer, config: dict[str, Any], *, free: Collection[str] = ()) -> None:
        """Put a trainer where the checkpoint is, and cut the metrics that come after it; see `read`."""
        self.read(trainer, config, free=free)
        lines = [line for line in self._lines() if json.loads(line)["step"] <= trainer.step]
        replace_file(self.path / "metrics.jsonl", lambda stream: stream.write("".join(lines).encode()))

    def read(self, trainer: Trainer, config: dict[str, Any], *, free: Collection[str] = ()) -> None:
        """Put a trainer where the checkpoint is, and leave the folder as it is.

        Args:
            trainer: Made from `config`.
            config: Nested plain values; must equal the configuration of the checkpoint.
            free: Names of the options that may differ all the same.

        Raises:
            CheckpointError: The checkpoint is damaged, or of another configuration; what differs is named.
            FileNotFoundError: There is no checkpoint.
        """
        state = load_checkpoint(self.path / "checkpoint.pt")
        missing = {"config", *trainer.state_dict()} - state.keys()
        if missing:
            raise CheckpointError(
                f"{self.path} has a checkpoint of another version, without {', '.join(sorted(missing))}."
            )
        theirs, ours = _flat(state["config"]), _flat(config)
        differing = [name for name in ours if name not in free and ours[name] != theirs.get(name)]
        if differing:
            listing = "; ".join(f"{name} is {theirs.get(name)} there. Got {ours[name]}" for name in differing)
            raise CheckpointError(
                f"{self.path} was trained with other options: {listing}. "
                "Leave them out to resume, or train in another folder."
            )
        trainer.load_state_dict(state)

    def log(self, record: StepRecord) -> None:
        """Append a line to `metrics.jsonl`."""
        with (self.path / "metrics.jsonl").open("a") as stream:
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


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat
