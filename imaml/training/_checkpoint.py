"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another run."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within it, what the disk objects to names the file: a full one says no more than that it is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def make_folder(path: Path) -> None:
    """Make a run folder where there is none, and see that files can be made in it.

    Args:
        path: The folder.

    Raises:
        OSError: They cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path).close()
    except OSError as error:
        raise type(error)(f"The run folder {path} cannot be written ({error.strerror}). Name another.") from error


def replace_file(path: Path, write: Callable[[IO[bytes]], object], *, keep: Path | None = None) -> None:
    """Write a file beside `path`, force it to the disk, and put it in place of `path` in one atomic step.

    Args:
        path: What to replace or create; its folder must exist.
        write: Writes the content to the binary stream it is given.
        keep: Where what `path` was before stays; None: nowhere.

    Raises:
        OSError: It cannot be written; `path` is as it was, and nothing is left beside it.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with naming(path), beside.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    if keep is not None and path.exists():
        keep.unlink(missing_ok=True)
        try:
            os.link(path, keep)
        except OSError:  # a file system without links
            os.replace(path, keep)
    os.replace(beside, path)


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

    def write(stream: IO[bytes]) -> None:
        try:
            torch.save(state, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # what the stream raised, before torch noticed that bytes lack
                raise error.__context__ from None
            raise

    replace_file(path, write, keep=previous_checkpoint(path))


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
    try:
        _check_sums(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or not a checkpoint ({type(error).__name__}). "
            "Restore it from a copy, or train anew in another folder."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds no checkpoint. Expected a dict. Got {type(state).__name__}.")
    return state


def _check_sums(path: Path) -> None:
    """Raise BadZipFile where a byte is not what was written, which torch.load does not look at."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)
