"""Random numbers of a call: the same mask whenever the same loss is evaluated again at the same point."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Replay:
    """Replays random numbers by key, for losses that draw any (dropout).

    `at(kind, ...)` sets the generators so that equal keys give equal draws. Whether the losses of a kind draw at all is
    observed at its first evaluation; where they do not, `at` costs nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._accelerator: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._device = device
        self._before = self._after = self._states()
        generator = torch.Generator()
        generator.set_state(self._before[0])
        self._base = int(torch.randint(2**31, (), generator=generator))
        self._draws: dict[int, bool] = {}
        self._first: tuple[int, ...] | None = None

    @property
    def draws(self) -> bool:
        """Whether any loss has drawn random numbers so far."""
        return any(self._draws.values())

    @contextmanager
    def at(self, kind: int, *key: int) -> Iterator[None]:
        """Evaluate one loss with the draws that belong to its key."""
        known = kind in self._draws
        if known and not self._draws[kind]:
            yield
            return
        if self._first in (None, (kind, *key)):
            self._set(self._before)
        else:
            self._seed(hash((self._base, kind, *key)) & 0x7FFF_FFFF_FFFF_FFFF)
        if known:
            yield
            return
        before = self._states()
        yield
        after = self._states()
        self._draws[kind] = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        if self._draws[kind] and self._first is None:
            self._first, self._after = (kind, *key), after

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
