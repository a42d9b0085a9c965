"""Work with a deadline: its result or its error in time, and else an end to it."""

import contextvars
import threading
import time

import pytest

from imaml._curvature.deadline import OutOfTimeError, within

LONG = 60.0


def _workers():
    return [t for t in threading.enumerate() if t.name == "imaml"]


def _endless(started, ended):
    started.set()
    try:
        while True:
            try:
                time.sleep(0.001)
            except Exception:  # as a compiler may, which tries something else
                continue
    finally:
        ended.set()


def test_what_is_in_time_is_returned_and_what_it_raises_raised():
    assert within(lambda: 3, seconds=LONG) == 3
    with pytest.raises(ZeroDivisionError):
        within(lambda: 1 / 0, seconds=LONG)
    assert not _workers()


def test_what_is_not_in_time_ends():
    started, ended = threading.Event(), threading.Event()
    with pytest.raises(OutOfTimeError, match="more than 0 s"):
        within(lambda: _endless(started, ended), seconds=0.05)
    assert started.is_set() and ended.wait(LONG)
    for worker in _workers():
        worker.join(LONG)
    assert not _workers()


def test_an_interruption_of_the_caller_ends_it_too():
    started, ended = threading.Event(), threading.Event()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within(lambda: _endless(started, ended), seconds=LONG, meanwhile=[(0.05, interrupt)])
    assert ended.wait(LONG)


def test_what_is_said_meanwhile_is_said_only_while_it_runs():
    said, go_on = [], threading.Event()

    def call():
        said.append("first")
        go_on.set()

    calls = [(0.01, call), (0.02, lambda: said.append("second")), (LONG, lambda: said.append("third"))]
    assert within(lambda: go_on.wait(LONG), seconds=LONG, meanwhile=calls[:1])
    assert within(lambda: 1, seconds=LONG, meanwhile=calls) == 1
    assert said == ["first"]
    with pytest.raises(OutOfTimeError):
        within(lambda: _endless(threading.Event(), threading.Event()), seconds=0.1, meanwhile=[*calls[1:], (0.2, call)])
    assert said == ["first", "second"]


def test_variables_of_the_callers_context_are_there():
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)
    assert within(variable.get, seconds=LONG) == 5
