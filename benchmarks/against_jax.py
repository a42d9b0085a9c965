"""Processor time of this library, of other ways in torch and of JAX, in turns.

    python -m benchmarks.against_jax [--workloads W1 ...] [--steps 5 ...] [--methods ...] [--repeats N]

Each method has a process of its own that answers for one call after the other, so that all of them see the same minutes
of a busy machine. What compiles is started twice with one new folder for what it keeps on disk: the first calls of both
are the cold one and the warm one, compilers included. Rows go to `benchmarks/results/jax`, one file a workload and K,
and `README.md` beside them is made from all of them. JAX is found where `python -m benchmarks.compare` has put it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.goals import BESIDE_JAX
from benchmarks.pipes import Process
from benchmarks.rivals import METHODS, environment
from benchmarks.rivals.jax import ROOT, Elsewhere
from benchmarks.summary import Figure
from benchmarks.workloads import WORKLOADS
from imaml.cli._environment import environment as machine

RESULTS = Path(__file__).parent / "results" / "jax"
STEPS = {"W1": (1, 5, 10, 50), "W2": (1, 5, 16), "W2-15": (5,), "W2-implicit": (16,), "W3": (1, 4, 16)}
"""What is measured if nothing is asked for."""
LEFT_OUT = ("imaml MAML, chunk_size=1", "imaml MAML, checkpoints=4", "imaml ImplicitMAML, linearize=False")
TORCH = ("torch.func, vmap inside", "torch.func, vmap outside", "create_graph loop")
HEADINGS = ("CPU, ms", "JAX = 1", "spread", "first call, CPU s", "warm", "peak MB", "off JAX by", "rounds")


class Here:
    """A method in a process of its own, with the interface of `Elsewhere`."""

    def __init__(self, method: str, workload: str, steps: int, variables: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.answer", method, workload, str(steps)]
        paths = [str(ROOT), str(ROOT / "solvers"), *environment.search_path()]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.process, self._folder = Process(command, {**variables, **threads}), tempfile.TemporaryDirectory()

    def start(self) -> dict[str, float]:
        return self.process.ask("first")

    def seconds(self, calls: int = 1) -> dict[str, float]:
        return self.process.ask(f"call {calls}")

    def peak_memory(self) -> int:
        return int(self.process.ask("memory")["bytes"])

    def gradient(self) -> torch.Tensor:
        file = Path(self._folder.name) / "gradient.npy"
        self.process.ask(f"gradient {file}")
        return torch.from_numpy(np.load(file))

    def close(self) -> None:
        self.process.close()
        self._folder.cleanup()


def started(method: str, workload: str, steps: int, cache: Path) -> Here | Elsewhere:
    kept = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "XDG_CACHE_HOME": str(cache / "user"),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    if METHODS[method].where.startswith("jax:"):
        way, family = METHODS[method].where.removeprefix("jax:"), METHODS[method].family
        way = {"implicit": "reverse", "implicit_lean": "lean"}.get(way, way)
        return Elsewhere(WORKLOADS[workload].problem(steps), way, family, kept)
    return Here(method, workload, steps, kept)


class Turns:
    """The methods of one workload and K, each with a row of what was measured, or of why it was not.

    A turn is calls in a row for `turn` seconds, at least one: in use one call follows the other and finds what it needs
    in the caches. Single calls of W1, K = 1 take JAX twice as long.
    """

    def __init__(self, workload: str, steps: int, methods: Sequence[str], turn: float) -> None:
        self.workload, self.steps, self.turn = workload, steps, turn
        self.rows: dict[str, dict[str, Any]] = {name: {"method": name} for name in methods}
        self._running: dict[str, Here | Elsewhere] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._taken: dict[str, list[float]] = {name: [] for name in methods}
        self._calls: dict[str, int] = {}

    def measure(self, repeats: int, seconds: float) -> list[dict[str, Any]]:
        """All rows; at least one round of turns, and no new one after so many seconds."""
        with tempfile.TemporaryDirectory() as folder:
            for number, name in enumerate(self.rows):
                self._attempt(name, partial(self._start, name, Path(folder) / str(number)))
            began = time.perf_counter()
            for what in (self._count, *[self._take] * repeats):
                if what == self._take and all(self._taken[n] for n in self._running):
                    if time.perf_counter() - began > seconds:
                        break
                for name in list(self._running):
                    self._attempt(name, partial(what, name))
            for name in list(self._running):
                self._attempt(name, partial(self._sum_up, name))
            for process in self._running.values():
                process.close()
        return list(self.rows.values())

    def _attempt(self, name: str, what: Callable[[], None]) -> None:
        try:
            what()
        except (RuntimeError, OSError, NotImplementedError) as failure:
            self.rows[name]["reason"] = str(failure)
            if name in self._running:
                self._running.pop(name).close()

    def _start(self, name: str, cache: Path) -> None:
        """The first call; and once more in a new process where something was compiled, but for JAX's long compilations.

        No goal is about the latter, and transformers take minutes.
        """
        in_jax = name.startswith("JAX")
        twice = "compile" in name or (in_jax and not WORKLOADS[self.workload].attention)
        for state in ("cold", "warm") if twice else ("cold",):
            if name in self._running:
                self._running.pop(name).close()
            self._running[name] = started(name, self.workload, self.steps, cache)
            self.rows[name][f"first_{state}"] = self._running[name].start()["cpu"]
        self._gradients[name] = self._running[name].gradient()

    def _count(self, name: str) -> None:
        """How many calls a turn has. Where it is one, this was one."""
        single = self._running[name].seconds()["cpu"]
        if single < self.turn:
            single = min(single, self._running[name].seconds()["cpu"])
        self._calls[name] = max(1, round(self.turn / single))
        if self._calls[name] == 1:
            self._taken[name].append(single)

    def _take(self, name: str) -> None:
        self._taken[name].append(self._running[name].seconds(self._calls[name])["cpu"])

    def _sum_up(self, name: str) -> None:
        times, found = self._taken[name], self._gradients[name]
        row = {"cpu": median(times), "spread": max(times) - min(times), "rounds": len(times)}
        jax = self._gradients.get(_jax(name))
        if jax is not None:
            row["off_jax"] = ((found - jax).norm() / jax.norm()).item()
        self.rows[name] |= row | {"bytes": self._running[name].peak_memory()}


def _jax(method: str) -> str:
    """JAX's method of the same family."""
    return "JAX, implicit" if METHODS[method].family == "implicit" else "JAX"


