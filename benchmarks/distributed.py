"""Throughput of two processes with one thread each against one process with one thread, and what a step communicates.

    python -m benchmarks.distributed [--steps 5] [--rounds 7] [--ranks 2] [--workload W2] [--out FOLDER]

Exact MAML on 32 tasks of Conv4 (workload W2). In every round the first process computes all tasks alone while the
others wait, then all compute their shares and reduce; medians over the rounds after a first one that is not counted. A
round of all takes as long as its slowest rank. The all-reduce of the rank that comes to it last is communication; the
others' is longer by their waiting. Needs an idle core for each process. Writes `distributed.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

from benchmarks.workloads import WORKLOADS
from imaml import MAML, GradientDescent, Objective


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def work(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Of every round: seconds alone (the first rank), with the others, and in the all-reduce."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    problem = WORKLOADS[options.workload].problem(options.steps)
    objective = Objective(problem.model, problem.criterion)
    engine = MAML(inner=GradientDescent(lr=problem.lr, steps=options.steps))
    tasks, own, group = problem.tasks, problem.tasks[rank :: options.ranks], dist.group.WORLD
    reducing: list[float] = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: reducing.append(seconds(lambda: all_reduce(*args, **kwargs)))
    rounds = []
    for _ in range(options.rounds + 1):
        dist.barrier()
        alone = 0.0 if rank else seconds(lambda: engine.value_and_grad(objective, tasks))
        dist.barrier()
        together = seconds(lambda: engine.value_and_grad(objective, own, group=group))
        rounds.append({"alone": alone, "together": together, "all-reduce": reducing[-1]})
    Path(folder, f"{rank}.json").write_text(json.dumps(rounds[1:]))
    dist.barrier()
    dist.destroy_process_group()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder, options), nprocs=options.ranks, start_method="spawn")
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.ranks)]
    rounds = list(zip(*ranks, strict=True))
    alone = median(each[0]["alone"] for each in rounds)
    together = median(max(rank["together"] for rank in each) for each in rounds)
    communication = median(min(rank["all-reduce"] for rank in each) for each in rounds)
    waiting = median(max(rank["all-reduce"] for rank in each) for each in rounds) - communication
    return {
        "workload": WORKLOADS[options.workload].title,
        "inner steps": options.steps,
        "ranks": options.ranks,
        "rounds": options.rounds,
        "torch": torch.__version__,
        "seconds alone": alone,
        "seconds together": together,
        "throughput": alone / together,
        "communication": communication / together,
        "waiting": waiting / together,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--workload", choices=WORKLOADS, default="W2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "distributed")
    options = parser.parse_args()
    found = measure(options)
    table = Table("", "value", title=f"MAML, {found['workload']}, K = {options.steps}, one thread a process")
    table.add_row("one process, s", f"{found['seconds alone']:.3f}")
    table.add_row(f"{options.ranks} processes, s", f"{found['seconds together']:.3f}")
    table.add_row("throughput, times that of one", f"{found['throughput']:.2f}")
    table.add_row("communication, % of a step", f"{100 * found['communication']:.2f}")
    table.add_row("waiting for the slower rank, % of a step", f"{100 * found['waiting']:.2f}")
    Console().print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "distributed.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
