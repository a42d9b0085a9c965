"""The figures as text: for the terminal, and as the page that is checked in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from textwrap import fill
from typing import Any

from rich.table import Table

from benchmarks.goals import GOALS, Goal
from benchmarks.summary import Figure
from benchmarks.workloads import WORKLOADS

HEADINGS = (
    "time, ms",
    "spread",
    "load",
    "first call, CPU s",
    "equivalents",
    "arithmetic",
    "operations",
    "peak MB",
    "gradient",
    "error",
    "in float32",
)

WIDTH = 110
"""Of lines of the page that are not of a table."""
GOAL_HEADINGS = ("", "at most", "measured", "met")
NOTES = (
    "**time** and **spread**: median over processes, and slowest less fastest. **load**: the highest load "
    "average of the machine meanwhile; above the number of threads, other programs took a part of it.",
    "**first call**: processor time of a process's first call, with all that is compiled for it.",
    "**equivalents**: gradient-equivalents, the time over that of one plain support gradient of all tasks, one "
    "after the other, in the same process.",
    "**arithmetic** and **operations**, which no load changes: the flops of matrix products and convolutions in "
    "the same unit, and the operations that torch dispatched.",
    "**peak MB**: the most that one call held at once, by the allocator's own events (1 MB = 10^6 bytes); for JAX "
    "temporary memory and results by XLA's account of the compiled program.",
    "**gradient** and **error**: relative error in float64, against plain autograd through one graph; "
    "`approximate` means by design.",
)


def cells(figure: Figure) -> list[str]:
    """One row under `HEADINGS`, with the reason in place of a verdict that there is none of."""
    milliseconds = [number(None if s is None else 1e3 * s) for s in (figure.seconds, figure.spread)]
    megabytes = "" if figure.bytes is None else number(figure.bytes / 1e6)
    verdict = figure.verdict if figure.reason is None else figure.reason
    errors = ["" if e is None else f"{e:.0e}" for e in (figure.error, figure.error_float32)]
    load = "" if figure.load is None else f"{figure.load:.1f}"
    first = "" if figure.first is None else f"{figure.first:.1f}"
    operations = "" if figure.operations is None else f"{figure.operations:,}"
    work = [number(figure.equivalents), number(figure.arithmetic), operations]
    return [*milliseconds, load, first, *work, megabytes, verdict, *errors]


def rich(figures: Sequence[Figure]) -> Iterator[Table]:
    for title, group in groups(figures):
        table = Table(title=title, title_justify="left")
        table.add_column("method", no_wrap=True)
        for heading in HEADINGS:
            table.add_column(heading, justify="right")
        for figure in group:
            table.add_row(figure.method, *cells(figure), style="red" if figure.verdict == "wrong" else None)
        yield table
    table = Table(title="Goals", title_justify="left")
    for heading in GOAL_HEADINGS:
        table.add_column(heading)
    for row in goal_rows(figures):
        table.add_row(*row)
    yield table


def markdown(figures: Sequence[Figure], about: dict[str, Any]) -> str:
    lines = [
        "# Side by side",
        "",
        "Made by `python -m benchmarks.compare`, which measures one meta-gradient, every time in a fresh process.",
        fill(
            f"{about['cpu']}, {about['threads']} threads, Python {about['python']}, torch {about['torch']}; "
            + ", ".join(f"{name} {version}" for name, version in sorted(about["rivals"].items()))
            + ".",
            WIDTH,
        ),
        "",
        *(fill(f"- {note}", WIDTH, subsequent_indent="  ") for note in NOTES),
        "",
    ]
    for title, group in groups(figures):
        lines += [f"## {title}", "", *rows(("method", *HEADINGS), [[f.method, *cells(f)] for f in group]), ""]
    lines += ["## Goals", "", *rows(GOAL_HEADINGS, goal_rows(figures)), ""]
    return "\n".join(lines)


def goal_rows(figures: Sequence[Figure], goals: Sequence[Goal] | None = None) -> list[list[str]]:
    """Title, target, what was measured, and yes or no; goals on workloads that were not measured are left out."""
    found = [
        (goal, reached)
        for goal in (GOALS if goals is None else goals)
        if (reached := goal.reached(figures)) is not None
    ]
    return [
        [goal.title, _amount(goal, goal.factor), _amount(goal, reached), "yes" if reached <= goal.factor else "**no**"]
        for goal, reached in found
    ]


def _amount(goal: Goal, value: float) -> str:
    if goal.theirs is None:
        return f"{value / 1e6:.0f} MB" if goal.quantity == "bytes" else f"{value:.1f}"
    return f"1/{1 / value:.2f}" if value < 1 else f"{value:.2f}"


def groups(figures: Sequence[Figure]) -> Iterator[tuple[str, list[Figure]]]:
    names = list(WORKLOADS)
    ordered = sorted(figures, key=lambda f: (names.index(f.workload), f.steps))
    for (workload, steps), group in groupby(ordered, key=lambda f: (f.workload, f.steps)):
        yield f"{workload}, K = {steps}: {WORKLOADS[workload].title}", list(group)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---" + "|---:" * (len(headings) - 1) + "|"
    return [f"| {' | '.join(headings)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)]
