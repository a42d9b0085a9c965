"""Random numbers of a call: the same mask whenever the same loss is evaluated again at the same point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from imaml._torch import is_traced


class Replay:
    """Replays random numbers by key, for losses that draw any (dropout).

    `at(...)` sets the generators so that equal keys give equal draws, from the first evaluation on that draws: its own
    are those that the user's generators gave. Until then `at` only looks whether an evaluation has moved them.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = device
        self._before = self._start = self._after = self._states()
        generator = torch.Generator()
        generator.set_state(self._before[0])
        self._base = int(torch.randint(2**31, (), generator=generator))
        self._first: tuple[int, ...] | None = None

    @property
    def draws(self) -> bool:
        """Whether any loss has drawn random numbers so far."""
        return self._first is not None

    @contextmanager
    def at(self, *key: int) -> Iterator[None]:
        """Evaluate one loss with the draws that belong to its key."""
        if is_traced():  # after an evaluation that drew nothing
            yield
        elif self._first is None:
            start = self._states()
            try:
                yield
            except BaseException:
                self._set(start)  # a vectorised pass that fails is repeated task by task
                raise
            after = self._states()
            if any(not torch.equal(a, b) for a, b in zip(start, after, strict=True)):
                self._first, self._start, self._after = key, start, after
        else:
            if key == self._first:
                self._set(self._start)
            else:
                self._seed(hash((self._base, *key)) & 0x7FFF_FFFF_FFFF_FFFF)
            yield

    def restore(self) -> None:
        """Leave the user's generators as if one forward pass had run."""
        self._set(self._after)

    def undo(self) -> None:
        """Leave the user's generators as they were."""
        self._set(self._before)

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._accelerator is not None:
            states.append(self._accelerator.get_rng_state(self._device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._accelerator is not None:
            self._accelerator.set_rng_state(states[1], self._device)

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._accelerator is not None:
            with self._accelerator.device(self._device):
                self._accelerator.manual_seed(seed)
