"""Time and memory against the number of inner steps."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure as Plot

from benchmarks.rivals import METHODS
from benchmarks.summary import Figure
from benchmarks.workloads import WORKLOADS


def against_steps(figures: Sequence[Figure]) -> Plot:
    """Two panels for the figures of one workload; this library's lines are thick, wrong gradients are dotted."""
    plot = Plot(figsize=(11, 4.2), layout="constrained")
    panels = plot.subplots(1, 2)
    for axes, (label, name, scale) in zip(
        panels, (("ms per meta-gradient", "seconds", 1e3), ("peak MB", "bytes", 1e-6)), strict=True
    ):
        for number, method in enumerate(m for m in METHODS if any(f.method == m for f in figures)):
            points = sorted((f.steps, getattr(f, name)) for f in figures if f.method == method)
            wrong = any(f.verdict == "wrong" for f in figures if f.method == method)
            ours = method.startswith("imaml")
            axes.plot(
                [steps for steps, _ in points],
                [scale * value for _, value in points],
                marker="o" if ours else "x",
                linewidth=2.5 if ours else 1.0,
                linestyle=":" if wrong else "-",
                color=f"C{number % 10}",
                label=method,
            )
        axes.set(xlabel="inner steps K", ylabel=label, xscale="log", yscale="log")
        steps = sorted({f.steps for f in figures})
        axes.set_xticks(steps, [str(k) for k in steps])
        axes.grid(alpha=0.3)
    plot.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    plot.suptitle(WORKLOADS[figures[0].workload].title)
    return plot
