"""Random numbers of a call: the same mask whenever the same loss is evaluated again at the same point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from imaml._torch import is_traced


class Role(IntEnum):
    """What an evaluation is for, which says what it draws."""

    SUPPORT = 0
    QUERY = 1
    UPDATE = 2
    """A step of the inner optimiser, which may draw too."""

    def __str__(self) -> str:
        """As messages have it."""
        return self.name.lower()


class Replay:
    """Replays random numbers by key, for losses that draw any (dropout).

    `with replay.at(...)` sets the generators so that equal keys give equal draws, from the first evaluation on that
    draws: its own are those that the user's generators gave. Until then it only looks whether an evaluation has moved
    them. A key has the position of a chunk's first task, so masks depend on the chunking.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = device
        self._before = self._start = self._after = self.states()
        self._first: tuple[int, ...] | None = None

    @cached_property
    def _base(self) -> int:
        """What the user's generator would draw next, for seeds."""
        generator = torch.Generator()
        generator.set_state(self._before[0])
        return int(torch.randint(2**31, (), generator=generator))

    @property
    def draws(self) -> bool:
        """Whether any loss has drawn random numbers so far."""
        return self._first is not None

    @contextmanager
    def at(self, *key: int) -> Iterator[None]:
        """Within it something is evaluated with the draws that belong to its key."""
        start, failed = self.begin(key), True
        try:
            yield
            failed = False
        finally:
            self.end(key, start, failed=failed)

    def begin(self, key: tuple[int, ...]) -> list[Tensor] | None:
        """Set the generators; returns their states where it is still to be seen whether an evaluation moves them."""
        if is_traced():  # after an evaluation that drew nothing
            return None
        if self._first is None:
            return self.states()
        if key == self._first:
            self.set(self._start)
        else:
            self._seed(hash((self._base, *key)) & 0x7FFF_FFFF_FFFF_FFFF)
        return None

    def end(self, key: tuple[int, ...], start: list[Tensor] | None, *, failed: bool) -> None:
        """Look whether an evaluation has moved the generators; a vectorised one that fails is repeated from the start.

        Args:
            key: What the evaluation's draws belong to.
            start: What `begin` returned.
            failed: Whether it raised.
        """
        if start is None:
            return
        if failed:
            self.set(start)
            return
        after = self.states()
        if not all(map(torch.equal, start, after)):
            self._first, self._start, self._after = key, start, after

    def saved(self) -> dict[str, Any]:
        """What equal keys need in another process to give equal draws, and what the user's generators need."""
        states = {name: getattr(self, f"_{name}") for name in ("before", "start", "after")}
        return states | {"base": self._base, "first": None if self._first is None else [int(k) for k in self._first]}

    def resume(self, saved: dict[str, Any]) -> None:
        """Give the draws of the process that saved this."""
        for name in ("before", "start", "after"):
            setattr(self, f"_{name}", [state.cpu() for state in saved[name]])
        self._base = saved["base"]
        self._first = None if saved["first"] is None else tuple(saved["first"])
        self.set(self._before)  # from which the first evaluation that draws goes on

    def restore(self) -> None:
        """Leave the user's generators as if one forward pass had run."""
        self.set(self._after)

    def undo(self) -> None:
        """Leave the user's generators as they were."""
        self.set(self._before)

    def states(self) -> list[Tensor]:
        """The states of the generators that an evaluation may use."""
        states = [torch.default_generator.get_state()]
        if self._accelerator is not None:
            states.append(self._accelerator.get_rng_state(self._device))
        return states

    def set(self, states: list[Tensor]) -> None:
        """Put the generators into these states."""
        torch.set_rng_state(states[0])
        if self._accelerator is not None:
            self._accelerator.set_rng_state(states[1], self._device)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._accelerator is not None:
            with self._accelerator.device(self._device):
                self._accelerator.manual_seed(seed)
