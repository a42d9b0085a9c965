"""The settings of a strategy that `imaml bench` measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from imaml import MetaGradient
from imaml.cli._options import Strategy
from imaml.cli._result import NAMES
from imaml.planning._predict import costs_of
from imaml.planning._settings import few


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to compute a meta-gradient: an engine, and the name of its setting."""

    strategy: Strategy
    setting: str
    engine: MetaGradient


def candidates(
    strategy: Strategy, engine: MetaGradient, *, device: torch.device, tasks: int, given: Mapping[str, object]
) -> Iterator[Candidate]:
    """The engine as it is, and the settings of it that are worth measuring.

    Args:
        strategy: The engine's strategy.
        engine: Its inner loop, regularization and solver are kept.
        device: Where it computes.
        tasks: How many there are.
        given: Options that the user has fixed, which do not vary.

    Yields:
        Candidates whose settings have different names.
    """
    for options in few(costs_of(engine), device, tasks):
        if options.keys() & given.keys():
            continue
        changed = replace(engine, **options)
        if not options or changed != engine:
            setting = ", ".join([NAMES[strategy], *(f"{option}={value!r}" for option, value in options.items())])
            yield Candidate(strategy=strategy, setting=setting, engine=changed)
