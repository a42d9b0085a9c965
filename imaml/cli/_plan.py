"""`imaml plan`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rich import box
from rich.console import Console
from rich.table import Table

from imaml import MetaGradient
from imaml.cli._bench import DEFAULTS, like
from imaml.cli._factory import Made, make
from imaml.cli._options import MachineOptions, Strategy
from imaml.cli._outcome import NAMES
from imaml.cli._plan_options import Forecast as Options
from imaml.cli._problem import applies, build_engine, set_up
from imaml.cli._progress import say
from imaml.planning import Forecast
from imaml.planning._forecast import HEADINGS, cells
from imaml.planning._memory import parse

_COST = (
    "Cost: gradients of one task, with a Hessian-vector product as 3, or 2 where the graph of the gradient is kept. "
    "Settings that save less than a tenth of the memory of a faster one are left out."
)


def plan(options: Options) -> int:
    """Predict every setting, print the table and which to use.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: Bad input, said in one sentence.
    """
    console = Console()
    if not options.strategies:
        raise ValueError("--strategies needs at least one strategy. Got none.")
    memory = None if options.memory is None else parse(options.memory)
    set_up(MachineOptions(threads=options.threads))
    made = make(options.problem)
    found: dict[Strategy, Forecast] = {}
    for strategy, engine in _engines(made, options):
        with console.status(NAMES[strategy]):
            try:
                found[strategy] = engine.plan(made.objective, made.tasks, memory=memory)
            except (TypeError, RuntimeError) as error:
                raise ValueError(f"{options.problem}: {error}") from error
    console.print(_table(found))
    for strategy, forecast in found.items():
        say(console, f"{NAMES[strategy]}: {forecast.advice}")
    took = sum(forecast.gradients for forecast in found.values()), sum(forecast.hvps for forecast in found.values())
    say(console, f"{_COST} Looking took {took[0]} gradients and {took[1]} products.")
    return 0


def _engines(made: Made, options: Options) -> Iterator[tuple[Strategy, MetaGradient]]:
    """The problem's own engine for its strategy, unless options change it, and the others with its inner loop."""
    given = {name: value for name, value in vars(options.engine).items() if value is not None}
    for strategy in options.strategies:
        own = {name: value for name, value in given.items() if applies(name, strategy)}
        engine = build_engine(strategy, replace(DEFAULTS[strategy], **own))
        if not own and isinstance(made.subject, MetaGradient) and type(made.subject) is type(engine):
            yield strategy, made.subject
        else:
            yield strategy, like(engine, made.subject, own)


def _table(found: dict[Strategy, Forecast]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, heading in enumerate(("strategy", *HEADINGS)):
        table.add_column(heading, justify="right" if number > 1 else "left", no_wrap=number != 1)
    for strategy, forecast in found.items():
        for setting in forecast.front:
            table.add_row(NAMES[strategy], *cells(setting), style="bold" if setting is forecast.best else None)
        table.add_section()
    return table
