"""BANKING77: short messages of bank customers, by intent."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaml._tasks import TaskBatch
from imaml.data._episodes import Episodes, Split, check_count, check_split
from imaml.data._extras import optional
from imaml.data._few_shot import random_splits
from imaml.data._files import cache_folder

Encoder = Callable[[Sequence[str]], Mapping[str, Tensor]]
_URL = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data/"
_FILES = {
    "train.csv": "sha256:b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b",
    "test.csv": "sha256:d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d",
}
_VAL, _TEST = 10, 25


@dataclass(frozen=True, kw_only=True)
class Banking77(Episodes):
    """Draws few-shot tasks of intent classification from BANKING77, short messages of bank customers.

    A task has `ways` intents, each with `shots` support and `queries` query messages.

    The 77 intents are dealt into 42 train, 10 val and 25 test, always alike, and the messages of both published files
    (10,003 + 3,080) pooled within each.

    A batch holds what the encoder makes of the messages, each tensor `(tasks, ways * examples, *shape)`, by name, and
    labels `(tasks, ways * examples)`, int64. Every message is encoded once.

    Args:
        shots: Support messages of each intent.
        queries: Query messages of each intent.
        seed: Names the stream of tasks; it does not move the border between the splits.
        ways: Intents of a task, at least 2.
        encoder: From n messages to named tensors `(n, *shape)`, such as `imaml.text.FrozenLayers`.
        path: A folder with `train.csv` and `test.csv`; None downloads them once, by checksum, to the user's cache.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of range; from `batch`, also a file that does not hold 77 intents. Files are read at
            the first use, which raises FileNotFoundError or OSError (download) too.

    References:
        Casanueva et al. 2020, arXiv:2003.04807; CC BY 4.0, PolyAI.
    """

    ways: int = 5
    queries: int = 5
    encoder: Encoder
    path: str | os.PathLike[str] | None = None
    _encoded: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ways", self.ways, least=2)

    def intents(self, split: Split) -> list[str]:
        """The intents of `split`, sorted; none is in two splits."""
        check_split(split)
        return [self._names[i] for i in sorted(self._splits[split])]

    @cached_property
    def messages(self) -> dict[str, list[str]]:
        """All messages by intent."""
        folder = _download() if self.path is None else existing(self.path)
        found: dict[str, list[str]] = {}
        for name in _FILES:
            for row in csv.DictReader(io.StringIO((folder / name).read_text("utf-8"))):
                if not row.get("text") or not row.get("category"):
                    raise ValueError(f"{folder / name} must have columns text and category in every row. Got {row}.")
                found.setdefault(row["category"], []).append(row["text"])
        if len(found) != 77:
            raise ValueError(f"{folder} must hold the 77 intents of BANKING77. Got {len(found)}: get the files again.")
        return dict(sorted(found.items()))

    @cached_property
    def _names(self) -> list[str]:
        return list(self.messages)

    @cached_property
    def _splits(self) -> dict[str, NDArray[np.intp]]:
        return random_splits(np.arange(77), {"val": _VAL, "test": _TEST}, "train")

    @cached_property
    def _first(self) -> NDArray[np.intp]:
        """Position of each intent's first message among all."""
        return np.cumsum([0, *map(len, self.messages.values())])

    def _draw(self, split: Split, generators: Sequence[np.random.Generator]) -> TaskBatch:
        pool, used = self._splits[split], self.shots + self.queries
        if self.ways > len(pool):
            raise ValueError(f"`ways` must be at most {len(pool)}, the intents in split {split!r}. Got {self.ways}.")
        positions = np.empty((len(generators), self.ways, used), dtype=np.intp)
        for row, generator in enumerate(generators):
            for way, intent in enumerate(generator.choice(pool, self.ways, replace=False)):
                first, last = self._first[intent : intent + 2]
                if used > last - first:
                    raise ValueError(
                        f"`shots + queries` must be at most {last - first}, the messages of "
                        f"{self._names[intent]!r}. Got {used}."
                    )
                positions[row, way] = first + generator.choice(last - first, used, replace=False)
        return TaskBatch(
            support=self._pairs(positions[..., : self.shots]), query=self._pairs(positions[..., self.shots :])
        )

    def _pairs(self, positions: NDArray[np.intp]) -> tuple[dict[str, Tensor], Tensor]:
        tasks, ways, examples = positions.shape
        flat = torch.from_numpy(positions.reshape(tasks, ways * examples))
        self._encode(np.unique(positions))
        inputs = {name: values[flat] for name, values in self._encoded.items() if name != _KNOWN}
        return inputs, torch.arange(ways).repeat_interleave(examples).repeat(tasks, 1)

    def _encode(self, positions: NDArray[np.intp]) -> None:
        """Encode those messages that are not yet."""
        texts = [text for group in self.messages.values() for text in group]
        known = self._encoded.setdefault(_KNOWN, torch.zeros(len(texts), dtype=torch.bool))
        new = torch.from_numpy(positions)[~known[torch.from_numpy(positions)]]
        if len(new):
            for name, values in self.encoder([texts[i] for i in new.tolist()]).items():
                store = self._encoded.setdefault(name, values.new_empty(len(texts), *values.shape[1:]))
                store[new] = values
            known[new] = True


_KNOWN = ""


def existing(path: str | os.PathLike[str]) -> Path:
    """The folder `path`; raises FileNotFoundError where a file of BANKING77 is not in it."""
    folder = Path(path)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"No BANKING77 messages at {folder}: there is no {missing[0]}. Expected a folder with "
            f"{' and '.join(_FILES)}."
        )
    return folder


def _download() -> Path:
    pooch = optional("pooch", "The download of BANKING77")
    folder = cache_folder() / "banking77"
    for name, checksum in _FILES.items():
        pooch.retrieve(_URL + name, checksum, fname=name, path=folder)
    return folder
