"""Which settings of a strategy are worth measuring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from imaml import MetaGradient
from imaml.cli._options import Strategy
from imaml.cli._outcome import NAMES


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to compute a meta-gradient: an engine, and its name."""

    strategy: Strategy
    name: str
    engine: MetaGradient


def settings(strategy: Strategy, engine: MetaGradient, *, tasks: int, given: Mapping[str, object]) -> Iterator[Setting]:
    """The engine as it is, and variations of it.

    Args:
        strategy: The engine's strategy.
        engine: Its inner loop, regularization and solver are kept.
        tasks: How many there are.
        given: Options that the user has fixed, which do not vary.

    Yields:
        Settings of different names.
    """
    for changes in _variations(strategy, engine, tasks):
        if changes.keys() & given.keys():
            continue
        try:
            changed = replace(engine, **changes)
        except ValueError:
            continue  # they exclude something that the engine has
        if not changes or changed != engine:
            name = ", ".join([NAMES[strategy], *(f"{option}={value!r}" for option, value in changes.items())])
            yield Setting(strategy=strategy, name=name, engine=changed)


def _variations(strategy: Strategy, engine: MetaGradient, tasks: int) -> Iterator[dict[str, Any]]:
    yield {}
    if tasks > 1:
        yield {"chunk_size": 1}
        yield {"chunk_size": tasks}
    if strategy == "fomaml":
        return
    yield {"hvp": "forward-over-reverse"} if strategy == "maml" else {"linearize": False}
    yield {"chunk_size": 1, "linearize": strategy == "maml"}
    if strategy == "maml" and engine.inner.steps > 2:
        yield {"chunk_size": 1, "checkpoints": isqrt(engine.inner.steps)}
