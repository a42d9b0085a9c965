"""One HTML page that carries everything in itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from imaml.cli._experiment import flag
from imaml.cli._figures import DARK, LIGHT, Theme, bars, learning_curves, memory_figure, save_png
from imaml.cli._memory_curves import CHECKPOINTS, MemoryCurve, sentence
from imaml.cli._metric import Metric
from imaml.cli._page import data_uri, write_page
from imaml.cli._result import COLORS, FOOTNOTES, NAMES, Result, columns


def write_report(
    folder: Path,
    results: Sequence[Result],
    curves: Sequence[MemoryCurve],
    metric: Metric,
    settings: dict[str, Any],
) -> Path:
    """Write the plots as PNG files and the page `report.html`.

    Args:
        folder: Must exist.
        results: One for each strategy.
        curves: Memory by inner steps.
        metric: How the metric is written.
        settings: Episodes, engines, plans and environment.

    Returns:
        Path of the page.
    """
    megabytes = [result.peak_bytes / 1e6 for result in results]
    milliseconds = [result.milliseconds for result in results]
    draw: dict[str, Callable[[Theme], Figure]] = {
        "memory-by-inner-steps": lambda theme: memory_figure(curves, theme),
        "by-seconds": lambda theme: learning_curves(results, metric, theme, by_seconds=True),
        "by-step": lambda theme: learning_curves(results, metric, theme, by_seconds=False),
        "memory": lambda theme: bars(results, megabytes, "peak MB of a meta-gradient", "{:.1f}", theme),
        "time": lambda theme: bars(results, milliseconds, "milliseconds per meta-step", "{:.0f}", theme),
    }
    for name, plot in draw.items():
        save_png(folder / f"{name}.png", plot(LIGHT))
    path = folder / "report.html"
    write_page(
        path,
        "report.html.j2",
        results=results,
        metric=metric,
        settings=settings,
        figures={name: [data_uri(drawing(theme), "svg") for theme in (LIGHT, DARK)] for name, drawing in draw.items()},
        names=NAMES,
        colors=COLORS,
        footnotes=FOOTNOTES,
        columns=columns(metric),
        sentence=sentence(curves),
        checkpoints=CHECKPOINTS,
        chosen={strategy: engine | settings["plans"][strategy] for strategy, engine in settings["engines"].items()},
        flag=flag,
    )
    return path
