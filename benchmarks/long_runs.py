"""Memory over thousands of meta-steps: of a user's own loop with one engine, for each strategy, and of `imaml train`.

    python -m benchmarks.long_runs --steps 2000

Prints resident memory and the numbers of live tensors and of Python objects that the collector tracks, after a fifth of
the steps and after all of them. "shapes vary": the tasks of every meta-step have another size, for 300 steps, and then
again. Each row is a process of its own; it needs Linux.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from imaml import CG, FOMAML, MAML, GradientDescent, ImplicitMAML, MetaGradient, Objective, TaskBatch
from imaml.data import Sinusoid
from imaml.models import MLP

INNER = GradientDescent(lr=0.01, steps=5)
ENGINES: dict[str, MetaGradient] = {
    "MAML": MAML(inner=INNER),
    "FOMAML": FOMAML(inner=INNER),
    "ImplicitMAML": ImplicitMAML(
        inner=GradientDescent(lr=0.002, steps=5),
        regularization=10.0,
        solver=CG(max_steps=5),
        on_failure="ignore",
        on_nonfinite="skip",
    ),
    "MAML, skipping": MAML(inner=INNER, on_nonfinite="skip"),
}
BATCH = 4


def resident(pid: int | str = "self") -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def snapshot() -> tuple[float, int, int]:
    gc.collect()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
    return resident(), tensors, len(objects)


def batch(step: int, name: str, vary: bool) -> TaskBatch:
    sizes = {"shots": 5 + 7 * step % 300, "queries": 10} if vary else {"shots": 10, "queries": 10}
    drawn = Sinusoid(**sizes).batch("train", step, BATCH)
    if "skipping" in name and step % 3 == 0:
        drawn.query[0][step % BATCH] = torch.nan
    return drawn


def own_loop(name: str, steps: int, vary: bool) -> None:
    """A user's loop; prints the two snapshots."""
    torch.manual_seed(0)
    model, engine = MLP(), ENGINES[name]
    objective, optimizer = Objective(model, F.mse_loss), torch.optim.Adam(model.parameters())
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        engine(objective, batch(step, name, vary)).loss.backward()
        optimizer.step()
        if step in (steps // 5, steps):
            print(*snapshot())


def program(steps: int) -> list[list[float]]:
    """Resident memory of `imaml train` when a fifth of its steps, and then all of them, were logged."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--dataset", "sinusoid", "--meta-batch", str(BATCH), "--eval-every", str(steps // 20)]
        command = [sys.executable, "-m", "imaml", "train", *options, "--steps", str(steps), "--out", f"{folder}/run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        log, found = Path(folder, "run", "metrics.jsonl"), []
        while len(found) < 2 and process.poll() is None:
            logged = log.read_bytes().count(b"\n") if log.exists() else 0
            memory = resident(process.pid)
            if logged >= (steps // 5, steps - 1)[len(found)]:
                found.append([memory])
            time.sleep(0.002)
        assert process.wait() == 0 and len(found) == 2
    return found


def alone(*args: str) -> list[list[float]]:
    """This script in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.long_runs", *args], stdout=subprocess.PIPE, check=True, text=True
    )
    return [[float(number) for number in line.split()] for line in ended.stdout.splitlines()]


def row(name: str, early: list[float], late: list[float]) -> str:
    counts = [f"{a:.0f} | {b:.0f}" for a, b in zip(early[1:], late[1:], strict=True)] or ["|", "|"]
    growth = 100 * (late[0] / early[0] - 1)
    return f"| {name} | {early[0]:.1f} | {late[0]:.1f} | {growth:+.2f} % | {' | '.join(counts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--loop", choices=ENGINES, help="this loop alone, as numbers")
    parser.add_argument("--vary", action="store_true")
    chosen = parser.parse_args()
    if chosen.loop:
        own_loop(chosen.loop, chosen.steps, chosen.vary)
        return
    fifth = chosen.steps // 5
    print(f"| | MiB at {fifth} | MiB at {chosen.steps} | growth | tensors | then | objects | then |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ENGINES:
        for vary in (False, True)[: 1 if "skipping" in name else 2]:
            found = alone("--steps", str(chosen.steps), "--loop", name, *["--vary"] * vary)
            print(row(name + ", shapes vary" * vary, *found), flush=True)
    print(row("`imaml train`", *program(chosen.steps)))


if __name__ == "__main__":
    main()
