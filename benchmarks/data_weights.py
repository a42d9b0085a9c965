"""The pictures of docs/tutorial-data-weights.md, of the result that examples/data_weights.py wrote.

    python -m benchmarks.data_weights [--out FOLDER]

The same result and release of matplotlib give the same files, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot

from benchmarks.picture import GRID, INK, ROOT, SETTINGS

RESULT = ROOT / "benchmarks" / "results" / "data_weights" / "gpt2.json"
FOLDER = ROOT / "docs"
KINDS = {"clean": "#22a06b", "shuffled": "#3f83e8", "other language": "#e0622d", "copies": "#a873d9"}
METHODS = {
    "meta-gradient": "meta-gradient",
    "one more step": "influence on one more step",
    "last step": "influence on the last step",
    "loss": "loss after training",
}
CHOICES = {
    "all texts": "all texts",
    "at random": "without as many at random",
    "loss": "without the highest losses",
    "one more step": "without the worst of one more step",
    "meta-gradient": "without the worst meta-gradients",
    "meta-gradient, its sign": "without positive meta-gradients",
    "all that is corrupted": "without all that is corrupted",
}
Result = Mapping[str, Any]


def auc(result: Result, method: str, kind: str) -> float:
    """The mean over the trainings that were pulled back."""
    return mean(each[kind] for each in result["auc"][method])


def loss(result: Result, choice: str) -> float:
    """The mean test loss of the trainings on a choice of texts."""
    found: list[float] = result["retrained"][choice]["loss"]
    return mean(found)


def scores(result: Result) -> Plot:
    """How the meta-gradients of each kind are distributed."""
    found, kinds = np.array(result["scores"]["meta-gradient"]), np.array(result["kinds"])
    low, high = np.quantile(found, [0.002, 0.998])
    bins = np.linspace(low, high, 41).tolist()
    plot, axes = _empty(3.4, left=0.17)
    for row, color in enumerate(KINDS.values()):
        counts, _ = np.histogram(found[kinds == row], bins)
        heights = 0.85 * counts / counts.max()
        axes.stairs(heights - row, bins, baseline=-row, fill=True, color=color, alpha=0.85)
    axes.axvline(0, color=INK, linewidth=1)
    _rows(axes, KINDS, offset=0.3)
    axes.set_ylim(1 - len(KINDS), 1)
    axes.set_xlabel("helps   ←   change of the held-out loss with the weight   →   harms", color=INK)
    return plot


def aucs(result: Result) -> Plot:
    """How often each method ranks a corrupted text above a clean one, by kind."""
    plot, axes = _empty(3.2, left=0.27)
    for row, method in enumerate(METHODS):
        for i, (kind, color) in enumerate([*KINDS.items()][1:]):
            y = -row + 0.2 * (1 - i)
            each = [seed[kind] for seed in result["auc"][method]]
            axes.plot(each, [y] * len(each), "|", color=color, markersize=7, alpha=0.7)
            axes.plot([auc(result, method, kind)], [y], "o", color=color, label=kind if row == 0 else None)
    axes.axvline(0.5, color=INK, linewidth=1, linestyle=":")
    _rows(axes, {label: INK for label in METHODS.values()})
    axes.set(xlim=(-0.02, 1.02), ylim=(-len(METHODS) + 0.5, 0.5))
    axes.set_xlabel("AUC: 1 finds all, 0.5 is chance", color=INK)
    axes.legend(loc="upper left", bbox_to_anchor=(0, 1.19), ncols=3, frameon=False, labelcolor=INK, handletextpad=0.2)
    return plot


def losses(result: Result) -> Plot:
    """The test loss after a training on each choice of texts."""
    plot, axes = _empty(3.6, left=0.36)
    for row, choice in enumerate(CHOICES):
        ours = choice.startswith("meta")
        color = "#3f83e8" if ours else "#b98a1d"
        each = result["retrained"][choice]["loss"]
        axes.plot(each, [-row] * len(each), "|", color=color, markersize=9, alpha=0.8)
        axes.plot([loss(result, choice)], [-row], "o", color=color)
        axes.annotate(
            f"{loss(result, choice):.3f}",
            (max(each), -row),
            (8, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=color,
            fontweight="bold" if ours else "normal",
        )
    axes.axvline(loss(result, "all texts"), color=INK, linewidth=1, linestyle=":")
    _rows(axes, {label: INK for label in CHOICES.values()})
    axes.margins(x=0.12)
    axes.set_xlabel("test loss after training anew", color=INK)
    return plot


PICTURES: dict[str, Callable[[Result], Plot]] = {
    "data-weights-scores.svg": scores,
    "data-weights-auc.svg": aucs,
    "data-weights-loss.svg": losses,
}


def _empty(height: float, *, left: float) -> tuple[Plot, Axes]:
    plot = Plot(figsize=(8.6, height))
    plot.patch.set_alpha(0)
    axes = plot.add_axes((left, 0.17, 0.97 - left, 0.71))
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(INK)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    return plot, axes


def _rows(axes: Axes, labels: Mapping[str, str], *, offset: float = 0.0) -> None:
    axes.set_yticks([offset - row for row in range(len(labels))], list(labels))
    axes.tick_params(axis="y", length=0)
    for label, color in zip(axes.get_yticklabels(), labels.values(), strict=True):
        label.set_color(color)


def read(path: Path = RESULT) -> Result:
    found: Result = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(result: Result, folder: Path) -> None:
    with matplotlib.rc_context(SETTINGS):
        for name, draw in PICTURES.items():
            draw(result).savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER)
    write(read(), parser.parse_args().out)


if __name__ == "__main__":
    main()
