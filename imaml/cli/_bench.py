"""`imaml bench`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from imaml import GradientDescent, ImplicitMAML, MetaGradient
from imaml.cli._bench_figures import scatter
from imaml.cli._bench_options import Bench
from imaml.cli._bench_settings import Setting, settings
from imaml.cli._environment import environment
from imaml.cli._exact_gradient import exact_gradient, flat
from imaml.cli._factory import Made, make
from imaml.cli._options import EngineOptions, MachineOptions, Strategy
from imaml.cli._outcome import NAMES
from imaml.cli._page import Drawing, Section, write_page
from imaml.cli._problem import applies, build_engine, set_up
from imaml.cli._progress import say
from imaml.measure import peak_memory, timed_in_turn
from imaml.training import replace_file

DEFAULTS: dict[Strategy, EngineOptions] = {
    "maml": EngineOptions(inner_lr=0.01, inner_steps=5),
    "fomaml": EngineOptions(inner_lr=0.01, inner_steps=5),
    "imaml": EngineOptions(inner_lr=0.01, inner_steps=5, regularization=2.0, cg_steps=5),
}
HEADINGS = ("setting", "ms", "spread", "gradients", "peak MB", "error")
NOTES = (
    "ms: median of a meta-gradient over rounds in which all settings take turns; spread: slowest less fastest. "
    "Gradients (gradient-equivalents): that time over the one of a plain support gradient of all tasks, one after the "
    "other.",
    "Peak MB: what a meta-gradient holds at once, in 10^6 bytes. Error: relative, against the exact derivative in "
    "float64 of the query loss through the inner loop that the setting runs. For FOMAML it is its bias; for iMAML it "
    "includes how far the loop is from the stationary point that it differentiates.",
    "To use: the fastest setting, or a leaner one that is as fast within the spread of the fastest.",
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one setting was measured to cost; None: not measured."""

    strategy: Strategy
    setting: str
    bytes: int | None = None
    seconds: float | None = None
    spread: float | None = None
    equivalents: float | None = None
    error: float | None = None
    reason: str | None = None
    """Why something was not measured."""

    @property
    def cells(self) -> list[str]:
        """Under `HEADINGS`; the reason stands in place of an error."""
        numbers = [_scaled(self.seconds, 1e3), _scaled(self.spread, 1e3), _scaled(self.equivalents, 1)]
        error = self.reason or ("" if self.error is None else f"{self.error:.1e}")
        return [self.setting, *numbers, _scaled(self.bytes, 1e-6), error]


def bench(options: Bench) -> int:
    """Measure every setting, print the table and the advice, and write the report.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: Bad input, said in one sentence.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    console = Console()
    set_up(MachineOptions(threads=options.threads))
    made = make(options.problem)
    try:
        costs = _measure(made, list(_settings(made, options)), options, console)
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{options.problem}: {error}") from error
    advice = list(_advice(costs, options.memory))
    console.print(_table(costs))
    for line in advice:
        say(console, line)
    options.out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(cost)) + "\n" for cost in costs)
    replace_file(options.out / "results.jsonl", lambda stream: stream.write(lines.encode()))
    section = Section(
        title="Every setting",
        headings=HEADINGS,
        rows=[cost.cells for cost in costs],
        drawings=_drawings(costs),
    )
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


def _settings(made: Made, options: Bench) -> Iterator[Setting]:
    if not options.strategies:
        raise ValueError("--strategies needs at least one strategy. Got none.")
    given = {name: value for name, value in vars(options.engine).items() if value is not None}
    for strategy in options.strategies:
        own = {name: value for name, value in given.items() if applies(name, strategy)}
        engine = like(build_engine(strategy, replace(DEFAULTS[strategy], **own)), made.subject, own)
        yield from settings(strategy, engine, tasks=len(made.tasks), given=own)


def like(engine: MetaGradient, subject: object, given: dict[str, Any]) -> MetaGradient:
    """With the inner loop, and where it has them the regularization and solver, of the problem's own engine."""
    if not isinstance(subject, MetaGradient):
        return engine
    lr, steps = (given.get(f"inner_{name}", getattr(subject.inner, name)) for name in ("lr", "steps"))
    engine = replace(engine, inner=GradientDescent(lr=lr, steps=steps))
    if subject.regularization and "regularization" not in given:
        engine = replace(engine, regularization=subject.regularization)
    if isinstance(engine, ImplicitMAML) and isinstance(subject, ImplicitMAML) and "cg_steps" not in given:
        engine = replace(engine, solver=subject.solver)
    return engine


