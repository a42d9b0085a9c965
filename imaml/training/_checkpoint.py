"""Checkpoints of a training, the last one and the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imaml._engine.files import load_tensors, save_tensors
from imaml._errors import CheckpointError


def previous_checkpoint(path: Path) -> Path:
    """Where `save_checkpoint` keeps the checkpoint before the one at `path`: `NAME.previous.pt` for `NAME.pt`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values, and keep the checkpoint before, so that one of the two is whole at every instant.

    Args:
        path: The file.
        state: What to save.

    Raises:
        OSError: It cannot be written, as on a full disk; both files are as they were.
    """
    save_tensors(path, state, keep=previous_checkpoint(path))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, its tensors on the CPU; nothing but tensors and plain values is unpickled.

    Args:
        path: The file.

    Returns:
        What was saved.

    Raises:
        CheckpointError: The file is truncated, damaged (by its checksums) or not a checkpoint.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    state = load_tensors(path, "Restore it from a copy, or train anew in another folder.")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no checkpoint. Expected a dict. Got {type(state).__name__}.")
    return state
