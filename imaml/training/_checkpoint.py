"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another run."""


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside `path`, force it to the disk, and put it in place of `path` in one atomic step.

    Args:
        path: What to replace or create; its folder must exist.
        write: Writes the content to the binary stream it is given.
    """
    beside = path.with_name(path.name + ".tmp")
    with beside.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values; an interruption leaves the previous checkpoint as it was."""
    replace_file(path, lambda stream: torch.save(state, stream))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint, its tensors on the CPU; nothing but tensors and plain values is unpickled.

    Args:
        path: The file.

    Returns:
        What was saved.

    Raises:
        CheckpointError: The file is truncated, damaged or not a checkpoint.
        FileNotFoundError: There is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or not a checkpoint ({type(error).__name__}). "
            "Restore it from a copy, or train anew in another folder."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no checkpoint. Expected a dict. Got {type(state).__name__}.")
    return state