def fitting(workload: str, chosen: Sequence[str] | None) -> list[str]:
    """The methods that run on a workload: those asked for, or those that the goals speak of."""
    names = []
    for name, method in METHODS.items():
        fits = method.family in WORKLOADS[workload].families and (not method.only or workload in method.only)
        asked = name in chosen if chosen else _by_default(name, workload)
        if fits and asked:
            names.append(name)
    return names


def _by_default(name: str, workload: str) -> bool:
    if workload == "W3" and (name in TORCH[:2] or METHODS[name].family == "implicit"):
        return False
    ours = name.startswith("imaml") and METHODS[name].family != "first-order" and name not in LEFT_OUT
    return ours or name in TORCH or (name.startswith("JAX") and name != "JAX, forward-over-reverse")


def page(folder: Path) -> str:
    """The tables and the goals of all files of the folder."""
    runs = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    runs.sort(key=lambda run: (list(WORKLOADS).index(run["workload"]), run["steps"]))
    lines = ["# Beside JAX", "", *NOTES, ""]
    for run in runs:
        about = run["about"]
        name = f"{run['workload']}, K = {run['steps']}: {WORKLOADS[run['workload']].title}"
        where = f"{about['cpu']}, one thread, torch {about['torch']}, JAX {about['jax']}; load {about['load']}."
        rows = [[row["method"], *_cells(row, run["rows"])] for row in run["rows"]]
        lines += [f"## {name}", "", where, "", *tables.rows(("method", *HEADINGS), rows), ""]
    figures = [figure(run["workload"], run["steps"], row) for run in runs for row in run["rows"]]
    goals = tables.goal_rows(figures, BESIDE_JAX)
    return "\n".join([*lines, "## Goals", "", *tables.rows(tables.GOAL_HEADINGS, goals), ""])


