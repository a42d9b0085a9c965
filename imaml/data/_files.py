"""Files of arrays: read with clear errors, written whole or not at all, cached."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imaml.data._extras import optional

Arrays = Mapping[str, NDArray[Any]]
BROKEN = (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged archive raises."""


def read_arrays(path: Path) -> Arrays:
    """Read every array of a `.npz`, nothing pickled.

    Returns:
        The arrays by name.

    Raises:
        ValueError: The file is truncated, damaged, or no `.npz`. Of an absent one the OSError comes through.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        stored = np.load(content, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array")
        arrays = dict(stored)
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds other things than arrays")
        return arrays
    except BROKEN as error:
        raise ValueError(
            f"{path} is not a readable .npz file ({error}). It may be truncated or damaged: get it again."
        ) from error


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write a `.npz` beside its final place and move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def cache_folder() -> Path:
    """The folder of this library in the user's cache."""
    return Path(optional("pooch", "The cache of data files").os_cache("imaml"))


def cached(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of the cached file `name`; made, and stored if possible, where it is absent or damaged."""
    path = cache_folder() / name
    try:
        return read_arrays(path)
    except (OSError, ValueError):
        arrays = make()
    try:
        write_arrays(path, arrays)
    except OSError as error:
        warnings.warn(
            f"Cannot keep {path} ({error}): it is made again in every run. Make its folder writable.",
            RuntimeWarning,
            stacklevel=2,
        )
    return arrays
