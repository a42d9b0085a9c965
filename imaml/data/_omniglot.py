"""Omniglot: handwritten characters of fifty alphabets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from imaml.data import _omniglot_files as files
from imaml.data._few_shot import FewShot, ImageSet, random_splits

Division = Literal["random", "original"]


@dataclass(frozen=True, kw_only=True)
class Omniglot(FewShot):
    """Draws few-shot tasks of Omniglot: 1623 handwritten characters, each drawn once by 20 people.

    Images are 28x28, 1 bit a pixel.

    The split "random" deals the characters into 1100 train, 100 val and 423 test: the 1200/423 split of the MAML code,
    which also keeps 100 of the 1200 for validation. The deal is the same for every `seed`. "original" takes the 964
    background characters for train and val (864 and 100) and the 659 evaluation ones, of other alphabets, for test. A
    part of Omniglot is dealt in the same proportions.

    With `rotations` every character also stands for three more classes, turned by 90, 180 and 270 degrees, in all
    splits. A task holds distinct characters, each turned at random, as in the MAML code: a character never competes
    with itself.

    Args:
        shots: Support images of each class.
        queries: Query images of each class.
        seed: Names the stream of tasks.
        ways: Classes of a task.
        path: A packed `.npz` (arrays `images`, uint8 `(characters, 20, 98)` for 1 bit a pixel or `(characters, 20,
            392)` for 4, in the order of the official numbers, and `is_evaluation`), an official archive, or a folder
            with the archives or their contents. None downloads the archives once, by checksum, to the user's cache.
        split: "random" or "original".
        rotations: Whether turned characters are classes too.

    Raises:
        ValueError: A field is out of range. Files are read at the first use, which raises FileNotFoundError, ValueError
            (damaged, wrong checksum, wrong arrays) or OSError (download).

    References:
        Lake et al. 2015, Science 350:1332; Santoro et al. 2016 (rotations); Finn et al. 2017 and cbfinn/maml,
        `data_generator.py` (split and resizing).
    """

    path: str | os.PathLike[str] | None = None
    split: Division = "random"
    rotations: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in get_args(Division):
            raise ValueError(f"`split` must be 'random' or 'original'. Got {self.split!r}.")

    def _load(self) -> ImageSet:
        images, is_evaluation = files.read(None if self.path is None else Path(self.path))
        everything = np.arange(len(images))
        sizes = {"val": round(100 / 1623 * len(images))}
        if self.split == "random":
            return ImageSet(
                images, random_splits(everything, {**sizes, "test": round(423 / 1623 * len(images))}, "train")
            )
        if is_evaluation.all() or not is_evaluation.any():
            raise ValueError(
                "The original split needs background and evaluation characters. "
                f"Got only one kind in {self.path}: add the other archive, or use split='random'."
            )
        return ImageSet(
            images,
            {**random_splits(everything[~is_evaluation], sizes, "train"), "test": everything[is_evaluation]},
        )

    def _quarter_turns(self, generator: np.random.Generator) -> NDArray[np.int64] | int:
        return generator.integers(4, size=self.ways) if self.rotations else 0