NOTES = (
    "Made by `python -m benchmarks.against_jax`: processor time of one meta-gradient (median), each method in a",
    "process of its own and all of them in turns. A turn is a tenth of a second of calls in a row,",
    "and at least one.",
    "",
    "- **first call**: processor time of a process's first call, with all that it compiles; **warm**: in a second",
    "  process that finds what the first one has left on disk.",
    "- **peak MB**: by torch's allocator, for JAX by XLA's account of temporary memory and results. Neither counts the",
    "  parameters and tasks that were there before (1 MB = 10^6 bytes).",
    "- **off JAX by**: the relative difference of the meta-gradients, both in float32; on Conv4 it is rounding",
    "  (`python -m benchmarks.compare` compares in float64).",
    "- `JAX` is `grad` through the inner loop. `JAX, leanest` is a sweep with forward-over-reverse products over",
    "  layers in a scan that recomputes each of them.",
)


def _cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    if "reason" in row:
        return [row["reason"], *[""] * (len(HEADINGS) - 1)]
    times = {r["method"]: r["cpu"] for r in rows if "cpu" in r}
    jax = times.get(_jax(row["method"]))
    warm, off = row.get("first_warm"), row.get("off_jax")
    return [
        tables.number(1e3 * row["cpu"]),
        "" if jax is None else f"{row['cpu'] / jax:.2f}",
        tables.number(1e3 * row["spread"]),
        f"{row['first_cold']:.1f}",
        "" if warm is None else f"{warm:.1f}",
        tables.number(row["bytes"] / 1e6),
        "" if off is None else f"{off:.0e}",
        str(row["rounds"]),
    ]


def figure(workload: str, steps: int, row: dict[str, Any]) -> Figure:
    return Figure(
        workload=workload,
        steps=steps,
        method=row["method"],
        seconds=row.get("cpu"),
        bytes=row.get("bytes"),
        first=row.get("first_cold"),
        first_warm=row.get("first_warm"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=list(STEPS))
    parser.add_argument("--steps", nargs="*", type=int, help="inner steps K; those of the goals if not given")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="those that the goals speak of if not given")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of calls, after the first ones")
    parser.add_argument("--seconds", type=float, default=20.0, help="no new round after so long, but one in any case")
    parser.add_argument("--turn", type=float, default=0.1, help="seconds of calls in a row; 0: one call")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options, console = parser.parse_args(), Console()
    if hasattr(os, "sched_setaffinity"):  # one processor for all of them
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"jax": environment.versions().get("jax", "absent")}
    for workload in options.workloads:
        for steps in options.steps or STEPS.get(workload, WORKLOADS[workload].steps):
            methods = fitting(workload, options.methods)
            about = machine() | versions | {"load": round(os.getloadavg()[0], 1)}
            with console.status(f"{workload}, K = {steps}"):
                rows = Turns(workload, steps, methods, options.turn).measure(options.repeats, options.seconds)
            about["turn"] = options.turn
            run = {"workload": workload, "steps": steps, "about": about, "rows": rows}
            (options.out / f"{workload}-{steps}.json").write_text(json.dumps(run, indent=1) + "\n")
            console.print(f"{workload}, K = {steps}", *HEADINGS, sep=" | ", highlight=False)
            for row in rows:
                console.print(row["method"], *_cells(row, rows), sep=" | ", highlight=False, markup=False)
    (options.out / "README.md").write_text(page(options.out))


if __name__ == "__main__":
    main()
