"""`imaml compare`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from time import monotonic
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from imaml.cli._arena import Arena
from imaml.cli._environment import environment
from imaml.cli._metric import Metric
from imaml.cli._options import Compare, EngineOptions, Strategy
from imaml.cli._outcome import COLORS, FOOTNOTES, NAMES, Outcome, columns
from imaml.cli._presets import PRESETS
from imaml.cli._problem import applies, build_engine, build_problem, check_given, given
from imaml.cli._progress import say
from imaml.cli._report import write_report
from imaml.training import make_folder, replace_file


def compare(options: Compare) -> int:
    """Train every strategy in turn, print the table and write the report.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code, 0.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    began = monotonic()
    console = Console()
    problem = build_problem(options.episodes, options.machine)
    engines = _engines(options)
    settings = {
        "episodes": asdict(options.episodes),
        "plan": asdict(options.plan),
        "engines": {strategy: asdict(engine) for strategy, engine in engines.items()},
        **environment(),
    }
    make_folder(options.folder)
    _write(options, settings, [])
    with console.status("Preparing the tasks"):
        probe = problem.episodes.batch("val", 0, options.plan.meta_batch).to(device=options.machine.device)
    arena = Arena(problem=problem, plan=options.plan, probe=probe, console=console)
    outcomes: list[Outcome] = []
    for number, (strategy, engine) in enumerate(engines.items(), start=1):
        seconds = None
        if options.plan.minutes is not None:
            seconds = (began + 60 * options.plan.minutes - monotonic()) / (len(engines) - number + 1)
        label = f"{number}/{len(engines)} {NAMES[strategy]}"
        outcomes.append(arena.judge(strategy, engine, label=label, seconds=seconds))
        _write(options, settings, outcomes)
    console.print(_table(outcomes, problem.metric))
    for note in FOOTNOTES:
        console.print(Text(note, style="dim"))
    report = write_report(options.folder, outcomes, problem.metric, settings)
    say(console, f"Report: {report.resolve().as_uri()}")
    return 0


def _engines(options: Compare) -> dict[Strategy, EngineOptions]:
    """For each strategy the defaults of the dataset, and what was given as far as it applies."""
    check_given(options.engine, options.strategies)
    chosen = given(options.engine)
    presets = PRESETS[options.episodes.dataset].engines
    engines = {
        strategy: replace(presets[strategy], **{n: value for n, value in chosen.items() if applies(n, strategy)})
        for strategy in options.strategies
    }
    for strategy, engine in engines.items():
        build_engine(strategy, engine)  # raises for a bad value before anything is trained
    return engines


def _write(options: Compare, settings: dict[str, Any], outcomes: list[Outcome]) -> None:
    results = {"settings": settings, "outcomes": [asdict(outcome) for outcome in outcomes]}
    text = json.dumps(results, indent=2, default=str) + "\n"
    replace_file(options.folder / "results.json", lambda stream: stream.write(text.encode()))


def _table(outcomes: list[Outcome], metric: Metric) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("strategy", no_wrap=True)
    shown = columns(metric)
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=heading.startswith("test"))
    for outcome in outcomes:
        name = Text(NAMES[outcome.strategy], style=f"bold {COLORS[outcome.strategy]}")
        table.add_row(name, *(text(outcome) for text in shown.values()))
    return table
