"""`imaml plan`."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from imaml.cli._engines import engines
from imaml.cli._experiment import set_up
from imaml.cli._factory import make
from imaml.cli._options import MachineOptions, Strategy
from imaml.cli._plan_options import Predict
from imaml.cli._progress import say
from imaml.cli._result import NAMES
from imaml.planning import Forecast
from imaml.planning._bytes import parse
from imaml.planning._forecast import HEADINGS, cells

_COST = (
    "Cost: gradients of one task, with a Hessian-vector product as 3, or 2 where the graph of the gradient is kept. "
    "Settings that save less than a tenth of the memory of a faster one are left out."
)


def plan(options: Predict) -> int:
    """Predict every setting, print the table and which to use.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: Bad input, said in one sentence.
    """
    console = Console()
    memory = None if options.memory is None else parse(options.memory)
    set_up(MachineOptions(threads=options.threads))
    made = make(options.problem)
    found: dict[Strategy, Forecast[Any]] = {}
    reasons: list[str] = []
    for strategy, engine in engines(made, options.strategies, options.engine):
        if isinstance(engine, str):
            say(console, f"{NAMES[strategy]} is left out: {engine}")
            continue
        with console.status(NAMES[strategy]):
            try:
                found[strategy] = engine.plan(made.objective, made.tasks, memory=memory)
            except ValueError as error:
                reasons.append(str(error))
                say(console, f"{NAMES[strategy]} is left out: {error}")
            except (TypeError, RuntimeError) as error:
                raise ValueError(f"{options.problem}: {error}") from error
    if not found:
        raise ValueError(reasons[0])
    console.print(_table(found))
    for strategy, forecast in found.items():
        say(console, f"{NAMES[strategy]}: {forecast.advice}")
    took = sum(forecast.gradients for forecast in found.values()), sum(forecast.hvps for forecast in found.values())
    say(console, f"{_COST} Looking took {took[0]} gradients and {took[1]} products.")
    return 0


def _table(found: dict[Strategy, Forecast[Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, heading in enumerate(("strategy", *HEADINGS)):
        table.add_column(heading, justify="right" if number > 1 else "left", no_wrap=number != 1)
    for strategy, forecast in found.items():
        for setting in forecast.front:
            table.add_row(NAMES[strategy], *cells(setting), style="bold" if setting is forecast.best else None)
        table.add_section()
    return table
