"""Where the states of an inner loop wait for the reverse sweep."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from tempfile import TemporaryFile, gettempdir
from typing import Literal, Protocol

import torch
from torch import Tensor

from imaml._engine.journal import Journal
from imaml.inner._inner_problem import State

Storage = Literal["device", "cpu", "disk"]


class Store(Protocol):
    """States by the step that they are before, each as it was put, bit for bit; a dictionary is one."""

    def __setitem__(self, step: int, state: State, /) -> None: ...

    def __getitem__(self, step: int, /) -> State: ...

    def pop(self, step: int, /) -> State:
        """The state, which is needed no more."""
        ...


@contextmanager
def store(where: Storage, device: torch.device, states: int, journal: Journal | None = None) -> Iterator[Store]:
    """A store that is empty, or holds what the journal does. Its room is given back at the end, however it comes.

    Args:
        where: "device", "cpu" or "disk".
        device: Where the states come from and go back to.
        states: The most that it will hold at a time.
        journal: Holds them too, or alone where they are on a disk anyway; None: nothing outlives the process.

    Yields:
        The store.
    """
    if journal is not None:
        journal.states = states
        if where == "disk":
            yield journal
        else:
            with store(where, device, states) as kept:
                yield InBoth(kept, journal)
    elif where == "disk":
        with TemporaryFile(buffering=0) as file:  # without a name where the system can: a killed process leaves none
            yield OnDisk(file, device, states)
    elif where == "cpu" and device.type == "cuda":
        yield InPinnedMemory(device)
    else:
        yield {}


def most_on_device(where: Storage, device: torch.device, states: int) -> int:
    """How many of the states of a store are on the device at a time: that at hand, and those that are kept there."""
    if where == "disk":
        return min(states, 1)
    if where == "cpu" and device.type == "cuda":
        return min(states, 2)  # the next is read ahead
    return states


class InBoth:
    """In memory, and in the files of a journal for after an interruption."""

    def __init__(self, memory: Store, journal: Journal) -> None:
        self._memory, self._journal = memory, journal
        self._here: set[int] = set()

    def __setitem__(self, step: int, state: State) -> None:
        self._memory[step] = state
        self._journal[step] = state
        self._here.add(step)

    def __getitem__(self, step: int) -> State:
        return self._memory[step] if step in self._here else self._journal[step]

    def pop(self, step: int) -> State:
        state = self._memory.pop(step) if step in self._here else self._journal[step]
        self._here.discard(step)
        self._journal.drop(step)
        return state


class InPinnedMemory:
    """Pinned memory of the host: copies run beside the computation, and the state needed next comes ahead."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._kept: dict[int, State] = {}
        self._ahead: dict[int, State] = {}

    def __setitem__(self, step: int, state: State) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            pinned = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in state]
            self._kept[step] = tuple(p.copy_(t, non_blocking=True) for p, t in zip(pinned, state, strict=True))
        _used_by(self._stream, state)

    def __getitem__(self, step: int) -> State:
        state = self._ahead.pop(step) if step in self._ahead else self._fetch(step)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        _used_by(current, state)
        following = next((s for s in reversed(self._kept) if s < step), None)  # they come in ascending order
        self._ahead = {} if following is None else {following: self._fetch(following)}
        return state

    def pop(self, step: int) -> State:
        state = self[step]
        del self._kept[step]
        return state

    def _fetch(self, step: int) -> State:
        with torch.cuda.stream(self._stream):
            return tuple(t.to(self._device, non_blocking=True) for t in self._kept[step])


def _used_by(stream: torch.cuda.Stream, state: State) -> None:
    """Keep the allocator from giving memory of another stream away before this one is done with it."""
    for tensor in state:
        tensor.record_stream(stream)


class OnDisk:
    """One file of raw bytes; the room of a state that is needed no more serves the next."""

    def __init__(self, file: FileIO, device: torch.device, states: int) -> None:
        self._file, self._device, self._states = file, device, states
        self._kept: dict[int, tuple[int, list[tuple[torch.Size, torch.dtype]]]] = {}
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._end = 0

    def __setitem__(self, step: int, state: State) -> None:
        size = sum(t.nbytes for t in state)
        start = self._free[size].pop() if self._free[size] else self._end
        self._end = max(self._end, start + size)
        try:
            self._file.seek(start)
            for tensor in state:
                left = _bytes(tensor.cpu())
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"The states of the inner loop could not be written to {gettempdir()} ({error.strerror}). Expected "
                f"room for {size * self._states:,} bytes, {self._states} states of {size:,}: set TMPDIR to a folder "
                "with more before the program starts, or keep fewer states by checkpoints=m.",
            ) from error
        self._kept[step] = start, [(t.shape, t.dtype) for t in state]

    def __getitem__(self, step: int) -> State:
        start, kinds = self._kept[step]
        self._file.seek(start)
        return tuple(self._read(shape, dtype) for shape, dtype in kinds)

    def pop(self, step: int) -> State:
        state = self[step]
        start, _ = self._kept.pop(step)
        self._free[sum(t.nbytes for t in state)].append(start)
        return state

    def _read(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        left = _bytes(tensor)
        while left:
            left = left[self._file.readinto(left) :]
        return tensor.to(self._device)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a tensor on the host, or of a contiguous copy."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
