"""What is known before a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from imaml._engine.strategy import Strategy
from imaml.planning._bytes import written

Engine = TypeVar("Engine", bound=Strategy)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one call takes."""

    peak_bytes: int
    """Predicted: the most bytes that a call of `value_and_grad` holds at once, above what it finds. The model, the
    tasks and, after `loss.backward()`, the gradients of the parameters are not among them."""
    gradients: int
    """As `Report.gradients`; the most, where an inner loop may stop early."""
    hvps: int
    """As `Report.hvps`; the most, where a solver may stop early."""
    gradient_equivalents: float
    """The arithmetic of both, in gradients of one task: a Hessian-vector product counts 3, or 2 where the graph of the
    gradient is kept or by finite differences, or 1 with a Gauss-Newton matrix. With blocks that are recomputed a
    gradient counts 4/3 and a product 5, or 11/3 with a kept graph."""
    rank: float
    """What settings are ordered by, ascending: the arithmetic with what vectorising saves; no unit."""


@dataclass(frozen=True, kw_only=True)
class Setting(Prediction, Generic[Engine]):
    """Describes one way to compute the meta-gradient, and what a call of it takes.

    All settings of a forecast give the same numbers.
    """

    engine: Engine
    """To use it."""
    options: Mapping[str, object]
    """How it differs from the engine that was asked; empty for that engine itself."""
    fits: bool
    """Whether it stays within the limit."""

    @property
    def name(self) -> str:
        """The options as they are written."""
        return as_written(self.options) or "as it is"


@dataclass(frozen=True, kw_only=True)
class Forecast(Generic[Engine]):
    """Predicts memory and cost of an engine's settings, before any of them runs.

    `print(forecast)` shows a table and a recommendation.
    """

    settings: tuple[Setting[Engine], ...]
    """The fastest first, by prediction."""
    memory: int | None
    """The limit in bytes; None: there is none."""
    tasks: int
    """How many tasks a call has."""
    gradients: int
    hvps: int
    """What its probes took, for one, two and three tasks."""

    @property
    def best(self) -> Setting[Engine] | None:
        """The fastest setting that fits; None: none does."""
        return next((setting for setting in self.settings if setting.fits), None)

    @property
    def recommended(self) -> Engine | None:
        """The engine of that setting."""
        return None if self.best is None else self.best.engine

    @property
    def fits(self) -> bool:
        """Whether any setting does."""
        return self.best is not None

    @property
    def leanest(self) -> Setting[Engine]:
        """The setting that takes the least memory."""
        return min(self.settings, key=lambda setting: setting.peak_bytes)

    @property
    def front(self) -> tuple[Setting[Engine], ...]:
        """Settings leaner by a tenth than every faster one, with the engine as it is, the best and the leanest."""
        found: list[Setting[Engine]] = []
        for setting in self.settings:
            lean = all(setting.peak_bytes <= _LEANER * faster.peak_bytes for faster in found)
            if lean or not setting.options or setting in (self.best, self.leanest):
                found.append(setting)
        return tuple(found)

    @property
    def advice(self) -> str:
        """The recommendation in a sentence, or what would help where nothing fits."""
        leanest, best = self.leanest, self.best
        if best is not None:
            cost = f"{best.gradients} gradients and {best.hvps} Hessian-vector products"
            return f"Use {self._called(best)}: {written(best.peak_bytes)}, {cost}."
        assert self.memory is not None
        return (
            f"Nothing fits into {written(self.memory)}. The leanest is {self._called(leanest)} with "
            f"{written(leanest.peak_bytes)}. {_HELP}"
        )

    def _called(self, setting: Setting[Engine]) -> str:
        return f"{type(setting.engine).__name__} {setting.name}" if not setting.options else setting.name

    def __str__(self) -> str:
        """A table, and the advice below it."""
        rows = [HEADINGS, *(cells(setting) for setting in self.front)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.advice])


def as_written(options: Mapping[str, object]) -> str:
    """Options as in a call, with types by their names."""
    return ", ".join(f"{name}={_value(value)}" for name, value in options.items())


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return value.__name__ if isinstance(value, type) else repr(value)


_LEANER = 0.9
HEADINGS = ("setting", "peak", "gradients", "HVPs", "cost", "fits")
_HELP = (
    "What helps: microbatch_size for large sets, checkpoints for many inner steps of MAML, fewer adapted parameters, "
    "smaller tasks; FOMAML and ImplicitMAML do not grow with the inner steps."
)


def cells(setting: Setting[Any]) -> tuple[str, ...]:
    """A row under `HEADINGS`."""
    return (
        setting.name,
        written(setting.peak_bytes),
        str(setting.gradients),
        str(setting.hvps),
        f"{setting.gradient_equivalents:.0f}",
        "yes" if setting.fits else "no",
    )
