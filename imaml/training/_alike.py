"""Whether a run goes on with the options it began with."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from imaml._errors import CheckpointError


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
    differing = [name for name in ours if name not in free and ours[name] != theirs.get(name)]
    if differing:
        listing = "; ".join(f"{name} is {theirs.get(name)} there. Got {ours[name]}" for name in differing)
        raise CheckpointError(
            f"{folder} was trained with other options: {listing}. Leave them out to resume, or train in another folder."
        )


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat.update(_flat(value) if isinstance(value, dict) else {name: value})
    return flat
