"""Figures of costs: one point for each way to compute a meta-gradient."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from imaml.cli._figures import Theme, empty_axes

COLORS = (
    *("#3b7dd8", "#2f9e6e", "#d9822b", "#c2410c", "#7c5cd6", "#0f9bb3", "#d6459a", "#8a8f98", "#b08a00"),
    *("#6b8e23", "#a0522d", "#4b5bd1", "#20a39e", "#ef6f6c", "#93b5e1", "#7fcfb0", "#b39ddb", "#f2b880"),
    *("#5f6b7a", "#c9a227", "#8c2d5e", "#2b6f77", "#a3a635", "#7a4fa0", "#e0763c", "#4f7f3a", "#b5651d"),
)
"""Enough for every point of a figure to have its own."""
Points = Mapping[str, tuple[float, float]]


def scatter(points: Points, xlabel: str, ylabel: str, theme: Theme, *, front: bool = False) -> Figure:
    """Named points on logarithmic axes, of which less is better.

    Args:
        points: x and y by name.
        xlabel: Name of x.
        ylabel: Name of y.
        theme: Theme of the page.
        front: Join the points that no other one beats in both.

    Returns:
        The figure.
    """
    figure, axes = empty_axes(theme, (5.2, 3.4 + 0.17 * len(points)))
    if front:
        best = sorted(point for point in points.values() if not any(_beats(other, point) for other in points.values()))
        axes.plot([x for x, _ in best], [y for _, y in best], color=theme.ink, linewidth=1, alpha=0.5, zorder=1)
    for number, (name, (x, y)) in enumerate(points.items()):
        axes.plot(x, y, "os^Dv"[number % 5], color=COLORS[number % len(COLORS)], markersize=7, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log", yscale="log")
    axes.margins(0.12)
    figure.legend(frameon=False, labelcolor=theme.ink, loc="outside lower left", fontsize=8)
    return figure


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]
