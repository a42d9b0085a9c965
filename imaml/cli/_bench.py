"""`imaml bench`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from imaml import ImplicitMAML, MetaGradient
from imaml._tasks import group as by_shape
from imaml.cli._bench_costs import RAISED, Candidate, Cost, measure
from imaml.cli._bench_figures import scatter
from imaml.cli._bench_options import Bench
from imaml.cli._engines import engines
from imaml.cli._environment import environment
from imaml.cli._experiment import given, set_up
from imaml.cli._factory import Made, make
from imaml.cli._options import MachineOptions
from imaml.cli._page import Drawing, Section, save_figures, write_page
from imaml.cli._progress import log_shown, say
from imaml.cli._result import NAMES
from imaml.planning._candidates import worth_recomputing
from imaml.planning._forecast import as_written
from imaml.planning._predict import costs_of
from imaml.planning._settings import few
from imaml.training import make_folder, replace_file

HEADINGS = ("setting", "ms", "spread", "gradients", "peak MB", "error")
NOTES = (
    "ms: median of a meta-gradient over rounds in which all settings take turns; spread: slowest less fastest. "
    "Gradients (gradient-equivalents): that time over the one of a plain support gradient of all tasks, one after the "
    "other.",
    "Peak MB: what a meta-gradient holds at once, in 10^6 bytes. Error: relative, against the exact derivative in "
    "float64 of the query loss through the inner loop that the setting runs. For FOMAML it is its bias; for iMAML it "
    "includes how far the loop is from the stationary point that it differentiates. Empty where that loop has no "
    "derivative (NewtonCG, TorchOptimizer, early stopping).",
    "To use: the fastest setting, or a leaner one that is as fast within the spread of the fastest.",
)


def bench(options: Bench) -> int:
    """Measure every setting, print the table and the advice, and write the report.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: Bad input, said in one sentence.
    """
    console = Console()
    if options.memory is not None and not options.memory > 0:
        raise ValueError(f"--memory must be more than 0 MB. Got {options.memory:g}.")
    set_up(MachineOptions(threads=options.threads))
    made = make(options.problem)
    chosen = list(_candidates(made, options, console))
    make_folder(options.out)
    try:
        with log_shown(console):
            costs = measure(made, chosen, memory=options.memory, repeats=options.repeats, console=console)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{options.problem}: {error}") from error
    advice = [*_advice(costs, options.memory), *_failures(costs)]
    console.print(_table(costs))
    for line in advice:
        say(console, line)
    lines = "".join(json.dumps(asdict(cost)) + "\n" for cost in costs)
    replace_file(options.out / "results.jsonl", lambda stream: stream.write(lines.encode()))
    section = Section(
        title="Every setting",
        headings=HEADINGS,
        rows=[_cells(cost) for cost in costs],
        drawings=_drawings(costs),
    )
    save_figures(options.out, [section])
    report = options.out / "report.html"
    write_page(
        report,
        "costs.html.j2",
        title=options.problem,
        lead=f"What one meta-gradient of {len(made.tasks)} tasks costs.",
        advice=advice,
        sections=[section],
        notes=NOTES,
        settings=environment(),
    )
    say(console, f"Report: {report.resolve().as_uri()}")
    return 0


def _candidates(made: Made, options: Bench, console: Console) -> Iterator[Candidate]:
    """The engine of each strategy as it is, and those settings of it that change none of the given options."""
    fixed = given(options.engine).keys()
    for strategy, engine in engines(made, options.strategies, options.engine):
        if isinstance(engine, str):
            say(console, f"{NAMES[strategy]} is left out: {engine}")
            continue
        if isinstance(engine, ImplicitMAML):  # the same tasks are solved over and over
            engine = replace(engine, warm_start=False, on_failure="ignore")
        for changes in (*few(costs_of(engine), made.device, len(made.tasks)), *_recomputing(engine, made)):
            changed = replace(engine, **changes)
            if not changes or changed != engine and not changes.keys() & fixed:
                setting = ", ".join([NAMES[strategy], *([as_written(changes)] if changes else [])])
                yield Candidate(strategy=strategy, setting=setting, engine=changed)


def _recomputing(engine: MetaGradient, made: Made) -> list[dict[str, Any]]:
    """The leanest setting that recomputes, where the engine leaves that open and it may pay."""
    batch = by_shape(made.tasks)[0][1]
    try:
        return [{"chunk_size": 1, "recompute": b} for b in islice(worth_recomputing(engine, made.objective, batch), 1)]
    except RAISED:  # by the problem, whose own row will say so
        return []


def _advice(costs: list[Cost], limit: float | None) -> Iterator[str]:
    """For each strategy the fastest setting, or a leaner one that is as fast within the spread; and the leanest."""
    within = "" if limit is None else f" within {limit:g} MB"
    for strategy in dict.fromkeys(cost.strategy for cost in costs):
        own = [cost for cost in costs if cost.strategy == strategy and cost.seconds is not None]
        if not own:
            failed = all(cost.failure for cost in costs if cost.strategy == strategy)
            yield f"{NAMES[strategy]}: no setting " + ("runs." if failed else f"stays{within or ' in memory'}.")
            continue
        first = min(own, key=_seconds)
        alike = [cost for cost in own if _seconds(cost) <= _seconds(first) + (first.spread or 0)]
        fastest, leanest = min(alike, key=_bytes), min(own, key=lambda cost: (_bytes(cost), _seconds(cost)))
        text = f"{NAMES[strategy]}: use{within} {_short(fastest)}"
        yield text + (", the leanest too." if fastest == leanest else f"; the leanest is {_short(leanest)}.")


def _failures(costs: list[Cost]) -> Iterator[str]:
    """One line for each different failure."""
    for failure in dict.fromkeys(cost.failure for cost in costs if cost.failure):
        yield f"{'; '.join(cost.setting for cost in costs if cost.failure == failure)} failed: {failure}"


def _short(cost: Cost) -> str:
    return f"{cost.setting} ({_scaled(cost.seconds, 1e3)} ms, {_scaled(cost.bytes, 1e-6)} MB)"


def _seconds(cost: Cost) -> float:
    assert cost.seconds is not None
    return cost.seconds


def _bytes(cost: Cost) -> int:
    assert cost.bytes is not None
    return cost.bytes


def _drawings(costs: list[Cost]) -> dict[str, Drawing]:
    timed = [cost for cost in costs if cost.seconds is not None]
    sizes = {cost.setting: (1e3 * _seconds(cost), _bytes(cost) / 1e6) for cost in timed}
    errors = {cost.setting: (1e3 * _seconds(cost), cost.error) for cost in timed if cost.error}
    x = "ms per meta-gradient"
    drawings: dict[str, Drawing] = {}
    if sizes:
        front = partial(scatter, sizes, x, "peak MB", front=True)
        drawings["Memory against time; the line joins what nothing beats in both"] = front
    if errors:
        drawings["Error against time"] = partial(scatter, errors, x, "relative error")
    return drawings


def _cells(cost: Cost) -> list[str]:
    """Under `HEADINGS`; the reason stands in place of an error."""
    numbers = [_scaled(cost.seconds, 1e3), _scaled(cost.spread, 1e3), _scaled(cost.equivalents, 1)]
    error = cost.reason or ("" if cost.error is None else f"{cost.error:.1e}")
    return [cost.setting, *numbers, _scaled(cost.bytes, 1e-6), error]


def _scaled(value: float | None, scale: float) -> str:
    return "" if value is None else f"{scale * value:.3g}" if scale * value < 100 else f"{scale * value:.0f}"


def _table(costs: list[Cost]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
    for cost in costs:
        table.add_row(*_cells(cost))
    return table
