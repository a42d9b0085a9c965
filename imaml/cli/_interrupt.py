"""Ctrl-C, and the SIGTERM of a scheduler."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from signal import SIGINT, SIGTERM, Signals
from types import FrameType


class Terminated(BaseException):
    """SIGTERM came where there is nothing to wait for."""


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """Within the block the first SIGTERM raises `Terminated`; others change nothing."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(SIGTERM, signal.SIG_IGN)
        raise Terminated

    with _handling({SIGTERM: stop}):
        yield


@contextmanager
def deferred_stop() -> Iterator[Callable[[], Signals | None]]:
    """Within the block Ctrl-C or SIGTERM is only noted; a second Ctrl-C raises KeyboardInterrupt as usual.

    A second SIGTERM changes nothing: a scheduler may send it to all processes, and torchrun once more to its own.

    Yields:
        Which came first; None for none.
    """
    noted: list[Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        if SIGINT in noted and number == SIGINT:
            raise KeyboardInterrupt
        noted.append(Signals(number))

    with _handling({SIGINT: note, SIGTERM: note}):
        yield lambda: noted[0] if noted else None


@contextmanager
def _handling(handlers: dict[Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
