"""What an engine remembers from call to call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from inspect import ismethod
from typing import Any, ClassVar, TypeVar
from weakref import ref

from imaml._curvature.compiler import Compiler
from imaml._curvature.derivatives import Findings
from imaml._engine.chunking import Chunking
from imaml._objective.objective import Objective

K = TypeVar("K")
V = TypeVar("V")


class Recent(dict[K, V]):
    """What was set last under `most` keys; the key that was set first goes first."""

    most: ClassVar[int] = 256

    def __setitem__(self, key: K, value: V) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        while len(self) > self.most:
            del self[next(iter(self))]


@dataclass
class Known:
    """What an engine has found out about an objective."""

    sliced: Recent[Any, None] = field(default_factory=Recent)
    """Shapes for which its losses are means of slices."""
    derivatives: Findings = field(default_factory=Findings)


@dataclass
class _Objective:
    known: Known
    parts: list[Callable[[], object]]
    """Its parts, which end when nobody else holds them, and whose addresses others may then have."""


@dataclass
class Memory:
    """What was found out or made once; a copy of an engine, as in another process, begins with none of it."""

    compiler: Compiler = field(default_factory=Compiler)
    chunkings: Recent[Any, Chunking] = field(default_factory=Recent)
    """How tasks run, by their shapes."""
    objectives: Recent[Any, _Objective] = field(default_factory=Recent)
    """What is known of an objective, by the addresses of its parts and the modes that the model is in."""
    looks: Recent[Any, Any] = field(default_factory=Recent)
    """What `chunk_size="auto"` has measured, by shapes."""
    alike: set[Any] = field(default_factory=set)
    """Layouts and groups of ranks whose parameters are the same."""
    said: set[type[Warning]] = field(default_factory=set)
    """Kinds of warnings that are said once."""

    def of(self, objective: Objective) -> Known:
        """What is known of an objective; of another one of the same model and losses too."""
        parts, modes = _parts(objective)
        key = (*map(id, parts), modes)
        found = self.objectives.get(key)
        if found is None or not all(alive() is part for alive, part in zip(found.parts, parts, strict=True)):
            found = self.objectives[key] = _Objective(Known(), [_weak(part) for part in parts])
        return found.known


def _parts(objective: Objective) -> tuple[list[object], Hashable]:
    """The model and the losses, which another objective of the same has too, and the modes that the model is in."""
    model = objective.model
    parts: list[object] = [] if model is None else [model]
    for loss in (objective.loss, objective.outer_loss):
        parts += [loss.__self__, loss.__func__] if ismethod(loss) else [loss]
    modes = () if model is None else tuple(module.training for module in model.modules())
    return parts, (getattr(objective._program, "buffers", None), modes)


def _weak(part: object) -> Callable[[], object]:
    try:
        return ref(part)
    except TypeError:  # None, or an object of a class that has no room for it
        return lambda: part
