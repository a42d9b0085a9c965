"""Packages that only some data sets need."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, purpose: str, *, extra: str = "train") -> Any:
    """Import `module`, or say which extra provides it and that `purpose` needs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{purpose} needs {error.name}: pip install 'imaml[{extra}]'", name=error.name) from error
