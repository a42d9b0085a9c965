"""The picture of the README: peak memory of one meta-gradient against the number of inner steps, ours and rivals'.

    python -m benchmarks.picture [--out FILE]

Drawn from the rows of the workload W3 in `benchmarks/results/rivals/results.jsonl`: a transformer of four layers, one
task, one process for each point. The same rows and release of matplotlib give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure as Plot

from benchmarks.summary import Figure, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "rivals" / "results.jsonl"
PICTURE = ROOT / "docs" / "memory.svg"
WORKLOAD, STEPS, MB = "W3", (1, 4, 16, 64), 1e6
INK, GRID = "#78818c", "#78818c40"
"""Readable on a white page and on a dark one, as the colours of the curves are."""
SETTINGS = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "svg.fonttype": "none",
    "svg.hashsalt": "imaml",
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    method: str
    label: str
    """With the last value put in."""
    color: str
    style: str = "-"
    ours: bool = True
    shift: float = 0.0
    """Of the label, in points, away from that of another curve."""


CURVES = (
    Curve(method="create_graph loop", label="plain create_graph loop, {} MB", color="#e0622d", ours=False),
    Curve(method="imaml MAML", label="MAML, {} MB", color="#3f83e8", shift=-7),
    Curve(
        method="torch-maml, checkpointing",
        label="torch-maml with checkpoints, {} MB",
        color="#b98a1d",
        style=":",
        ours=False,
        shift=9,
    ),
    Curve(method="imaml ImplicitMAML", label="ImplicitMAML, {} MB", color="#22a06b", shift=6),
    Curve(
        method="imaml MAML, checkpoints=4", label="MAML, checkpoints=4, {} MB", color="#3f83e8", style="--", shift=-7
    ),
    Curve(method="imaml FOMAML", label="FOMAML, {} MB", color="#a873d9"),
)
LIBRARIES = {"learn2learn": "x", "higher": "+", "TorchOpt explicit": "1"}
"""Those that build the loop's graph, drawn as marks of these shapes."""


def peaks(figures: Sequence[Figure], method: str) -> dict[int, float]:
    """Megabytes by the number of inner steps."""
    return {
        f.steps: f.bytes / MB
        for f in sorted(figures, key=lambda f: f.steps)
        if (f.workload, f.method) == (WORKLOAD, method) and f.steps in STEPS and f.bytes is not None
    }


def draw(figures: Sequence[Figure]) -> Plot:
    plot = Plot(figsize=(8.6, 4.2))
    plot.patch.set_alpha(0)
    axes = plot.add_axes((0.09, 0.12, 0.56, 0.84))
    axes.patch.set_alpha(0)
    for curve in CURVES:
        found = peaks(figures, curve.method)
        width = 2.6 if curve.ours else 1.6
        axes.plot(
            found.keys(), found.values(), curve.style, color=curve.color, linewidth=width, marker="o", markersize=5
        )
        steps, last = max(found.items())
        axes.annotate(
            curve.label.format(f"{last:,.0f}"),
            (steps, last),
            (12, curve.shift),
            textcoords="offset points",
            verticalalignment="center",
            color=curve.color,
            fontsize=10.5,
            fontweight="bold" if curve.ours else "normal",
        )
    loop = CURVES[0]
    for library, marker in LIBRARIES.items():
        found = peaks(figures, library)
        axes.plot(found.keys(), found.values(), marker, color=loop.color, markersize=11, markeredgewidth=1.6)
    axes.annotate(
        "learn2learn, higher, TorchOpt\n(1 to 16 steps)",
        (STEPS[2], peaks(figures, loop.method)[STEPS[2]]),
        (-14, 6),
        textcoords="offset points",
        horizontalalignment="right",
        color=loop.color,
        fontsize=10.5,
    )
    axes.set(xscale="log", yscale="log", ylim=(50, 13_000))
    axes.set_xticks(STEPS, [str(steps) for steps in STEPS])
    axes.set_yticks((100, 1_000, 10_000), ("100", "1,000", "10,000"))
    axes.minorticks_off()
    axes.set_xlabel("inner steps", color=INK)
    axes.set_ylabel("peak MB of one meta-gradient", color=INK)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(color=GRID, linewidth=0.8)
    return plot


def write(figures: Sequence[Figure], path: Path) -> None:
    with matplotlib.rc_context(SETTINGS):
        draw(figures).savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PICTURE)
    write(read(RESULTS), parser.parse_args().out)


if __name__ == "__main__":
    main()
