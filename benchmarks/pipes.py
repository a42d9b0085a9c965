"""The two ends of a pipe: a process that answers, and one that asks it.

Only the standard library, since a process that answers may run in an environment without torch.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = Callable[[str], dict[str, Any]]
"""From what follows the name of the question to what is sent back."""


def serve(answers: Mapping[str, Answer]) -> None:
    """Answer lines of standard input, `name` or `name argument`, by one line of JSON each, until it ends.

    An exception is an answer too, as a `reason`. What else the process prints goes to standard error.
    """
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in sys.stdin:
            name, _, argument = line.rstrip("\n").partition(" ")
            try:
                answer = answers[name](argument)
            except Exception as failure:
                answer = {"reason": f"{type(failure).__name__}: {failure}"}
            print(json.dumps(answer), file=out, flush=True)


def serve_call(prepare: Callable[[], Callable[[], Any]], save: Callable[[str, Any], None], **others: Answer) -> None:
    """Answer for a call that takes no arguments: what the first one costs, what one more costs, and what it returned.

    `first` prepares the call and makes it, `call` makes it once more or as often as the number that follows says; both
    answer `cpu` and `wall` seconds of a call. `gradient` writes what the last call returned to the file that follows.
    """
    known: dict[str, Any] = {}

    def first(_: str) -> dict[str, Any]:
        def both() -> Any:
            known["call"] = prepare()
            return known["call"]()

        return again(both)

    def again(call: Callable[[], Any]) -> dict[str, Any]:
        cpu, wall = cpu_seconds(), time.perf_counter()
        known["found"] = call()
        return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}

    def more(count: str) -> dict[str, Any]:
        # the process's own time alone, whose clock is finer: nothing is compiled any more
        cpu, wall, calls = time.process_time(), time.perf_counter(), int(count or 1)
        for _ in range(calls):
            known["found"] = known["call"]()
        return {"wall": (time.perf_counter() - wall) / calls, "cpu": (time.process_time() - cpu) / calls}

    def gradient(file: str) -> dict[str, Any]:
        save(file, known["found"])
        return {}

    serve({"first": first, "call": more, "gradient": gradient, **others})


def cpu_seconds() -> float:
    """Processor time of this process and of all that it has started, such as compilers, ended or not."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(_descendants(os.getpid()))


def _descendants(pid: int) -> list[float]:
    """Seconds of each process that still runs below `pid`, as Linux tells them; none elsewhere."""
    seconds, ticks = [], os.sysconf("SC_CLK_TCK")
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            pids = children.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in pids:
            try:
                fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            seconds.append(sum(map(int, fields[11:15])) / ticks)  # utime, stime and those of its ended children
            seconds += _descendants(int(child))
    return seconds


class Process:
    """A process that answers by `serve`.

    Args:
        command: What to start, in the current folder.
        variables: Of its environment, besides those of this process.
        timeout: Seconds that an answer may take.
    """

    def __init__(self, command: Sequence[str], variables: Mapping[str, str] | None = None, timeout: float = 600.0):
        self.timeout = timeout
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to one question; RuntimeError with the reason where there is none."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(f"{question}\n".encode())
        except BrokenPipeError:
            raise RuntimeError(f"the process ended with exit code {self._process.wait()}") from None
        if not select.select([stdout], [], [], self.timeout)[0]:
            self.close()
            raise RuntimeError(f"took more than {self.timeout} s")
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the process ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            raise RuntimeError(answer["reason"])
        return answer

    def close(self) -> None:
        """End the process, however busy it is."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
