"""The page `report.html`, tables, goals and plots in one file, and the plots as PNG files beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import plots, tables
from benchmarks.summary import Figure
from imaml.cli._page import Section, save_figures, write_page


def write(path: Path, figures: Sequence[Figure], about: dict[str, Any]) -> None:
    sections = list(_sections(figures))
    plotted = path.parent / "plots"
    plotted.mkdir(exist_ok=True)
    save_figures(plotted, sections)
    write_page(
        path,
        "costs.html.j2",
        title="One meta-gradient, side by side",
        lead="imaml and other libraries: the same initial parameters and tasks, every measurement in a fresh process.",
        advice=[],
        sections=sections,
        notes=[note.replace("*", "").replace("`", "") for note in tables.NOTES],
        settings=about,
    )


def _sections(figures: Sequence[Figure]) -> Iterator[Section]:
    headings = ("method", *tables.HEADINGS)
    for title, group in tables.groups(figures):
        ours = [f.method for f in group if f.method.startswith("imaml")]
        columns = zip(headings, *([f.method, *tables.cells(f)] for f in group), strict=True)
        shown, *rows = zip(*(column for column in columns if any(column[1:])), strict=True)
        yield Section(title=title, headings=shown, rows=rows, bold=ours, drawings=plots.drawings(group))
    goals = [[cell.replace("*", "") for cell in row] for row in tables.goal_rows(figures)]
    yield Section(title="Goals", headings=tables.GOAL_HEADINGS, rows=goals)
    for workload, group in groupby(sorted(figures, key=lambda f: f.workload), key=lambda f: f.workload):
        if drawn := plots.drawings_against_steps(list(group)):
            yield Section(title=f"{workload} over the inner steps", headings=(), rows=(), drawings=drawn)
