"""What an engine remembers from call to call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from inspect import ismethod
from typing import Any, ClassVar, TypeVar
from weakref import ref

from imaml._curvature.compiler import Compiler
from imaml._curvature.derivatives import Findings
from imaml._engine.chunking import Footprint
from imaml._objective.objective import Objective
from imaml._objective.reach import modules_in

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


class Known(Recent[Any, tuple[list[Callable[[], object]], Any]]):
    """What was found out about some objects, by their addresses; forgotten when they end, and others may have these."""

    def of(self, parts: Sequence[object], modes: Hashable, make: Callable[[], V]) -> V:
        """What is known of them.

        Args:
            parts: The objects.
            modes: The state in which they are.
            make: Makes what is known at first.

        Returns:
            The same object as before, if they are the same and in this state.
        """
        key = (*map(id, parts), modes)
        alive, found = self.get(key, ([], None))
        if len(alive) != len(parts) or not all(ref() is part for ref, part in zip(alive, parts, strict=True)):
            found = make()
            self[key] = [_weak(part) for part in parts], found
        known: V = found
        return known


@dataclass
class Memory:
    """What was found out or made once; a copy of an engine, as in another process, begins with none of it."""

    compiler: Compiler = field(default_factory=Compiler)
    footprints: Recent[Any, Footprint] = field(default_factory=Recent)
    """What a task takes, by its shapes."""
    slices: Known = field(default_factory=Known)
    """Shapes for which the losses of an objective are means of slices."""
    derivatives: Known = field(default_factory=Known)
    """What was found out about the derivatives of a model, or of a function."""
    looks: Recent[Any, Any] = field(default_factory=Recent)
    """What `chunk_size="auto"` has measured, by shapes."""
    alike: set[Any] = field(default_factory=set)
    """Layouts and groups of ranks whose parameters are the same."""
    said: set[type[Warning]] = field(default_factory=set)
    """Kinds of warnings that are said once."""

    def sliced(self, objective: Objective) -> Recent[Any, None]:
        """Shapes for which its losses are means of slices; of another one of the same model and losses too."""
        parts: list[object] = [objective.model]
        for loss in (objective.loss, objective.outer_loss):
            parts += [loss.__self__, loss.__func__] if ismethod(loss) else [loss]
        return self.slices.of(parts, _modes(objective), Recent)

    def findings(self, objective: Objective) -> Findings:
        """What was found out about its derivatives: those of its model, whatever the loss."""
        # Of functions that are made anew for every call the code stays.
        loss = getattr(objective.loss, "__code__", objective.loss)
        return self.derivatives.of([loss if objective.model is None else objective.model], _modes(objective), Findings)


def _modes(objective: Objective) -> Hashable:
    modules = () if objective.model is None else modules_in(objective.model)
    return getattr(objective._program, "buffers", None), tuple(module.training for module in modules)


def _weak(part: object) -> Callable[[], object]:
    try:
        return ref(part)
    except TypeError:  # None, or an object of a class that has no room for it
        return lambda: part
