"""Whether a run goes on with the options it began with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from imaml._errors import CheckpointError

_BEFORE = {"optimizer": "adam"}
"""What runs did that began before there was the option, where that is not None."""


def check_alike(folder: Path, config: dict[str, Any], given: dict[str, Any], free: Collection[str]) -> None:
    """Compare configurations.

    Args:
        folder: Folder of the run.
        config: With which it began, nested.
        given: With which it is to go on.
        free: Names of the options that may differ.

    Raises:
        CheckpointError: They differ; what differs is named.
    """
    theirs, ours = _flat(config), _flat(given)
    theirs = {name: _BEFORE[name] for name in _BEFORE if name in ours} | theirs
    differing = [n for n in {**ours, **theirs} if n not in free and ours.get(n) != theirs.get(n)]
    if differing:
        listing = "; ".join(f"{name} is {theirs.get(name)} there. Got {ours.get(name)}" for name in differing)
        raise CheckpointError(
            f"{folder} was trained with other options: {listing}. Leave them out to resume, or train in another folder."
        )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        plain = list(value) if isinstance(value, tuple) else value  # as JSON gives it back
        flat.update(_flat(value) if isinstance(value, dict) else {name: plain})
    return flat
