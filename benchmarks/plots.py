"""Time and memory against the number of inner steps, and against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure as Plot

from benchmarks.rivals import METHODS
from benchmarks.summary import Figure
from imaml.cli._bench_figures import COLORS, scatter
from imaml.cli._figures import Theme, empty_axes
from imaml.cli._page import Drawing

COLOR = dict(zip(METHODS, COLORS, strict=False))
TIME, MEMORY, ERROR = (
    ("ms per meta-gradient", "seconds", 1e3),
    ("peak MB", "bytes", 1e-6),
    ("relative error", "error", 1),
)
SMALLEST = 1e-17
"""Where an error of zero stands on a logarithmic axis."""


def drawings(figures: Sequence[Figure]) -> Mapping[str, Drawing]:
    """What can be drawn of the figures of one workload at one K."""
    known: dict[str, Drawing] = {}
    sizes = {f.method: (1e3 * f.seconds, f.bytes / 1e6) for f in figures if f.seconds and f.bytes}
    if sizes:
        drawing = partial(scatter, sizes, TIME[0], MEMORY[0], front=True)
        known["Memory against time; the line joins what nothing beats in both"] = drawing
    errors = {f.method: (1e3 * f.seconds, max(f.error, SMALLEST)) for f in figures if f.seconds and f.error is not None}
    if errors:
        known["Error in float64 against time"] = partial(scatter, errors, TIME[0], ERROR[0])
    return known


def drawings_against_steps(figures: Sequence[Figure]) -> Mapping[str, Drawing]:
    """What can be drawn of the figures of one workload over several K."""
    panels = {"Time against inner steps": TIME, "Memory against inner steps": MEMORY}
    return {
        caption: partial(against_steps, figures, *panel)
        for caption, panel in panels.items()
        if len({f.steps for f in figures if getattr(f, panel[1]) is not None}) > 1
    }


def against_steps(figures: Sequence[Figure], label: str, name: str, scale: float, theme: Theme) -> Plot:
    """One line for each method; this library's are thick, those of wrong gradients dotted."""
    methods = [m for m in METHODS if any(f.method == m and getattr(f, name) is not None for f in figures)]
    plot, axes = empty_axes(theme, (5.2, 3.4 + 0.17 * len(methods)))
    for method in methods:
        own = [f for f in figures if f.method == method and getattr(f, name) is not None]
        points = sorted((f.steps, scale * getattr(f, name)) for f in own)
        ours = method.startswith("imaml")
        axes.plot(
            [steps for steps, _ in points],
            [value for _, value in points],
            marker="o" if ours else "x",
            linewidth=2.5 if ours else 1.0,
            linestyle=":" if any(f.verdict == "wrong" for f in figures if f.method == method) else "-",
            color=COLOR[method],
            label=method,
        )
    axes.set(xlabel="inner steps K", ylabel=label, xscale="log", yscale="log")
    steps = sorted({f.steps for f in figures})
    axes.set_xticks(steps, [str(k) for k in steps])
    axes.minorticks_off()
    plot.legend(frameon=False, labelcolor=theme.ink, loc="outside lower left", fontsize=8)
    return plot
