"""`imaml compare`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from time import monotonic
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from imaml.cli import _presets
from imaml.cli._arena import Arena
from imaml.cli._compare_report import write_report
from imaml.cli._environment import environment
from imaml.cli._experiment import applies, build_engine, build_experiment, check_given, given
from imaml.cli._memory_curves import MemoryCurve, memory_curves, sentence
from imaml.cli._metric import Metric
from imaml.cli._options import Compare, EngineOptions, Strategy
from imaml.cli._presets import PRESETS
from imaml.cli._progress import say
from imaml.cli._result import COLORS, FOOTNOTES, NAMES, Result, columns
from imaml.cli._time_left import TimeLeft
from imaml.cli._toml import save_toml
from imaml.training import Plan, make_folder, replace_file


def compare(options: Compare) -> int:
    """Measure every strategy, train one after the other, print the table and write the report.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code, 0.
    """
    deadline = None if options.plan.minutes is None else monotonic() + 60 * options.plan.minutes
    console = Console()
    experiment = build_experiment(options.episodes, options.machine)
    engines, plans = _engines(options), _plans(options)
    settings = {
        "episodes": asdict(options.episodes),
        "why": PRESETS[options.episodes.dataset].why,
        "minutes": options.plan.minutes,
        "engines": {strategy: asdict(engine) for strategy, engine in engines.items()},
        "plans": {strategy: asdict(plan) for strategy, plan in plans.items()},
        **environment(),
    }
    make_folder(options.folder)
    save_toml(options.folder, options, _presets.compare(options.episodes.dataset))
    _write(options, settings, [], [])
    say(console, _threads())
    with console.status("Preparing the tasks"):
        probe = experiment.episodes.batch("val", 0, max(plan.meta_batch for plan in plans.values()))
    arena = Arena(experiment=experiment, probe=probe.to(device=options.machine.device), console=console)
    with console.status("Memory by inner steps"):
        curves = memory_curves(experiment, engines, arena.probe)
    contenders = []
    for strategy, engine in engines.items():
        with console.status(f"{NAMES[strategy]}: measuring"):
            contenders.append(arena.enter(strategy, engine, plans[strategy]))
    left = TimeLeft(sum(contender.seconds for contender in contenders), deadline)
    say(console, f"{left} left: {', '.join(f'{NAMES[s]} {plan.steps:,} meta-steps' for s, plan in plans.items())}.")
    results: list[Result] = []
    for number, contender in enumerate(contenders, start=1):
        seconds = None if deadline is None else (deadline - monotonic()) / (len(contenders) - number + 1)
        label = f"{number}/{len(contenders)} {NAMES[contender.strategy]}"
        results.append(arena.judge(contender, label=label, seconds=seconds, left=left))
        _write(options, settings, results, curves)
    say(console, f"\n{sentence(curves)}")
    console.print(_table(results, experiment.metric))
    for note in FOOTNOTES:
        console.print(Text(note, style="dim"))
    report = write_report(options.folder, results, curves, experiment.metric, settings)
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


def _plans(options: Compare) -> dict[Strategy, Plan]:
    """For each strategy the defaults of the dataset, and what was given."""
    chosen = {name: value for name, value in given(options.plan).items() if name != "minutes"}
    presets = PRESETS[options.episodes.dataset].plans
    plans = {strategy: replace(presets[strategy], **chosen) for strategy in options.strategies}
    for plan in plans.values():
        plan.make_optimizer([nn.Parameter(torch.zeros(1, 1))])  # raises for a bad option before anything is trained
    return plans


def _threads() -> str:
    threads = torch.get_num_threads()
    if threads == 1:
        return "One thread, which other programs disturb little; --threads takes more, for an idle machine."
    return f"{threads} threads. Where other programs run, --threads 1 is several times faster."


def _write(options: Compare, settings: dict[str, Any], results: list[Result], curves: list[MemoryCurve]) -> None:
    content = {
        "settings": settings,
        "memory": [asdict(curve) for curve in curves],
        "outcomes": [asdict(result) for result in results],
    }
    text = json.dumps(content, indent=2, default=str) + "\n"
    replace_file(options.folder / "results.json", lambda stream: stream.write(text.encode()))


def _table(results: list[Result], metric: Metric) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("strategy", no_wrap=True)
    shown = columns(metric)
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=heading.startswith("test"))
    for result in results:
        name = Text(NAMES[result.strategy], style=f"bold {COLORS[result.strategy]}")
        table.add_row(name, *(text(result) for text in shown.values()))
    return table
