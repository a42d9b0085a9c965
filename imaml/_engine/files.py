"""Files that are whole or not there."""

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

from imaml._errors import CheckpointError


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


def replace_file(
    path: Path, write: Callable[[IO[bytes]], object], *, keep: Path | None = None, sync: bool = True
) -> None:
    """Write a file beside `path`, force it to the disk, and put it in place of `path` in one atomic step.

    Args:
        path: What to replace or create; its folder must exist.
        write: Writes the content to the binary stream it is given.
        keep: Where what `path` was before stays; None: nowhere.
        sync: Whether it is forced to the disk; a process that is killed loses nothing without, a machine may.

    Raises:
        OSError: It cannot be written; `path` is as it was, and nothing is left beside it.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with naming(path), beside.open("wb") as stream:
            write(stream)
            stream.flush()
            if sync:
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


def save_tensors(path: Path, content: Any, *, keep: Path | None = None, sync: bool = True) -> None:
    """Save tensors and plain values, in any nesting of dicts, lists and tuples, as `replace_file` writes.

    Args:
        path: The file.
        content: What to save.
        keep: As of `replace_file`.
        sync: As of `replace_file`.

    Raises:
        OSError: It cannot be written, as on a full disk; `path` is as it was.
    """

    def write(stream: IO[bytes]) -> None:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # what the stream raised, before torch noticed that bytes lack
                raise error.__context__ from None
            raise

    replace_file(path, write, keep=keep, sync=sync)


def load_tensors(path: Path, remedy: str, *, device: torch.device | str = "cpu", check: bool = True) -> Any:
    """Load what `save_tensors` wrote; nothing but tensors and plain values is unpickled.

    Args:
        path: The file.
        remedy: What to do where it is of no use, for the message.
        device: Where the tensors come.
        check: Whether to compare every byte with the file's checksums, which torch.load does not look at.

    Returns:
        What was saved.

    Raises:
        CheckpointError: The file is missing, truncated, damaged or not a checkpoint.
    """
    if check:
        check_sums(path, remedy)
    with _readable(path, remedy):
        return torch.load(path, map_location=device, weights_only=True)


def check_sums(path: Path, remedy: str) -> None:
    """Raise CheckpointError, with what to do, where a byte of a file of `save_tensors` is not what was written."""
    with _readable(path, remedy):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(damaged)


@contextmanager
def _readable(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or not a checkpoint ({type(error).__name__}). {remedy}"
        ) from error
