"""Work that is given up when it takes too long."""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")


class OutOfTimeError(Exception):
    """Work took longer than it was given."""


class _Stop(BaseException):
    """What ends a thread; no `except Exception` on its way holds it up."""


class _Worker(threading.Thread, Generic[T]):
    def __init__(self, compute: Callable[[], T]) -> None:
        super().__init__(name="imaml", daemon=True)
        self._compute, self._context = compute, contextvars.copy_context()
        self.found: list[T] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.found.append(self._context.run(self._compute))
        except BaseException as error:  # for the thread that waits
            self.error = error


def within(
    compute: Callable[[], T], *, seconds: float, meanwhile: Sequence[tuple[float, Callable[[], None]]] = ()
) -> T:
    """What a function returns, computed in a thread that is stopped when it takes too long.

    A thread stops between two of its own instructions in Python: when it waits for another process, such as a C++
    compiler, then after that. Its caller does not wait for it.

    Args:
        compute: The function; what torch keeps for each thread, such as grad mode, is there as in a new one.
        seconds: The most it may take.
        meanwhile: Called while it runs, each after so many seconds, in this order.

    Returns:
        What `compute` returns; an error that it raises is raised here.

    Raises:
        OutOfTimeError: It took longer.
    """
    worker, start = _Worker(compute), monotonic()
    worker.start()
    try:
        for after, call in meanwhile:
            if after < seconds:
                worker.join(max(0.0, start + after - monotonic()))
                if worker.is_alive():
                    call()
        worker.join(max(0.0, start + seconds - monotonic()))
    finally:
        if worker.is_alive():  # also where this thread is interrupted
            assert worker.ident is not None
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(_Stop))
    if worker.error is not None and not isinstance(worker.error, _Stop):
        raise worker.error
    if not worker.found:
        raise OutOfTimeError(f"It took more than {seconds:.0f} s.")
    return worker.found[0]
