"""One HTML page that carries everything in itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from imaml.cli._figures import DARK, LIGHT, Theme, bars, learning_curves, memory_figure, save_png
from imaml.cli._memory_curves import CHECKPOINTS, MemoryCurve, sentence
from imaml.cli._metric import Metric
from imaml.cli._outcome import COLORS, FOOTNOTES, NAMES, Outcome, columns
from imaml.cli._page import data_uri, write_page
from imaml.cli._problem import flag


def write_report(
    folder: Path,
    outcomes: Sequence[Outcome],
    curves: Sequence[MemoryCurve],
    metric: Metric,
    settings: dict[str, Any],
) -> Path:
    """Write the plots as PNG files and the page `report.html`.

    Args:
        folder: Must exist.
        outcomes: One for each strategy.
        curves: Memory by inner steps.
        metric: How the metric is written.
        settings: Episodes, engines, plans and environment.

    Returns:
        Path of the page.
    """
    megabytes = [outcome.peak_bytes / 1e6 for outcome in outcomes]
    milliseconds = [outcome.milliseconds for outcome in outcomes]
    draw: dict[str, Callable[[Theme], Figure]] = {
        "memory-by-inner-steps": lambda theme: memory_figure(curves, theme),
        "by-seconds": lambda theme: learning_curves(outcomes, metric, theme, by_seconds=True),
        "by-step": lambda theme: learning_curves(outcomes, metric, theme, by_seconds=False),
        "memory": lambda theme: bars(outcomes, megabytes, "peak MB of a meta-gradient", "{:.1f}", theme),
        "time": lambda theme: bars(outcomes, milliseconds, "milliseconds per meta-step", "{:.0f}", theme),
    }
    for name, plot in draw.items():
        save_png(folder / f"{name}.png", plot(LIGHT))
    path = folder / "report.html"
    write_page(
        path,
        "report.html.j2",
        outcomes=outcomes,
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
