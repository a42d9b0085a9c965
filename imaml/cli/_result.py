"""What is known of one strategy after a comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imaml.cli._metric import Metric
from imaml.cli._options import EngineOptions, Strategy
from imaml.training import Evaluation, Plan

NAMES: dict[Strategy, str] = {"maml": "MAML", "fomaml": "FOMAML", "imaml": "iMAML"}
COLORS: dict[Strategy, str] = {"maml": "#3b7dd8", "fomaml": "#d9822b", "imaml": "#2f9e6e"}
LOOP_COLOR = "#c2413b"

FOOTNOTES = (
    "Test: mean over tasks of unseen classes and its 95 % interval, 1.96 standard errors.",
    "ms per step: median over the training. Peak MB: what a meta-gradient holds at once, in 10^6 bytes.",
    "Cosine: between a strategy's meta-gradient and the exact derivative, in float64, of the query loss through the "
    "inner loop it runs; at the shared initial parameters, and at those it reached. iMAML differentiates the "
    "stationary point of its inner problem, so a loop or a solve that stops early lowers its cosine.",
)


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation on the way; `seconds` are those of the meta-steps alone."""

    step: int
    seconds: float
    value: Evaluation


@dataclass(frozen=True, kw_only=True)
class Result:
    """One strategy: how good, how fast, how large, how exact."""

    strategy: Strategy
    options: EngineOptions
    plan: Plan
    test: Evaluation
    steps: int
    milliseconds: float
    peak_bytes: int
    cosine_start: float
    cosine_end: float
    curve: tuple[Validation, ...]


def columns(metric: Metric) -> dict[str, Callable[[Result], str]]:
    """The columns of the table, on the screen and in the report: heading, and text of a result."""
    return {
        f"test {metric.name}": lambda result: metric.interval(result.test.mean, result.test.interval),
        "steps": lambda result: str(result.steps),
        "ms per step": lambda result: f"{result.milliseconds:.0f}",
        "peak MB": lambda result: f"{result.peak_bytes / 1e6:.1f}",
        "cosine at start": lambda result: f"{result.cosine_start:.4f}",
        "cosine at end": lambda result: f"{result.cosine_end:.4f}",
    }
