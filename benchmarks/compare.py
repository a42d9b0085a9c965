"""This library and its rivals side by side: error, time and memory of one meta-gradient.

    python -m benchmarks.compare [--workloads W1 ...] [--steps 5 ...] [--methods ...] [--passes check memory ...]

Every measurement runs in a fresh process, the methods alternating; `results.jsonl` in the output folder grows by one
line for each, and the tables, the goals and `report.html` are made from all of its lines. Rivals are fetched first into
a folder of their own; what does not install or run is listed with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import report, tables
from benchmarks.one import PASSES
from benchmarks.rivals import METHODS, environment
from benchmarks.summary import read
from benchmarks.workloads import WORKLOADS
from imaml.cli._environment import environment as machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "rivals"


def measure(method: str, workload: str, steps: int, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row: what `benchmarks.one` measured in a fresh process, or why it did not."""
    command = [sys.executable, "-m", "benchmarks.one", method, workload, str(steps), kind]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    paths = [str(ROOT), str(ROOT / "solvers"), os.environ.get("PYTHONPATH", ""), *environment.search_path()]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    row: dict[str, Any] = {"workload": workload, "steps": steps, "method": method, "pass": kind}
    row |= {"threads": options.threads, "load": round(os.getloadavg()[0], 2)}
    try:
        run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return row | {"reason": f"took more than {options.timeout} s"}
    if run.returncode == 0:
        return row | json.loads(run.stdout)
    lines = [line for line in run.stderr.splitlines() if line and not line[0].isspace()]
    return row | {"reason": lines[-1] if lines else f"ended with exit code {run.returncode}"}


def remember(file: Path, about: dict[str, Any]) -> None:
    """Add a run to the list of those that the results came from."""
    runs = json.loads(file.read_text()) if file.exists() else []
    file.write_text(json.dumps([*runs, about], indent=2) + "\n")


def plan(options: argparse.Namespace) -> Iterator[tuple[str, str, int, str]]:
    """Which measurements, in which order: the methods alternate within a pass, and timing goes round and round."""
    for name in options.workloads:
        workload = WORKLOADS[name]
        for steps, kind in product(options.steps or workload.steps, options.passes):
            for method_name in (options.methods or METHODS) * (options.rounds if kind == "time" else 1):
                method = METHODS[method_name]
                if method.family in workload.families and (not method.only or name in method.only):
                    yield method_name, name, steps, kind


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="*", choices=WORKLOADS, default=["W1", "W2", "W2-implicit", "W3", "W4"])
    parser.add_argument("--steps", nargs="*", type=int, help="inner steps K; those of the workload if not given")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--passes", nargs="*", choices=PASSES, default=list(PASSES))
    parser.add_argument("--rounds", type=int, default=2, help="processes that each method is timed in")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls in a process, after one that is not timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a process may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-install", action="store_true", help="leave the rivals' folder as it is")
    return parser.parse_args()


def main() -> None:
    options, console = parse(), Console()
    options.out.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    if not options.no_install:
        with console.status("Fetching the rivals"):
            failed = environment.install()
    for package, reason in failed.items():
        console.print(f"{package} did not install: {reason}", markup=False)
    about = machine() | {"command": shlex.join(["python", "-m", "benchmarks.compare", *sys.argv[1:]])}
    about |= {"threads": options.threads, "rivals": environment.versions(), "not_installed": failed}
    remember(options.out / "environment.json", about)
    todo = list(plan(options))
    with console.status("") as status, (options.out / "results.jsonl").open("a") as results:
        for number, (method, workload, steps, kind) in enumerate(todo, start=1):
            status.update(f"{number}/{len(todo)} {kind} {workload} K = {steps}, {method}")
            results.write(json.dumps(measure(method, workload, steps, kind, options)) + "\n")
            results.flush()
    figures = read(options.out / "results.jsonl")
    for table in tables.rich(figures):
        console.print(table)
    (options.out / "README.md").write_text(tables.markdown(figures, about))
    report.write(options.out / "report.html", figures, about)


if __name__ == "__main__":
    main()
