"""What an engine remembers from call to call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from imaml._curvature.compiler import Compiler
from imaml._engine.chunking import Chunking

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
class Memory:
    """What was found out or made once; a copy of an engine, as in another process, begins with none of it."""

    compiler: Compiler = field(default_factory=Compiler)
    chunkings: Recent[Any, Chunking] = field(default_factory=Recent)
    """How tasks run, by their shapes."""
    sliced: Recent[Any, Any] = field(default_factory=Recent)
    """Objectives and shapes whose losses are means of slices."""
    looks: Recent[Any, Any] = field(default_factory=Recent)
    """What `chunk_size="auto"` has measured, by shapes."""
    alike: set[Any] = field(default_factory=set)
    """Layouts and groups of ranks whose parameters are the same."""
    said: set[type[Warning]] = field(default_factory=set)
    """Kinds of warnings that are said once."""
