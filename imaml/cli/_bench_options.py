"""Options of `imaml bench`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from imaml.cli._option_types import FromFile
from imaml.cli._options import STRATEGIES, EngineOptions, Strategy


@dataclass(frozen=True, kw_only=True)
class Bench(FromFile):
    """Measure what a meta-gradient of your own problem costs with every strategy and setting, and say which to use.

    A problem is a function without arguments that returns (objective, tasks), or (objective, tasks, engine): that
    engine is measured as it is, and the other strategies with its inner loop and regularization. An engine option that
    is given holds for every setting.

    Args:
        problem: module:function, imported with the current folder on the path.
        memory: Limit in MB (10^6 bytes) on what a meta-gradient may hold at once; None: no limit.
        strategies: Which to measure.
        repeats: Rounds in which the settings are timed in turn.
        threads: CPU threads; None: as torch chooses.
        out: Folder of the report, written over.
    """

    problem: Annotated[str | None, tyro.conf.Positional] = None
    memory: float | None = None
    strategies: tuple[Strategy, ...] = STRATEGIES
    repeats: int = 5
    threads: int | None = None
    out: Path = Path("runs", "bench")
    engine: EngineOptions = field(default_factory=EngineOptions)
