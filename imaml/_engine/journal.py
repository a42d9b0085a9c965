"""The files of one computation in a folder, from which it goes on after whatever has ended it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imaml._engine.files import check_sums, load_tensors, make_folder, replace_file, save_tensors
from imaml._errors import CheckpointError
from imaml.inner._inner_problem import State

_WHAT, _RUN, _CHUNK = "imaml-computation.json", "imaml-chunks.pt", "imaml-progress.pt"
_OWN = re.compile(r"imaml-(computation\.json|chunks\.pt|progress\.pt|(state|final)-\d+\.pt)(\.tmp)?")


class Journal:
    """Writes down how far a computation is, and holds the states that its sweep will need.

    Whatever is written is whole or not there. A state that is needed no more goes when what was done with it has been
    written down, and the states that a note speaks of are on the disk before it.

    Args:
        path: The folder; `open` makes it and looks at what it holds.
        device: Where tensors come from and go back to.
    """

    states: int = 0
    """How many states the sweep keeps at most, for the error of a full disk."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self._device = path, device
        self.run: dict[str, Any] | None = None
        """What was written down after the last chunk of tasks that is done."""
        self.chunk: dict[str, Any] | None = None
        """What was written down on the way through the next."""
        self._kept: set[int] = set()
        self._unsafe: set[int] = set()
        self._dropped: set[int] = set()

    @classmethod
    def open(cls, path: Path, what: dict[str, Any], device: torch.device) -> Journal:
        """Take up the computation in a folder, or begin one there.

        Args:
            path: The folder; it is made where there is none, and files of others in it are left alone.
            what: What is computed from what, nested plain values.
            device: Where tensors come from and go back to.

        Returns:
            The journal, with what was written down.

        Raises:
            CheckpointError: The folder holds another computation, the message says what differs; or a damaged file.
            OSError: The folder cannot be made or written.
        """
        make_folder(path)
        self, begun = cls(path, device), path / _WHAT
        if not begun.exists():
            self.end()  # what is there without it was being removed
            replace_file(begun, lambda stream: stream.write(json.dumps(what, indent=1).encode()))
            return self
        try:
            there = json.loads(begun.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{begun} is damaged ({error}). {self._anew}") from error
        self._check(there, json.loads(json.dumps(what)))
        self.run = self._load(_RUN)
        self.chunk = self._load(_CHUNK)
        done = 0 if self.run is None else self.run["chunks"]
        if self.chunk is not None and self.chunk["chunks"] != done:
            self.chunk = None  # of one that is done
        self._kept = set() if self.chunk is None else set(self.chunk["kept"])
        for file in self._own("state-"):
            if file.suffix == ".tmp" or _number(file) not in self._kept:
                file.unlink()
        for step in sorted(self._kept):
            check_sums(path / _state(step), self._anew)
        return self

    def _check(self, there: dict[str, Any], here: dict[str, Any]) -> None:
        theirs, ours = _flat(there), _flat(here)
        differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
        if not differing:
            return
        listing = "; ".join(
            f"{name} is {theirs.get(name, 'missing')} there. Got {ours.get(name, 'none')}" for name in differing[:5]
        )
        more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(f"The folder {self.path} holds another computation: {listing}{more}. {self._anew}")

    @property
    def _anew(self) -> str:
        return "Name another folder, or remove its files imaml-* to begin anew."

    def note_chunk(self, note: dict[str, Any]) -> None:
        """Write down how far the chunk is that is being computed; what it has no more need of goes then.

        Args:
            note: Tensors and plain values.

        Raises:
            OSError: It cannot be written; what was written down before still holds.
        """
        for step in self._unsafe:
            with (self.path / _state(step)).open("rb") as stream:
                os.fsync(stream.fileno())
        self._unsafe.clear()
        done = 0 if self.run is None else self.run["chunks"]
        self._save(_CHUNK, note | {"chunks": done, "kept": sorted(self._kept)})
        for step in self._dropped:
            (self.path / _state(step)).unlink(missing_ok=True)
        self._dropped.clear()

    def note_run(self, note: dict[str, Any], final: Any = None) -> None:
        """Write down that another chunk is done, whose own files then go.

        Args:
            note: What all chunks so far have given, "chunks" of them.
            final: What this one has left besides, which is written once.
        """
        if final is not None:
            self._save(_final(note["chunks"] - 1), final)
        self._save(_RUN, note)
        self.run, self.chunk = {"chunks": note["chunks"]}, None
        self.forget_chunk()

    def forget_chunk(self) -> None:
        """Remove what was written of a chunk."""
        for file in (*self._own("progress"), *self._own("state-")):
            file.unlink()
        for steps in (self._kept, self._unsafe, self._dropped):
            steps.clear()

    def finals(self, chunks: int) -> list[Any]:
        """What these chunks have left besides."""
        return [self._load(_final(chunk), needed=True) for chunk in range(chunks)]

    def end(self) -> None:
        """Remove all files of the computation, the one that says which it is first."""
        (self.path / _WHAT).unlink(missing_ok=True)
        for file in self._own(""):
            file.unlink()

    def __contains__(self, step: int) -> bool:
        """Whether the state before this step is in the folder, or will be when the next note is written."""
        return step in self._kept

    def __setitem__(self, step: int, state: State) -> None:
        """Put a state away."""
        self._save(_state(step), list(owned(state)), sync=False)
        self._kept.add(step)
        self._unsafe.add(step)
        self._dropped.discard(step)

    def __getitem__(self, step: int) -> State:
        """The state that was put away, bit for bit."""
        return tuple(self._load(_state(step), needed=True, check=False))

    def pop(self, step: int) -> State:
        """The state, which is needed no more: its file stays until the next note."""
        state = self[step]
        self.drop(step)
        return state

    def drop(self, step: int) -> None:
        """Need a state no more."""
        self._kept.discard(step)
        self._dropped.add(step)

    def _save(self, name: str, content: Any, *, sync: bool = True) -> None:
        try:
            save_tensors(self.path / name, content, sync=sync)
        except OSError as error:
            size = sum(t.nbytes for t in _tensors(content))
            raise OSError(
                error.errno,
                f"The progress of the inner loop could not be written to {self.path} ({error.strerror}). Expected room "
                f"for {size * (self.states + 4):,} bytes, {self.states} states of {size:,} and four more: make room "
                "and call again to go on, name a folder on another disk, or keep fewer states by checkpoints=m.",
            ) from error

    def _load(self, name: str, *, needed: bool = False, check: bool = True) -> Any:
        path = self.path / name
        if not needed and not path.exists():
            return None
        return load_tensors(path, self._anew, device=self._device, check=check)

    def _own(self, beginning: str) -> Iterator[Path]:
        files = [file for file in self.path.iterdir() if _OWN.fullmatch(file.name)]
        return (file for file in files if file.name.startswith(f"imaml-{beginning}"))


def owned(state: State) -> State:
    """The tensors without the rest of a storage that they are a part of, which would be saved too."""
    dense = [t.detach().contiguous() for t in state]
    return tuple(t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for t in dense)


def _state(step: int) -> str:
    return f"imaml-state-{step}.pt"


def _final(chunk: int) -> str:
    return f"imaml-final-{chunk}.pt"


def _number(file: Path) -> int:
    return int(file.name.removeprefix("imaml-state-").removesuffix(".pt"))


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from _tensors(part)


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, by dotted names."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: part for n, v in value.items() for key, part in _flat(v, f"{name}.{n}" if name else n).items()}
