"""One HTML page that carries everything in itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from imaml.cli._figures import DARK, LIGHT, Theme, bars, learning_curves, save_png
from imaml.cli._metric import Metric
from imaml.cli._outcome import COLORS, FOOTNOTES, NAMES, Outcome, columns
from imaml.cli._problem import flag
from imaml.training import replace_file


def write_report(folder: Path, outcomes: Sequence[Outcome], metric: Metric, settings: dict[str, Any]) -> Path:
    """Write the plots as PNG files and the page `report.html`.

    Args:
        folder: Must exist.
        outcomes: One for each strategy.
        metric: How the metric is written.
        settings: Episodes, plan and environment.

    Returns:
        Path of the page.
    """
    megabytes = [outcome.peak_bytes / 1e6 for outcome in outcomes]
    milliseconds = [outcome.milliseconds for outcome in outcomes]
    draw: dict[str, Callable[[Theme], Figure]] = {
        "by-step": lambda theme: learning_curves(outcomes, metric, theme, by_seconds=False),
        "by-seconds": lambda theme: learning_curves(outcomes, metric, theme, by_seconds=True),
        "memory": lambda theme: bars(outcomes, megabytes, "peak MB of a meta-gradient", "{:.1f}", theme),
        "time": lambda theme: bars(outcomes, milliseconds, "milliseconds per meta-step", "{:.0f}", theme),
    }
    for name, plot in draw.items():
        save_png(folder / f"{name}.png", plot(LIGHT))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imaml.cli", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        outcomes=outcomes,
        metric=metric,
        settings=settings,
        figures={name: [_svg_uri(drawing(theme)) for theme in (LIGHT, DARK)] for name, drawing in draw.items()},
        names=NAMES,
        colors=COLORS,
        footnotes=FOOTNOTES,
        columns=columns(metric),
        flag=flag,
    )
    path = folder / "report.html"
    replace_file(path, lambda stream: stream.write(page.encode()))
    return path


def _svg_uri(figure: Figure) -> str:
    stream = BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + b64encode(stream.getvalue()).decode()
