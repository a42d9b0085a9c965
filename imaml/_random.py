"""Random numbers of a call: the same mask whenever the same loss is evaluated again at the same point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Replay:
    """Replays random numbers by key, for losses that draw any (dropout).

    `at(key)` sets the generators so that equal keys give equal draws. Whether the loss draws at all is observed at the
    first evaluation; where it does not, `at` costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = device
        self._before = self._states()
        self._after = self._before
        self._first: tuple[int, ...] | None = None
        self._stochastic = False

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._accelerator is not None:
            states.append(self._accelerator.get_rng_state(self._device))
        return states

    def _set(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._accelerator is not None:
            self._accelerator.set_rng_state(states[1], self._device)

    @contextmanager
    def at(self, *key: int) -> Iterator[None]:
        """Evaluate one loss with the draws that belong to `key`."""
        if self._first is None:
            self._first = key
            yield
            self._after = self._states()
            self._stochastic = any(not torch.equal(a, b) for a, b in zip(self._before, self._after, strict=True))
            return
        if self._stochastic:
            self._set(self._before)
            if key != self._first:
                self._seed(hash((int(torch.randint(2**31, ()).item()), *key)) & 0x7FFF_FFFF_FFFF_FFFF)
        yield

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        if self._accelerator is not None:
            with self._accelerator.device(self._device):
                self._accelerator.manual_seed(seed)

    def restore(self) -> None:
        """Leave the user's generators as if one forward pass had run."""
        self._set(self._after)
