"""A forward pass over tasks, as often as it takes: vectorised or one by one, and leaving the user's batch as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from imaml._losses.record import Record
from imaml._losses.snapshot import Snapshot
from imaml._torch import inside_transform, is_out_of_memory

if TYPE_CHECKING:
    from types import TracebackType

Writes = dict[tuple[int, ...], bool]
"""Whether an evaluation writes to its batch, by part; of all parts of a chunk."""


@dataclass
class Attempts:
    """`for attempt in attempts: with attempt: ...` evaluates, and evaluates again where that is called for.

    - Whatever stops a vectorised pass, short of memory, the tasks run one by one from then on, unless that fails too:
      its error then says more.
    - What a first evaluation writes to the batch is undone; that one and all later ones then have a copy each.

    Raises:
        ValueError: A later evaluation writes to its batch, where the first did not.
    """

    snapshot: Snapshot
    record: Record
    data: Sequence[Tensor]
    """The tensors of the batch."""
    key: tuple[int, ...]
    """Says which random numbers the evaluation draws."""
    part: tuple[int, ...]
    """Which part of the chunk the batch is."""
    writes: Writes
    """What is known of all parts; added to."""
    many: bool
    """Whether there are several tasks."""
    _is_done: bool = False
    _fell_back: bool = False

    def __iter__(self) -> Iterator[Attempts]:
        """Until one attempt is good."""
        while not self._is_done:
            yield self

    def __enter__(self) -> None:
        held = self.snapshot.held
        self._known = self.writes.get(self.part)
        self._versions = [t._version for t in self.data]
        self._before = [t.clone() for t in self.data] if self._known is None else []
        self._copies = held.copies(afresh=inside_transform()) if held.places else None
        self._start = self.snapshot.replay.begin(self.key)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        """End an attempt; True where an error is to be forgotten."""
        if self._copies is not None:
            self.snapshot.held.put_back(self._copies, failed=error is not None)
        self.snapshot.replay.end(self.key, self._start, failed=error is not None)
        changed = [i for i, t in enumerate(self.data) if t._version != self._versions[i]]
        before, self._before = self._before, []
        for i in changed if before else ():
            self.data[i].detach().copy_(before[i])
        if error is not None:
            return self._forgets(error)
        self.writes[self.part] = bool(self._known or changed)
        if changed and not before:
            raise ValueError(
                "The model or the loss writes to its batch in place, which it did not at first. Expected a forward "
                "pass that leaves the tasks alone. Got changed data: use e.g. x = x - 1 for x.sub_(1)."
            )
        self._is_done = not changed
        return False

    def _forgets(self, error: BaseException) -> bool:
        if self._fell_back:
            self.record.is_vectorised = True
            return False
        if not (self.many and self.record.is_vectorised) or not isinstance(error, RuntimeError):
            return False
        if is_out_of_memory(error):
            return False
        self.record.is_vectorised, self._fell_back = False, True
        return True
