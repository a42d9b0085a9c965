"""`imaml compare`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from statistics import median
from time import monotonic

from rich.console import Console
from rich.table import Table
from rich.text import Text

from imaml import TaskBatch
from imaml.cli._environment import environment
from imaml.cli._options import Compare, EngineOptions, Strategy
from imaml.cli._outcome import COLORS, NAMES, Outcome, Point, cosine_to_exact
from imaml.cli._presets import PRESETS
from imaml.cli._problem import Metric, Problem, applies, build_engine, build_problem, flag
from imaml.cli._progress import progress, say
from imaml.cli._report import FOOTNOTES, write_report
from imaml.measure import peak_memory
from imaml.training import Plan, Trainer, replace_file


def compare(options: Compare) -> int:
    """Train every strategy in turn, print the table and write the report.

    Args:
        options: Everything from the command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: An option is out of range, or applies to none of the strategies.
    """
    console = Console()
    deadline = None if options.plan.minutes is None else monotonic() + 60 * options.plan.minutes
    problem = build_problem(options.episodes, options.machine)
    engines = {strategy: _engine_options(options, strategy) for strategy in options.strategies}
    for strategy, engine in engines.items():
        build_engine(strategy, engine)
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "episodes": asdict(options.episodes),
        "plan": asdict(options.plan),
        "engines": {strategy: asdict(engine) for strategy, engine in engines.items()},
        **environment(),
    }
    _write(options, {"settings": settings})
    with console.status("Preparing the tasks"):
        tasks = problem.episodes.batch("val", 0, options.plan.meta_batch).to(device=options.machine.device)
    outcomes: list[Outcome] = []
    for number, (strategy, engine) in enumerate(engines.items()):
        share = None if deadline is None else (deadline - monotonic()) / (len(engines) - number)
        label = f"{number + 1}/{len(engines)} {NAMES[strategy]}"
        outcomes.append(_outcome(strategy, engine, problem, options.plan, tasks, share, console, label))
        _write(options, {"settings": settings, "outcomes": [asdict(outcome) for outcome in outcomes]})
    console.print(_table(outcomes, problem.metric))
    for note in FOOTNOTES.values():
        console.print(Text(note, style="dim"))
    report = write_report(options.folder, outcomes, problem.metric, settings)
    say(console, f"Report: {report.resolve().as_uri()}")
    return 0


def _engine_options(options: Compare, strategy: Strategy) -> EngineOptions:
    """The default of dataset and strategy, with what was given and applies."""
    given = {name: value for name, value in vars(options.engine).items() if value is not None}
    for name, value in given.items():
        if not any(applies(name, other) for other in options.strategies):
            raise ValueError(
                f"{flag(name)} applies to none of {', '.join(options.strategies)}. Got {value}: leave it out."
            )
    preset = PRESETS[options.episodes.dataset].engines[strategy]
    return replace(preset, **{name: value for name, value in given.items() if applies(name, strategy)})


def _outcome(
    strategy: Strategy,
    options: EngineOptions,
    problem: Problem,
    plan: Plan,
    tasks: TaskBatch,
    share: float | None,
    console: Console,
    label: str,
) -> Outcome:
    """Measure, train and test one strategy within `share` seconds."""
    began = monotonic()
    engine, model = build_engine(strategy, options), problem.fresh_model()
    objective = problem.objective(model)
    trainer = Trainer(model=model, objective=objective, engine=engine, episodes=problem.episodes, plan=plan)
    with console.status(f"{label}: measuring"):
        cosine_start = cosine_to_exact(problem, model, engine, tasks)
        measuring = monotonic() - began
        peak_bytes = peak_memory(lambda: engine(objective, tasks).loss.backward(), device=trainer.device)
        before = monotonic()
        curve = [Point(step=0, seconds=0.0, value=trainer.evaluate("val", tasks=plan.val_tasks))]
    if share is not None:
        testing = (monotonic() - before) * plan.eval_tasks / plan.val_tasks
        left = share - (monotonic() - began) - measuring - testing
        trainer.plan = replace(plan, minutes=max(left, 1.0) / 60)
    milliseconds = []
    with progress(console, trainer, problem.metric, label=label) as show:
        for record in trainer:
            milliseconds.append(record.milliseconds)
            if record.val:
                curve.append(Point(step=record.step, seconds=sum(milliseconds) / 1000, value=record.val))
            show(record)
    with console.status(f"{label}: testing"):
        test = trainer.evaluate("test", tasks=plan.eval_tasks)
        cosine_end = cosine_to_exact(problem, model, engine, tasks)
    return Outcome(
        strategy=strategy,
        options=options,
        test=test,
        steps=trainer.step,
        milliseconds=median(milliseconds),
        peak_bytes=peak_bytes,
        cosine_start=cosine_start,
        cosine_end=cosine_end,
        curve=tuple(curve),
    )


def _write(options: Compare, results: dict[str, object]) -> None:
    text = json.dumps(results, indent=2, default=str) + "\n"
    replace_file(options.folder / "results.json", lambda stream: stream.write(text.encode()))


def _table(outcomes: list[Outcome], metric: Metric) -> Table:
    table = Table()
    table.add_column("strategy", no_wrap=True)
    headings = (
        f"test {metric.name}",
        "meta-steps",
        "ms per step",
        "peak MB",
        "cosine at start",
        "cosine at end",
    )
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold")
    for outcome in outcomes:
        table.add_row(
            Text(NAMES[outcome.strategy], style=f"bold {COLORS[outcome.strategy]}"),
            metric.interval(outcome.test.mean, outcome.test.interval),
            str(outcome.steps),
            f"{outcome.milliseconds:.0f}",
            f"{outcome.peak_bytes / 1e6:.1f}",
            f"{outcome.cosine_start:.4f}",
            f"{outcome.cosine_end:.4f}",
        )
    return table


def _headings(metric: Metric) -> tuple[str, ...]:
    return (f"test {metric.name}", "meta-steps", "ms per step", "peak MB", "cosine at start", "cosine at end")
