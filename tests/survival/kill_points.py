"""`kill -9` at random moments: every run goes on, and ends as if nothing had happened, to the last bit.

    python -m tests.survival.kill_points --kills 60

Each kill hits a training of its own, somewhere between its first instruction and its last; the run is then resumed (and
with --again also killed again) until it ends. A fork for each, since importing takes longer than training. With --disk,
as root, also a full disk: a small one is mounted, filled, and given room.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import torch

from imaml.cli import _compare, _train, main  # noqa: F401  imported before the forks
from tests.survival.runs import differences, options, resume

STRATEGIES = ("maml", "fomaml", "imaml")
FORK = multiprocessing.get_context("fork")


def run(args: list[str], log: Path, kill_after: float | None = None) -> int:
    """The program in a process of its own; its exit code, -9 where it was killed before it ended."""
    process = FORK.Process(target=_program, args=(args, log))
    process.start()
    process.join(kill_after)
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    return process.exitcode


def _program(args: list[str], log: Path) -> None:
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.exit(main(args))


def where(out: Path, steps: int) -> str:
    """What the kill left."""
    if not (out / "config.json").exists():
        return "before the folder"
    if not (out / "checkpoint.pt").exists():
        return "between the checkpoints" if (out / "checkpoint.previous.pt").exists() else "before the checkpoint"
    if list(out.glob("*.tmp")):
        return "half a file"
    logged = (out / "metrics.jsonl").read_bytes() if (out / "metrics.jsonl").exists() else b""
    if logged and not logged.endswith(b"\n"):
        return "half a line"
    return "in the test" if logged.count(b"\n") == steps else "between two writes"


def survive(begin: list[str], log: Path, whole: Path, kills: list[float]) -> tuple[list[str], list[str]]:
    """Kill one run at these moments after each of its starts: where that was, and how it differs in the end."""
    out, steps, places = Path(begin[-1]), int(begin[begin.index("--steps") + 1]), []
    for kill_after in (*kills, None):
        args = resume(out) if (out / "config.json").exists() else begin
        code = run(args, log, kill_after)
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"{' '.join(args)} ended with {code}:\n{log.read_text()}")
        if kill_after is not None:
            places += [where(out, steps)] if code else []  # it may have ended before
    return places, differences(out, whole)


@contextmanager
def small_disk(folder: Path):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def full_disk(folder: Path, steps: int, whole: Path) -> str:
    """Fill the disk while a run trains, then make room, and resume it."""
    log = folder.with_suffix(".log")
    with small_disk(folder):
        process = FORK.Process(target=_program, args=(options(folder / "run", steps=steps), log))
        process.start()
        while not (folder / "run" / "checkpoint.previous.pt").exists():
            time.sleep(0.001)
        with open(folder / "filler", "wb", buffering=0) as filler:
            try:
                while filler.write(b"0" * 4096):
                    pass
            except OSError:
                pass
        process.join()
        said = log.read_text().splitlines()[-1]
        assert process.exitcode == 2 and "cannot be written (No space left on device)" in said, said
        (folder / "filler").unlink()
        assert run(resume(folder / "run"), log) == 0
        found = differences(folder / "run", whole)
        assert not found, found
    return said


def main_() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--steps", type=int, default=40, help="meta-steps of a run")
    parser.add_argument("--again", type=int, default=0, help="how often each resumed run is killed again")
    parser.add_argument("--disk", action="store_true", help="a full disk too; needs to be root")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as temporary:
        root, whole, seconds = Path(temporary), {}, {}
        for strategy in STRATEGIES:
            began = time.monotonic()
            whole[strategy] = root / strategy
            begin = options(whole[strategy], strategy, chosen.steps)
            assert run(begin, root / "log") == 0, (root / "log").read_text()
            seconds[strategy] = time.monotonic() - began
        places, broken, runs = Counter(), 0, 0
        while places.total() < chosen.kills:
            strategy = STRATEGIES[runs % len(STRATEGIES)]
            folder = root / str(runs)
            folder.mkdir()
            moments = [draw.uniform(0, seconds[strategy]) for _ in range(1 + chosen.again)]
            begin = options(folder / "run", strategy, chosen.steps)
            landed, found = survive(begin, folder / "log", whole[strategy], moments)
            places.update(landed)
            runs += bool(landed)
            seconds[strategy] *= 1 if landed else 0.8  # the first run was slower
            if found:
                broken += 1
                print(f"{strategy} killed after {moments} s ({', '.join(landed)}) differs in {', '.join(found)}")
            shutil.rmtree(folder)
        for place, count in places.most_common():
            print(f"{count:4d}  {place}")
        print(f"{places.total()} kills of {runs} runs; {broken} runs differ from the uninterrupted one")
        if chosen.disk:
            print(f"full disk: {full_disk(root / 'disk', chosen.steps, whole['maml'])}")
            print("full disk: resumed, the same to the last bit")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main_())
