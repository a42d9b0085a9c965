"""Figures: of one run, and of a comparison on a light or a dark page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from imaml.cli._memory_curves import INNER_STEPS, MemoryCurve
from imaml.cli._metric import Metric
from imaml.cli._result import COLORS, LOOP_COLOR, NAMES, Result, Validation
from imaml.training import replace_file

_WINDOW = 25


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of text and of grid lines; the background is the page's."""

    ink: str
    grid: str


LIGHT = Theme(ink="#3c4043", grid="#dadce0")
DARK = Theme(ink="#c4c7c5", grid="#3c4043")


def training_curve(metrics: Sequence[dict[str, Any]], metric: Metric) -> Figure:
    """The metric over the steps of a run: training as a running mean, validation with its interval."""
    figure, axes = empty_axes(LIGHT, (7.0, 4.0))
    steps = [record["step"] for record in metrics]
    values = [metric.scale * record["metric"] for record in metrics]
    means = [sum(part := values[max(0, i - _WINDOW + 1) : i + 1]) / len(part) for i in range(len(values))]
    axes.plot(steps, values, color=COLORS["maml"], alpha=0.15, linewidth=0.7)
    axes.plot(steps, means, color=COLORS["maml"], label=f"training, mean of {_WINDOW} steps")
    vals = [(record["step"], record["val"]) for record in metrics if "val" in record]
    if vals:
        means = [metric.scale * val["mean"] for _, val in vals]
        intervals = [metric.scale * val["interval"] for _, val in vals]
        at = [step for step, _ in vals]
        color = COLORS["fomaml"]
        axes.errorbar(at, means, intervals, color=color, marker="o", ms=3, label="validation, 95 % interval")
    axes.set(xlabel="meta-step", ylabel=metric.label)
    axes.legend(frameon=False)
    return figure


def learning_curves(results: Sequence[Result], metric: Metric, theme: Theme, *, by_seconds: bool) -> Figure:
    """Validation over meta-steps, or over the seconds they took (a larger figure), with 95 % bands."""
    figure, axes = empty_axes(theme, (10.4, 4.2) if by_seconds else (5.2, 3.6))
    x: Callable[[Validation], float] = (lambda point: point.seconds) if by_seconds else (lambda point: point.step)
    for result in results:
        xs = [x(point) for point in result.curve]
        means = [metric.scale * point.value.mean for point in result.curve]
        widths = [metric.scale * point.value.interval for point in result.curve]
        color = COLORS[result.strategy]
        axes.plot(xs, means, color=color, linewidth=1.8, marker="o", markersize=3, label=NAMES[result.strategy])
        lows, highs = ([m + sign * w for m, w in zip(means, widths, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, lows, highs, color=color, alpha=0.18, linewidth=0)
    axes.set(xlabel="seconds of meta-steps" if by_seconds else "meta-step", ylabel=f"validation {metric.label}")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, labelcolor=theme.ink, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def memory_figure(curves: Sequence[MemoryCurve], theme: Theme) -> Figure:
    """Peak memory over the number of inner steps; each curve has its name and last value at its end."""
    figure, axes = empty_axes(theme, (10.4, 4.4))
    top = max(max(curve.peak_bytes) for curve in curves) / 1e6
    at = 0.0
    for curve in sorted(curves, key=lambda curve: curve.peak_bytes[-1]):
        values = [peak / 1e6 for peak in curve.peak_bytes]
        color = LOOP_COLOR if curve.method == "loop" else COLORS[curve.method]
        axes.plot(INNER_STEPS, values, color=color, linewidth=2.6, marker="o", markersize=5, clip_on=False)
        at = max(values[-1], at)
        axes.annotate(
            f"{curve.name}  {curve.last}",
            (INNER_STEPS[-1], at),
            (14, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            color=color,
            fontsize=12,
        )
        at += 0.075 * top  # names of curves that end together stand above one another
    axes.set(xlabel="inner steps", ylabel="peak MB of one meta-gradient", xticks=INNER_STEPS)
    axes.set_xlim(0, INNER_STEPS[-1])
    axes.set_ylim(0, 1.04 * top)
    return figure


def bars(results: Sequence[Result], values: Sequence[float], label: str, form: str, theme: Theme) -> Figure:
    """One horizontal bar for each strategy, with its number in the given format."""
    figure, axes = empty_axes(theme, (5.2, 0.7 + 0.42 * len(results)))
    names = [NAMES[result.strategy] for result in results]
    drawn = axes.barh(names, values, color=[COLORS[result.strategy] for result in results], height=0.62)
    axes.bar_label(drawn, fmt=form, padding=4, color=theme.ink)
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def save_png(path: Path, figure: Figure) -> None:
    """Write a figure on white."""
    replace_file(path, lambda stream: figure.savefig(stream, format="png", dpi=150, facecolor="white"))


def empty_axes(theme: Theme, size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A transparent figure of one panel, its size in inches."""
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.grid)
    axes.tick_params(colors=theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    axes.grid(color=theme.grid, alpha=0.6, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
