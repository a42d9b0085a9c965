"""Few-shot classification: episodes over images sorted by class."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imaml._tasks import TaskBatch
from imaml.data._episodes import Episodes, Split, check_count, check_split


class ImageSet(NamedTuple):
    """Holds images by class, and says which classes each split owns."""

    images: NDArray[np.uint8]
    """`(classes, examples, height, width)`, 255 = ink."""
    splits: Mapping[str, NDArray[np.intp]]
    """Class indices of each split."""


def random_splits(pool: NDArray[np.intp], sizes: Mapping[str, int], rest: str) -> dict[str, NDArray[np.intp]]:
    """Deal `pool` at random but always alike: `sizes` classes to each named split, the others to `rest`."""
    shuffled = pool[np.random.Generator(np.random.PCG64(0)).random(len(pool)).argsort()]
    borders = np.cumsum(list(sizes.values()))
    return dict(zip((*sizes, rest), np.split(shuffled, borders), strict=True))


@dataclass(frozen=True, kw_only=True)
class FewShot(Episodes):
    """Draws tasks of N-way classification: `ways` classes, each with `shots` support and `queries` query images.

    A batch holds images `(tasks, ways * examples, 1, height, width)`, float32 in [0, 1] with ink = 1, and labels
    `(tasks, ways * examples)`, int64, the classes one after the other. Which class gets which label is random; the
    support and query images of a class are different ones.

    Images load at the first use.

    Args:
        shots: Support images of each class.
        queries: Query images of each class.
        seed: Names the stream of tasks; it does not move the border between the splits.
        ways: Classes of a task, at least 2.

    Raises:
        TypeError: A field is not an integer.
        ValueError: A field is out of range; from `batch`, `ways` exceeds the classes of the split or `shots + queries`
            the images of a class.
    """

    ways: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ways", self.ways, least=2)

    def classes(self, split: Split) -> NDArray[np.intp]:
        """The classes of `split`, as indices into `images`; no class is in two splits."""
        check_split(split)
        return self._data.splits[split]

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images by class, `(classes, examples, height, width)`, 255 = ink."""
        return self._data.images

    @cached_property
    def _data(self) -> ImageSet:
        return self._load()

    @abstractmethod
    def _load(self) -> ImageSet:
        """Read or make the images."""

    def _quarter_turns(self, generator: np.random.Generator) -> NDArray[np.int64] | int:
        """Draw by how many quarter turns each class of a task is rotated; not at all as a rule."""
        return 0

    def _draw(self, split: Split, generators: Sequence[np.random.Generator]) -> TaskBatch:
        pool, available, used = self.classes(split), self.images.shape[1], self.shots + self.queries
        if self.ways > len(pool):
            raise ValueError(f"`ways` must be at most {len(pool)}, the classes in split {split!r}. Got {self.ways}.")
        if used > available:
            raise ValueError(f"`shots + queries` must be at most {available}, the images of a class. Got {used}.")
        tasks = len(generators)
        ways = np.empty((tasks, self.ways), dtype=np.intp)
        order = np.empty((tasks, self.ways, available))
        turns = np.zeros((tasks, self.ways), dtype=np.intp)
        for row, generator in enumerate(generators):
            ways[row] = generator.choice(pool, self.ways, replace=False)
            generator.random(out=order[row])
            turns[row] = self._quarter_turns(generator)
        examples = order.argsort(axis=-1)[..., :used]
        images = self.images[ways[..., None], examples]
        for turn in range(1, turns.max() + 1):
            images[turns == turn] = np.rot90(images[turns == turn], turn, axes=(-2, -1))
        return TaskBatch(support=self._pairs(images[:, :, : self.shots]), query=self._pairs(images[:, :, self.shots :]))

    def _pairs(self, images: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        tasks, ways, examples, height, width = images.shape
        inputs = images.reshape(tasks, ways * examples, 1, height, width) / np.float32(255)
        return torch.from_numpy(inputs), torch.arange(ways).repeat_interleave(examples).repeat(tasks, 1)