def _measure(made: Made, chosen: list[Setting], options: Bench, console: Console) -> list[Cost]:
    """Memory first; then times, in turn, of what stays within the limit; then errors."""
    objective, tasks = made.objective, made.tasks
    device = next(iter(objective.parameters().values())).device
    calls: dict[str, Callable[[], object]] = {}
    costs: dict[str, Cost] = {}
    for setting in chosen:
        with console.status(f"{setting.name}: memory"):
            call = partial(setting.engine.value_and_grad, objective, tasks)
            cost = Cost(strategy=setting.strategy, setting=setting.name)
            try:
                call()  # what torch sets up once is not counted
                cost = replace(cost, bytes=peak_memory(call, device=device))
            except torch.OutOfMemoryError:
                cost = replace(cost, reason="out of memory")
        if cost.bytes is not None and options.memory is not None and cost.bytes > 1e6 * options.memory:
            cost = replace(cost, reason=f"over {options.memory:g} MB")
        costs[setting.name] = cost
        if cost.reason is None:
            calls[setting.name] = call
    with console.status("Timing"):
        unit, *timings = timed_in_turn([partial(_support_gradients, made), *calls.values()], repeats=options.repeats)
    for name, timing in zip(calls, timings, strict=True):
        equivalents = timing.median / unit.median
        costs[name] = replace(costs[name], seconds=timing.median, spread=timing.spread, equivalents=equivalents)
    exact: dict[tuple[str, str], torch.Tensor] = {}
    for setting in chosen:
        if setting.name in calls:
            with console.status(f"{setting.name}: error"):
                inner = setting.engine.inner
                key = (repr(inner), repr(setting.engine.regularization))
                if key not in exact:
                    exact[key] = exact_gradient(setting.engine, objective, tasks, chunk_size=1)
                found = flat(setting.engine.value_and_grad(objective, tasks)[1])
                error = float((found - exact[key]).norm() / exact[key].norm())
                costs[setting.name] = replace(costs[setting.name], error=error)
    return list(costs.values())


def _support_gradients(made: Made) -> None:
    """One plain gradient of every task's support loss, the unit of gradient-equivalents."""
    values = made.objective.parameters()
    wanted = [values[name] for name in made.objective.adapted]
    for task in made.tasks:
        loss, _ = made.objective.evaluate(values | made.objective.constants(), task.support)
        torch.autograd.grad(loss, wanted, allow_unused=True)


def _advice(costs: list[Cost], limit: float | None) -> Iterator[str]:
    """For each strategy the fastest setting, or a leaner one that is as fast within the spread; and the leanest."""
    within = "" if limit is None else f" within {limit:g} MB"
    for strategy in dict.fromkeys(cost.strategy for cost in costs):
        own = [cost for cost in costs if cost.strategy == strategy and cost.seconds is not None]
        if not own:
            yield f"{NAMES[strategy]}: no setting stays{within or ' in memory'}."
            continue
        first = min(own, key=_seconds)
        alike = [cost for cost in own if _seconds(cost) <= _seconds(first) + (first.spread or 0)]
        fastest, leanest = min(alike, key=_bytes), min(own, key=lambda cost: (_bytes(cost), _seconds(cost)))
        text = f"{NAMES[strategy]}: use{within} {_short(fastest)}"
        yield text + (", the leanest too." if fastest == leanest else f"; the leanest is {_short(leanest)}.")


def _short(cost: Cost) -> str:
    return f"{cost.setting} ({_scaled(cost.seconds, 1e3)} ms, {_scaled(cost.bytes, 1e-6)} MB)"


def _seconds(cost: Cost) -> float:
    assert cost.seconds is not None
    return cost.seconds


def _bytes(cost: Cost) -> int:
    assert cost.bytes is not None
    return cost.bytes


def _scaled(value: float | None, scale: float) -> str:
    return "" if value is None else f"{scale * value:.3g}" if scale * value < 100 else f"{scale * value:.0f}"


def _drawings(costs: list[Cost]) -> dict[str, Drawing]:
    timed = [cost for cost in costs if cost.seconds is not None]
    sizes = {cost.setting: (1e3 * _seconds(cost), _bytes(cost) / 1e6) for cost in timed}
    errors = {cost.setting: (1e3 * _seconds(cost), cost.error) for cost in timed if cost.error}
    if not timed:
        return {}
    x = "ms per meta-gradient"
    return {
        "Memory against time; the line joins what nothing beats in both": partial(
            scatter, sizes, x, "peak MB", front=True
        ),
        "Error against time": partial(scatter, errors, x, "relative error"),
    }


def _table(costs: list[Cost]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if number else "left", no_wrap=bool(number))
    for cost in costs:
        table.add_row(*cost.cells)
    return table
