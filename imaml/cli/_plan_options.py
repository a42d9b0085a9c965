"""Options of `imaml plan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from imaml.cli._option_types import FromFile
from imaml.cli._options import STRATEGIES, EngineOptions, Strategy


@dataclass(frozen=True, kw_only=True)
class Predict(FromFile):
    """Predict what a meta-gradient of your own problem takes with every strategy and setting, before any of them runs.

    A problem is a function without arguments that returns (objective, tasks), or (objective, tasks, engine): that
    engine is planned as it is, and the other strategies with its inner loop and regularization. An engine option that
    is given holds for every setting. A few gradients and Hessian-vector products of one to three tasks are computed.

    Args:
        problem: module:function, imported with the current folder on the path.
        memory: Limit on what a meta-gradient may hold at once, such as 4GiB, 500MB, or bytes; None: what is free on an
            accelerator, and none on a CPU.
        strategies: Which to look at.
        threads: CPU threads; None: as torch chooses.
    """

    problem: Annotated[str | None, tyro.conf.Positional] = None
    memory: str | None = None
    strategies: tuple[Strategy, ...] = STRATEGIES
    threads: int | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
